#!/usr/bin/env bash
# Tests stacks of tools/dev/stacks.txt, each in an environment of its own, and writes their rows of
# docs/versions.md:
#
#   bash tools/dev/matrix.sh [NAME...]               default: all
#   bash tools/dev/matrix.sh --quickstart [NAME...]  instead of the tests the quickstart, as a user
#                                                    runs it: everything made anew, nothing cached
#
#   WSBCN_STACKS=DIR   where environments, logs and results are kept (default: .stacks)
#   WSBCN_WHEELS=DIR   where wheels of mmcv lie that need not be compiled
#   WSBCN_KEEP=0       removes each environment afterwards: one with torch for CUDA takes 7 GB
#   WSBCN_PAGE=FILE    the page whose rows are written (default: docs/versions.md)
#   WSBCN_WORKERS=N    processes that test (default: one per core)
#
# Exit code 1: a stack failed. 2: none failed, but one could not be made here (no such Python, no such
# package to be had): it gets no row. The environments of an earlier call are used again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
stacks=$(realpath -m "${WSBCN_STACKS:-$root/.stacks}")
page=$(realpath -m "${WSBCN_PAGE:-$root/docs/versions.md}")
stack() { awk -v name="$1" '$1 == name' "$root/tools/dev/stacks.txt"; }
say() { echo "matrix: $*" >&2; }

# What needs torch alone, first what Triton must be told to interpret for; with OpenMMLab its own tests,
# and those of the tools.
alone=(tests/backends tests/functional tests/layers tests/test_compat.py tests/test_golden.py tests/test_reference.py)
hosted=(tests/openmmlab tests/tools)

try=tests
[ "${1:-}" != --quickstart ] || { try=quickstart; shift; }
[ $# -gt 0 ] || set -- $(awk '!/^#/ {print $1}' "$root/tools/dev/stacks.txt")
for name; do
    [ -n "$(stack "$name")" ] || { echo "error: no stack '$name' in tools/dev/stacks.txt" >&2; exit 1; }
done

find_python() {  # pyenv's shims start one version alone
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then echo "$candidate"; return; fi
    done
    say "no Python $1 here"
    return 1
}

pip() { venv/bin/python -m pip --disable-pip-version-check -q "$@"; }

make_environment() {  # of the stack that was read
    local base
    base=$(find_python "$python") || return 1
    [ -x venv/bin/python ] || "$base" -m venv venv
    # As in tools/setup_env.sh: the CPU build where its index can be reached, else PyPI's for CUDA.
    if ! venv/bin/python -c 'import sys, torch; sys.exit(not torch.__version__.startswith(sys.argv[1]))' "$torch" 2>/dev/null; then
        pip install --no-deps --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch" || return 1
    fi
    # Not the pinned pytest and hypothesis, which want a newer Python.
    pip install "torch==$torch" "numpy==$numpy" "triton==$triton" 'setuptools<81' wheel ninja psutil \
        pytest pytest-xdist hypothesis || return 1
    [ "$hosts" != - ] || return 0
    local pinned=()
    if [ "$hosts" = openmmlab ] && [ "$vision" = - ]; then  # Triton: the CUDA build of torch has its own
        grep -v '^triton' "$root/requirements/constraints.txt" >constraints.txt
        pinned=(-c constraints.txt)
    fi
    cp "$root/requirements/$hosts.txt" hosts.txt
    if [ "$vision" != - ]; then  # nothing is compiled; regex as pinned has no wheel for Python 3.10
        sed -i -E 's/^mmcv==/mmcv-lite==/; s/^(ftfy|regex)==[^ ]*/\1/' hosts.txt
        echo "torchvision==$vision" >>hosts.txt
    fi
    # The ops of mmcv are compiled, unless WSBCN_WHEELS or pip's cache has them.
    CFLAGS=-g0 CXXFLAGS=-g0 MMCV_WITH_OPS=1 pip install --no-build-isolation "${pinned[@]}" \
        ${WSBCN_WHEELS:+--find-links "$WSBCN_WHEELS"} -r hosts.txt "torch==$torch" "numpy==$numpy" || return 1
    [ "$try" = tests ] || return 0
    pip install "${pinned[@]}" $(grep -oE '^(build|onnx[a-z]*|scikit-learn)==[^ ]*' "$root/requirements/dev.txt") "numpy==$numpy" || return 1
    pip install --no-deps -r "$root/requirements/classification.txt" || return 1
    [ "$hosts" = fork ] ||  # whose mmcv mmaction2 refuses
        pip install --no-deps -r "$root/requirements/video.txt"
}

copy_tree() {  # so that the kernels of one stack are not found by another
    rm -rf tree && mkdir tree
    (cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -) | tar -C tree -xf -
}

run_tests() {  # 0: passed, 1: some failed, else: they did not run
    local tests=("${alone[@]}") status=0
    [ "$hosts" = - ] || tests=("${hosted[@]}")
    rm -f ../results.xml
    {
        WSBCN_BUILD=1 ../venv/bin/python setup.py -q build_ext --inplace &&
            PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ../venv/bin/python -m pytest \
                -p no:cacheprovider -n "${WSBCN_WORKERS:-$(nproc)}" --dist loadfile \
                --junitxml ../results.xml "${tests[@]}"
    } >>../log 2>&1 || status=$?
    [ $status -le 1 ] && [ -s ../results.xml ] || return 2
    grep -E '^(FAILED|ERROR)|^=+ .* in [0-9.]+s|^[0-9]+ (passed|failed)' ../log >&2 || true
    PYTHONPATH=$PWD ../venv/bin/python tools/dev/versions_page.py "$page" "$name" ../results.xml --commit "$commit" || return 2
    return $status
}

run_quickstart() {  # started: when there was nothing yet
    local ops=mmcv
    [ "$vision" = - ] || ops=torchvision
    {
        WSBCN_BUILD=1 ../venv/bin/python setup.py -q build_ext --inplace &&
            WSBCN_MMCV_OPS=$ops WSBCN_PYTHON=$(realpath -s ../venv/bin/python) bash tools/quickstart.sh
    } >>../log 2>&1 || return 2
    [ $ops = torchvision ] || ops="mmcv, $([ -n "${WSBCN_WHEELS:-}" ] && echo 'a wheel' || echo compiled)"
    PYTHONPATH=$PWD ../venv/bin/python tools/dev/versions_page.py "$page" "$name" ../log --commit "$commit" \
        --started "$started" --operators "$ops"
}

failed=0 missing=0
commit=$(git -C "$root" describe --always --dirty)  # before the page is written
for name; do
    read -r _ python torch numpy triton hosts vision <<<"$(stack "$name")"
    folder=$stacks/$name
    if [ $try = quickstart ]; then
        folder=$folder/quickstart
        rm -rf "$folder"
        export PIP_NO_CACHE_DIR=1
        [ "$hosts" != - ] || hosts=openmmlab
    else
        vision=-
    fi
    mkdir -p "$folder" && cd "$folder"
    say "$name: Python $python, torch $torch, hosts: $hosts; log: $folder/log"
    started=$(date +%s)
    if ! make_environment >log 2>&1; then
        tail -n 3 log | cut -c 1-300 >&2
        say "$name: cannot be made here"; missing=1; continue
    fi
    copy_tree && cd tree
    status=0
    run_$try || status=$?
    [ $status = 0 ] || failed=1
    [ $status -le 1 ] || { tail -30 ../log >&2; say "$name: failed"; continue; }
    cd "$folder"
    [ "${WSBCN_KEEP:-1}" = 1 ] || rm -rf venv tree
done
exit $((failed ? 1 : missing ? 2 : 0))
