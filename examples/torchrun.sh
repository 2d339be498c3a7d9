#!/usr/bin/env bash
# One process for each GPU, or for each share of the CPU cores; on several machines with the same line on each of them.
#
#   PROCESSES=4 examples/torchrun.sh photos/ --backbone resnet50 --out runs/photos
#   examples/torchrun.sh digits --device cpu --epochs 2 --out runs/two-ranks
#   NODES=2 HOST=first-machine:29500 PROCESSES=4 examples/torchrun.sh photos/ --out /shared/runs/photos      # on both of two machines
#
# The same command goes on with a run that was stopped.
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else processes that torchrun starts anew look for those that are gone
where=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
    where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${HOST:?HOST=NAME:PORT of one of the machines}" --rdzv-id "${JOB:-relssl}")
fi
exec torchrun "${where[@]}" --nproc-per-node "${PROCESSES:-2}" -m relssl pretrain "$@" --resume auto
