#!/usr/bin/env bash
# Makes the environment that the project's scripts run in, once: bash tools/setup_env.sh
#
# Everything it says goes to stderr; the last thing it does is to print the path of the python to
# use on stdout. Later runs find the environment ready and take a fraction of a second.
#
#   WSBCN_PYTHON=/path/to/python  use this environment as it is: nothing is installed into it
#   WSBCN_VENV=/path/to/venv      where the environment is made (default: .venv in the project)
#   WSBCN_MMCV_OPS=torchvision    mmcv without its compiled ops, NMS and RoIAlign from torchvision:
#                                 nothing is compiled for minutes, no nvcc; to be set when training too
#   WSBCN_DEVICE=cpu|cuda         which builds to install (default: cuda where nvidia-smi lists a GPU)
#   WSBCN_WHEELS=DIR              where a wheel of mmcv with its ops is looked for before it is
#                                 compiled, and left afterwards (default: ~/.cache/wsbcn_mm/wheels)
#   TORCH_CUDA_ARCH_LIST="8.6 9.0"  the GPUs that mmcv's ops are compiled for (default: those that
#                                 nvidia-smi names)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*" >&2; }
fail() { printf 'setup: error: %b\n' "$*" >&2; exit 1; }

if [ -n "${WSBCN_PYTHON:-}" ]; then
    [ -x "$WSBCN_PYTHON" ] || fail "WSBCN_PYTHON=$WSBCN_PYTHON is not an executable file"
    PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$WSBCN_PYTHON" - >&2 <<'PY' || fail "that environment lacks something (see above); unset WSBCN_PYTHON to have one made"
import sys
try:
    from wsbcn_mm.openmmlab import compat
    compat.require('mmengine', 'mmcv', 'mmdet', 'mmseg')
except ImportError as error:
    sys.exit(f'{sys.executable}: {error}')
PY
    echo "$WSBCN_PYTHON"
    exit 0
fi

venv=${WSBCN_VENV:-$PWD/.venv}
device=${WSBCN_DEVICE:-$(nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)}
case $device in cpu | cuda) ;; *) fail "WSBCN_DEVICE must be cpu or cuda, got '$device'" ;; esac
ops=${WSBCN_MMCV_OPS:-mmcv}
case $ops in mmcv | torchvision) ;; *) fail "WSBCN_MMCV_OPS must be mmcv or torchvision, got '$ops'" ;; esac
stamp="$device $ops $PWD $(cat requirements/*.txt setup.py tools/{setup_env,mmcv_wheel}.sh wsbcn_mm/backends/{nodes,cpu,triton/host}/*.{cpp,h} | cksum)"
if [ "$(cat "$venv/wsbcn-ready" 2>/dev/null)" = "$stamp" ]; then
    echo "$venv/bin/python"
    exit 0
fi

# Everything that would fail late is asked for first.
base=${PYTHON:-python3}
"$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null ||
    fail "Python 3.11 to 3.13 is needed, '$base' is $("$base" -V 2>&1)\n  name another: PYTHON=/path/to/python3.11 bash $0"
# The source of mmcv 2.1.0 reads its version in a way that Python 3.13 has ended.
[ "$ops" = torchvision ] || [ -n "${WSBCN_WHEELS:-}" ] || "$base" -c 'import sys; sys.exit(sys.version_info[:2] > (3, 12))' ||
    fail "the ops of mmcv cannot be compiled with Python 3.13\n  name an older one: PYTHON=/path/to/python3.12 bash $0\n  take NMS and RoIAlign of torchvision: WSBCN_MMCV_OPS=torchvision bash $0\n  or a wheel of mmcv that you have: WSBCN_WHEELS=DIR bash $0"
"$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "'$base' cannot make virtual environments\n  on Debian or Ubuntu: apt-get install python3-venv"
command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler (${CXX:-c++}): the ops of mmcv are compiled here\n  on Debian or Ubuntu: apt-get install build-essential; elsewhere: gcc-c++, or set CXX"
"$base" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    fail "the headers of '$base' (Python.h) are missing\n  on Debian or Ubuntu: apt-get install python3-dev"
# What is compiled for one GPU does not run on another.
if [ "$device$ops" = cudammcv ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ' ' || true)
    [ -n "$TORCH_CUDA_ARCH_LIST" ] ||
        fail "nvidia-smi names no GPU to compile mmcv's CUDA ops for\n  say for which: TORCH_CUDA_ARCH_LIST=9.0 bash $0\n  take NMS and RoIAlign of torchvision: WSBCN_MMCV_OPS=torchvision bash $0\n  or use the CPU: WSBCN_DEVICE=cpu bash $0"
    export TORCH_CUDA_ARCH_LIST
fi

say "making $venv ($device builds)"
[ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
rm -f "$venv/wsbcn-ready"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
constraints=requirements/constraints.txt
if [ "$device" = cuda ]; then  # its build of torch asks for a triton of its own
    constraints=$venv/wsbcn-constraints.txt
    grep -v '^triton' requirements/constraints.txt >"$constraints"
fi

say 'installing torch'
torch_index=()
# PyPI's torch for Linux is the CUDA build, gigabytes larger; where the index of CPU builds cannot be
# reached, pip says so and takes that one.
[ "$device" = cuda ] || [ "$(uname -s)" != Linux ] ||
    torch_index=(--extra-index-url https://download.pytorch.org/whl/cpu --retries 0)
pip install -q --no-deps "${torch_index[@]}" -r requirements/torch.txt >&2
if [ "$ops" = torchvision ]; then
    # From the same place: torchvision's operators load the libraries of its torch.
    pip install -q --no-deps "${torch_index[@]}" -r requirements/torchvision.txt >&2
fi
pip install -q -r requirements/torch.txt -r requirements/build.txt \
    -c "$constraints" >&2

if [ "$ops" = torchvision ]; then
    "$venv/bin/python" -c 'import torchvision' >&2 ||
        fail "torchvision does not fit the torch that was found; both must come from one index"
    say 'installing mmcv without its ops'
    pip install -q --no-build-isolation -c "$constraints" \
        "$(grep -o '^mmcv==[^ ]*' requirements/openmmlab.txt | sed s/mmcv/mmcv-lite/)" >&2
else
    source tools/mmcv_wheel.sh
fi

say 'installing mmengine, mmdet, mmsegmentation, mmpretrain, mmaction2 and wsbcn_mm (compiles its CPU kernels: half a minute)'
# What is there already in another form: the CUDA build of torch has brought the triton that it was
# made for, mmcv without its ops is another package.
present='^$'
[ "$device" = cpu ] || present="$present|^triton"
[ "$ops" = mmcv ] || present="$present|^mmcv"
grep -hvE "$present" requirements/openmmlab.txt requirements/dev.txt >"$venv/wsbcn-requirements.txt"
pip install -q -r "$venv/wsbcn-requirements.txt" -c "$constraints" >&2
# A few megabytes; why without what they ask for: see the files.
pip install -q --no-deps -r requirements/classification.txt -r requirements/video.txt >&2
# WSBCN_BUILD: here a failed build of the kernels is an error, not a slower package.
WSBCN_BUILD=1 pip install -q --no-deps --no-build-isolation --use-pep517 -e . >&2
echo "$stamp" >"$venv/wsbcn-ready"
say "ready: $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__, "on", "GPU: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")')"
echo "$venv/bin/python"
