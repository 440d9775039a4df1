#!/usr/bin/env bash
# Runs the tests: bash tests/run.sh [arguments of pytest]. Makes the environment when it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash tools/setup_env.sh)
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m pytest "${@:-tests}"
