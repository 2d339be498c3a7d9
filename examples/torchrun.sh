#!/usr/bin/env bash
# One machine, one process for each GPU, or for each share of the CPU cores.
#
#   PROCESSES=4 examples/torchrun.sh photos/ --backbone resnet50 --out runs/photos
#   examples/torchrun.sh digits --engine.device cpu --epochs 2 --out runs/two-ranks
#
# The same command goes on with a run that was stopped.
set -euo pipefail

run=
for ((i = 1; i < $#; i++)); do
    if [ "${!i}" = --out ]; then j=$((i + 1)) && run=${!j}; fi
done
if [ -n "$run" ] && [ -e "$run/config.yaml" ]; then
    set -- resume "$run"
else
    set -- pretrain "$@"
fi
exec torchrun --standalone --nproc-per-node "${PROCESSES:-2}" -m relssl "$@"
