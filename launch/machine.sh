#!/usr/bin/env bash
# Training on all GPUs of this machine; anything else goes to `pixeldip train`:
#
#   launch/machine.sh imagenet256-dip-xl --data.source IMAGENET --out runs/xl
#
# PROCESSES sets how many processes (by default one for each GPU), RESTARTS how often all of them are started again from
# the last checkpoint when one dies.
set -euo pipefail
exec python -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-gpu}" \
    --max-restarts "${RESTARTS:-3}" -m pixeldip.cli train "$@"
