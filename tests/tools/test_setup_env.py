"""What tools/setup_env.sh says before it starts anything that takes long."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def setup_env(tmp_path, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(('WSBCN_', 'TORCH_CUDA'))}
    env |= dict(WSBCN_VENV=str(tmp_path / 'venv'), WSBCN_DEVICE='cpu', PYTHON=sys.executable)
    done = subprocess.run(
        ['bash', ROOT / 'tools/setup_env.sh'],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, (tmp_path / 'venv').exists()


@pytest.mark.parametrize(
    'environment, words',
    [
        (dict(CXX='no-such-compiler'), ['no C++ compiler', 'build-essential']),
        (dict(PYTHON='no-such-python'), ['Python 3.11 to 3.13 is needed']),
        (dict(WSBCN_DEVICE='tpu'), ['WSBCN_DEVICE must be cpu or cuda', "'tpu'"]),
        (dict(WSBCN_PYTHON='/no/such/python'), ['WSBCN_PYTHON=/no/such/python']),
        (dict(WSBCN_DEVICE='cuda'), ['nvidia-smi names no GPU', 'WSBCN_DEVICE=cpu']),
    ],
)
def test_stops_at_once_and_says_why(tmp_path, environment, words):
    if 'WSBCN_DEVICE' in environment and shutil.which('nvidia-smi'):
        pytest.skip('there may be a GPU here')
    done, made = setup_env(tmp_path, **environment)
    assert done.returncode == 1
    assert done.stdout == ''  # callers take stdout for the path of a python
    for word in words:
        assert word in done.stderr
    assert not made


def test_python_3_13_cannot_compile_mmcv_and_that_is_said_first(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text('import sys\nsys.version_info = (3, 13, 0)\n')
    done, made = setup_env(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and 'WSBCN_MMCV_OPS=torchvision' in done.stderr and not made


def test_a_given_python_is_used_as_it_is(tmp_path):
    pytest.importorskip('mmdet', reason='the given environment must be complete')
    done, made = setup_env(tmp_path, WSBCN_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sys.executable
    assert not made
