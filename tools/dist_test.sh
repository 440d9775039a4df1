#!/usr/bin/env bash
# Evaluates with several processes: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
# Without a GPU the processes share the CPU. Several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2; exit 2; }
exec bash "$(dirname "$0")/dist.sh" test.py "$3" "$1" "$2" "${@:4}"
