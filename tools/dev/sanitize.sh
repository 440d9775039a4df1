#!/usr/bin/env bash
# The tests of the CPU kernels, and of the launcher of a GPU's, once under AddressSanitizer and
# UndefinedBehaviorSanitizer: reads and writes outside of a tensor, and what C++ leaves undefined,
# stop them. For gcc on Linux; minutes.
#
#   bash tools/dev/sanitize.sh [arguments of pytest]
#
# PYTHON: the interpreter of an environment with torch and pytest (default: .venv's, else python).
# What it builds lies in a temporary folder, removed afterwards.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python
[ $# -gt 0 ] || set -- tests/backends/test_backends.py tests/backends/test_contract.py tests/functional \
    tests/backends/triton/test_launcher.py tests/layers/test_scopes.py tests/layers/test_recomputation.py
compiler=${CXX:-g++}
libraries="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
for library in $libraries; do
    [ -e "$library" ] || { echo "error: $compiler has no ${library##*/}; install gcc's sanitizers" >&2; exit 1; }
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tar -C "$root" --exclude='*.so' --exclude=__pycache__ --exclude=.mim -cf - \
    setup.py setup.cfg README.md LICENSE requirements tests wsbcn_mm | tar -C "$folder" -xf -
cd "$folder"
echo "sanitize: compiles the kernels with -fsanitize=address,undefined" >&2
# -march=native: in the registers of this machine, as the loader would choose.
flags='-march=native -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer'
CFLAGS="$flags" LDFLAGS="$flags" WSBCN_BUILD=1 "$python" setup.py -q build_ext --inplace >build.log 2>&1 ||
    { tail -30 build.log >&2; exit 1; }

# Python itself is not instrumented: the libraries are loaded before everything else, and what
# Python and torch keep until the end is not a leak.
echo "sanitize: runs $*" >&2
export LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$folder" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
"$python" -c 'import sys; from wsbcn_mm.backends import cpu; sys.exit(cpu.unavailable())'
# What is freed stays for a while with AddressSanitizer: that it goes back to the system, it cannot show.
"$python" -m pytest -p no:cacheprovider "$@" \
    --deselect tests/backends/test_backends.py::test_memory_is_kept_for_the_next_pass_and_released
