#!/usr/bin/env bash
# Training on several machines. Run this on each of them, with the same values; all must see the folder --out:
#
#   HEAD=node-1 MACHINES=4 launch/machines.sh imagenet256-dip-xl --data.source IMAGENET --out /shared/runs/xl
#
# HEAD is the name of one of them, which the others can reach on PORT. PROCESSES (by default one for each GPU) and RESTARTS
# are those of launch/machine.sh.
set -euo pipefail
: "${HEAD:?the name of one of the machines}" "${MACHINES:?how many machines there are}"
# each start of the processes gets a store of its own, where they do not look for those before it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec python -m torch.distributed.run --nnodes "$MACHINES" --nproc-per-node "${PROCESSES:-gpu}" \
    --max-restarts "${RESTARTS:-3}" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id pixeldip \
    -m pixeldip.cli train "$@"
