#!/usr/bin/env bash
# All that there is to measure on a GPU, in eight minutes at most: the tests of kernels and functions
# on it, then host time, a ResNet-50, where mmdet is installed a detector, WS, and norms in float16 and
# float32, NCHW; then the ResNet-50 and norms in half precision, channels_last. What no time was left
# for is named at the end; tools/benchmark/benchmark_layers.py measures it.
#
#   bash tools/benchmark/gpu.sh OUT
#
# OUT gets report.md (what ran, what could not, every table), the log of each part, and of both
# benchmarks results.json and charts. Needs torch with CUDA and Triton, and a C++ compiler; pytest for
# the tests (with xdist they take a fraction of the time). Nothing has to be installed: the package is
# taken from this repository, and its extension is compiled in it. Exit status 1 where something was
# wrong or nothing ran.
#
# PYTHON: the interpreter (default: python, or python3). IN_ALL: after how many seconds it ends
# (default: 480).
# DEVICE=cpu: the same on a CPU with tiny shapes, to see that it runs.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash tools/benchmark/gpu.sh OUT" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
python=${PYTHON:-$(command -v python || echo python3)}
device=${DEVICE:-cuda}
in_all=${IN_ALL:-480}
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" - "$device" <<'PYTHON' || exit 1
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f'error: {error}; PYTHON names the interpreter of an environment with torch')
if sys.argv[1] == 'cuda' and not torch.cuda.is_available():
    sys.exit(f'error: torch {torch.__version__} sees no CUDA device')
PYTHON

report=$out/report.md
ran=0 failed=0
{
    echo "# $("$python" -c "import torch; print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'CPU', 'torch', torch.__version__)")"
    echo
    date '+%Y-%m-%d %H:%M:%S %z'
    git rev-parse HEAD 2>/dev/null
} >"$report"

# most SECONDS: as long as that, or what is left of the time in all.
most() { echo $(($1 < in_all - SECONDS ? $1 : in_all - SECONDS)); }

# part NAME SECONDS COMMAND...: runs it, at most so long; its output becomes a part of the report.
part() {
    local name=$1 seconds start=$SECONDS
    seconds=$(most "$2")
    shift 2
    printf '\n## %s\n\n' "$name" >>"$report"
    if [ "$seconds" -lt 5 ]; then
        echo "**No time was left.**" >>"$report"
        return
    fi
    echo "gpu: $name" >&2
    timeout -k 10 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    {
        echo "\`$(printf '%q ' "$@")\`, $((SECONDS - start)) s"
        echo
    } >>"$report"
    if [ $status -eq 0 ]; then
        ran=$((ran + 1))
    elif [ $status -eq 124 ]; then
        echo "**Not finished in $seconds s; what is below had been measured.**" >>"$report"
        if grep -qw PASSED "$out/$name.log"; then
            echo "Tests that had passed until then: $(grep -cw PASSED "$out/$name.log")." >>"$report"
        fi
        ran=$((ran + 1))
    else
        failed=1
        echo "**Failed, exit status $status.**" >>"$report"
    fi
    # Without the progress of benchmarks, and of tests that did not fail.
    grep -vE '^[0-9:]{8}  |^$' "$out/$name.log" |
        awk '!/^(tests\/|\[gw)/ || / (FAILED|ERROR)( |$)/' | tail -n "$KEEP" >>"$report"
}

# The launcher is C++: made in the tree where it is not there yet, or older than what it is made of.
compiled() { "$python" -c 'from wsbcn_mm.backends import cpu; raise SystemExit(cpu.unavailable() is not None)'; }
newer() {
    local library
    library=$("$python" -c 'from wsbcn_mm.backends.cpu import _kernels; print(_kernels.__file__)')
    find wsbcn_mm/backends -newer "$library" \( -name '*.cpp' -o -name '*.h' \)
}
if compiled && [ -z "$(newer)" ]; then
    printf '\nThe compiled extension was there.\n' >>"$report"
else
    WSBCN_BUILD=1 KEEP=3 part build 300 "$python" setup.py -q build_ext --inplace
    if ! compiled; then  # it failed, or was not finished
        failed=1
        printf '\n**Everything below is launched from Python, which takes several times as long.**\n' >>"$report"
    elif [ -n "$(newer)" ]; then
        failed=1
        printf '\n**Everything below is of an extension that is older than its sources.**\n' >>"$report"
    fi
fi

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
# A line for each test (setup.cfg has a -q): what failed is known where no time is left to say it.
tests() {
    status=0
    KEEP=25 part "$1" "$2" "$python" -m pytest -vv -p no:cacheprovider "${workers[@]}" --maxfail=20 "${@:3}"
    if [ $status -eq 124 ] && grep -qwE 'FAILED|ERROR' "$out/$1.log"; then
        failed=1
    fi
}

if "$python" -c 'import pytest' 2>/dev/null; then
    tests tests_functions 50 tests/functional --device "$device"
    tests tests_functions_half 40 tests/functional --device "$device" --dtype float16
    [ "$device" = cpu ] || tests tests_kernels 110 tests/backends/triton
else
    printf '\n**The tests could not run: pytest is not installed.**\n' >>"$report"
fi

# benchmark NAME SECONDS ARGUMENTS...: begins nothing more in the last of them.
benchmark() {
    KEEP=2000 part "$1" "$2" "$python" tools/benchmark/benchmark_layers.py "${@:3}" -o "$out/$1" \
        --seconds $(($(most "$2") - 30))
}
# What most people run first; then what there is time for.
if [ "$device" = cpu ]; then
    benchmark benchmark 290 --device cpu --quick
else
    benchmark benchmark 205 --device cuda --repeats 5 \
        --dtype float16 float32 --layout nchw
    benchmark benchmark_rest 95 --device cuda --repeats 5 --only backbone norm \
        --dtype bfloat16 float16 --layout channels_last
fi

echo "gpu: $report" >&2
[ $ran -gt 0 ] && [ $failed -eq 0 ]
