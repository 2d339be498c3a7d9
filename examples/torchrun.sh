#!/usr/bin/env bash
# One machine, one process for each GPU, or for each share of the CPU cores.
#
#   PROCESSES=4 examples/torchrun.sh photos/ --backbone resnet50 --out runs/photos
#   examples/torchrun.sh digits --device cpu --epochs 2 --out runs/two-ranks
#
# The same command goes on with a run that was stopped.
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${PROCESSES:-2}" -m relssl pretrain "$@" --resume auto
