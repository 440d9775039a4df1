#!/usr/bin/env bash
# Evaluates on a Slurm cluster: bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS; WSBCN_PYTHON names the python (python).
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]" >&2; exit 2; }
exec bash "$(dirname "$0")/slurm.sh" "$1" "$2" test.py "$3" "$4" --launcher=slurm "${@:5}"
