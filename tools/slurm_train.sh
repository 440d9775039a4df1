#!/usr/bin/env bash
# Trains on a Slurm cluster: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS; WSBCN_PYTHON names the python (python).
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
# shellcheck disable=SC2086  # SRUN_ARGS is a list
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" exec srun -p "$1" --job-name="$2" \
    --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${WSBCN_PYTHON:-python}" -u "$here/train.py" "$3" --work-dir="$4" --launcher=slurm "${@:5}"
