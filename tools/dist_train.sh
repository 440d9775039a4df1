#!/usr/bin/env bash
# Trains with several processes on this machine: bash tools/dist_train.sh CONFIG GPUS [arguments of train.py]
# Without a GPU the processes share the CPU. Several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2; exit 2; }
exec bash "$(dirname "$0")/dist.sh" train.py "$2" "$1" "${@:3}"
