#!/usr/bin/env bash
# Runs the tests: bash tests/run.sh [arguments of pytest]. Makes the environment when it is missing.
#
# Two processes, each with one thread; one with `-n 0`, which a debugger needs. The tests of one file
# stay in one process, because they share what they train; files come in their order, or those with one
# long test would come last, beside a process that has nothing left to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash tools/setup_env.sh)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${@:-tests}"
