"""tools/mmcv_wheel.sh: which wheel of mmcv is taken, when it is compiled, and where it is left.

The python that it calls is a stand-in: a few lines of bash that keep in files what is installed. A
wheel is a file that says for which torch it was compiled.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = r"""#!/usr/bin/env bash
state=$(dirname "$(dirname "$0")")
torch=$(cat "$state/torch")
case "$*" in
    *'import mmcv._ext'*) [ "$(cat "$state/installed" 2>/dev/null)" = "$torch" ] ;;
    *torch.version.cuda*) echo 13.0 ;;
    *torch.__version__*) echo -n "$torch" ;;
    *purelib*) echo "$state/site" ;;
    *' uninstall '*) rm "$state/installed" ;;
    *' wheel '*)
        echo "$TORCH_CUDA_ARCH_LIST $CUDA_HOME $*" >>"$state/built"
        folder=$(sed 's/.* -w \([^ ]*\) .*/\1/' <<<"$*")
        mkdir -p "$folder"
        [[ $* = *--no-cache-dir* || ! -e "$state/cache" ]] || torch=$(cat "$state/cache")
        echo "$torch" >"$folder/mmcv-2.1.0-py3-none-any.whl" ;;
    *--find-links*)
        folder=$(sed 's/.*--find-links \([^ ]*\) .*/\1/' <<<"$*")
        ls "$folder"/mmcv-*.whl >/dev/null 2>&1 || exit 1
        cat "$folder"/mmcv-*.whl >"$state/installed" ;;
    *nvidia-cuda-nvcc*)
        echo "$*" >"$state/nvcc"
        mkdir -p "$state/site/nvidia/cu13/lib" "$state/site/nvidia/cu13/bin" ;;
    *' install '*) ;;
    *) echo "not foreseen: $*" >&2; exit 9 ;;
esac
"""

SCRIPT = """
set -euo pipefail
constraints=requirements/constraints.txt
say() { echo "setup: $*" >&2; }
fail() { echo "setup: error: $*" >&2; exit 1; }
pip() { "$venv/bin/python" -m pip "$@"; }
source tools/mmcv_wheel.sh
"""


@pytest.fixture
def venv(tmp_path):
    python = tmp_path / 'venv/bin/python'
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path / 'venv'


def get_mmcv(venv, torch, device='cpu', **environment):
    """Sources the script; returns what it said, and the calls that built."""
    (venv / 'torch').write_text(torch)
    for name in 'installed', 'built':
        (venv / name).unlink(missing_ok=True)
    done = subprocess.run(
        ['bash', '-c', SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(PATH='/usr/bin:/bin', venv=str(venv), device=device, MAX_JOBS='2')
        | dict(HOME=str(venv), WSBCN_WHEELS=str(venv / 'wheels'))
        | environment,
    )
    assert done.returncode == 0, done.stderr
    assert (venv / 'installed').read_text().strip() == torch
    built = venv / 'built'
    return done.stderr, built.read_text().splitlines() if built.exists() else []


def test_what_was_compiled_once_is_found_by_the_next_environment(venv):
    said, built = get_mmcv(venv, '2.13.0+cpu')
    assert len(built) == 1 and 'with 2 processes: once, about 7 minutes' in said
    said, built = get_mmcv(venv, '2.13.0+cpu')
    assert not built and 'comes from a wheel' in said
    said, built = get_mmcv(venv, '2.14.1+cpu')  # another torch, another wheel
    assert len(built) == 1
    assert {path.name for path in (venv / 'wheels').iterdir()} == {
        'torch-2.13.0+cpu',
        'torch-2.14.1+cpu',
    }


def test_wheels_of_the_user_are_taken_if_their_ops_load(venv):
    wheel = venv / 'wheels' / 'mmcv-2.1.0-py3-none-any.whl'
    wheel.parent.mkdir()
    wheel.write_text('2.13.0+cpu')
    said, built = get_mmcv(venv, '2.13.0+cpu')
    assert not built and 'comes from a wheel' in said
    said, built = get_mmcv(venv, '2.14.1+cpu')
    assert len(built) == 1 and 'do not load: it was compiled for another torch' in said


def test_pips_cache_may_hold_what_another_torch_needed(venv):
    (venv / 'cache').write_text('2.12.0+cpu')
    _, built = get_mmcv(venv, '2.13.0+cpu')
    assert len(built) == 2 and '--no-cache-dir' in built[1]
    # For GPUs it is not asked: its wheel for CPUs would be kept as one for them.
    _, built = get_mmcv(venv, '2.13.0+cu130', 'cuda', TORCH_CUDA_ARCH_LIST='9.0')
    assert len(built) == 1 and '--no-cache-dir' in built[0]


def test_nvcc_comes_from_pypi_where_the_machine_has_none(venv):
    if os.path.exists('/usr/bin/nvcc'):
        pytest.skip('nvcc is in /usr/bin here')
    gpus = dict(TORCH_CUDA_ARCH_LIST='8.6 9.0')
    said, (built,) = get_mmcv(venv, '2.13.0+cu130', 'cuda', **gpus)
    toolkit = venv / 'site/nvidia/cu13'
    assert "installing PyPI's, for CUDA 13.0" in said
    assert 'nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.*' in (venv / 'nvcc').read_text()
    assert built.startswith(f'8.6 9.0 {toolkit} ')
    assert os.readlink(toolkit / 'lib64') == 'lib'
    assert os.readlink(toolkit / 'lib/libcudart.so') == 'libcudart.so.13'
    # For other GPUs it is compiled again.
    assert not get_mmcv(venv, '2.13.0+cu130', 'cuda', **gpus)[1]
    assert get_mmcv(venv, '2.13.0+cu130', 'cuda', TORCH_CUDA_ARCH_LIST='7.5')[1]
