#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh share: bash tools/dist.sh TOOL GPUS [arguments of the tool]
# Python: WSBCN_PYTHON, else the environment of tools/setup_env.sh if it was made, else `python`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${WSBCN_VENV:-$here/../.venv}/bin/python
python=${WSBCN_PYTHON:-$([ -x "$venv" ] && echo "$venv" || echo python)}
case $2 in '' | *[!0-9]* | 0) echo "$0: GPUS must be a positive number, got '$2'" >&2; exit 2 ;; esac
# One thread per process, as torchrun chooses, unless the user says otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" --nproc_per_node="$2" \
    "$here/$1" "${@:3}" --launcher pytorch
