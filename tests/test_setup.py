"""setup.py compiles the CPU kernels where it can, and says so where it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    """What setup.py needs, without compiled kernels."""
    for name in ('setup.py', 'setup.cfg', 'README.md', 'requirements', 'wsbcn_mm'):
        path, target = ROOT / name, tmp_path / name
        if path.is_dir():
            skip = shutil.ignore_patterns('.mim', '__pycache__', '*.so')
            shutil.copytree(path, target, ignore=skip)
        else:
            shutil.copy(path, target)
    return tmp_path


def build(source, **environment):
    return subprocess.run(
        [sys.executable, 'setup.py', 'build_ext', '--inplace'],
        cwd=source,
        text=True,
        env=dict(os.environ, **environment),
        capture_output=True,
        timeout=300,
    )


def test_a_compiler_that_fails_leaves_a_package_without_kernels(source):
    done = build(source, CXX='false', CC='false')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'warning: the CPU kernels were not compiled' in done.stderr
    code = (
        'import torch, warnings, wsbcn_mm\n'
        'with warnings.catch_warnings(record=True) as said:\n'
        '    warnings.simplefilter("always")\n'
        '    for _ in range(2): wsbcn_mm.BatchChannelNorm2d(4, 2)(torch.randn(1, 4, 3, 3))\n'
        'print(*[str(w.message) for w in said if "wsbcn_mm" in str(w.message)], sep="|")'
    )
    used = subprocess.run(
        [sys.executable, '-c', code],
        cwd=source,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(source)),
        timeout=120,
    )
    assert used.returncode == 0, used.stderr[-2000:]
    assert 'the CPU kernels are not compiled' in used.stdout and '|' not in used.stdout


def test_a_compiler_that_fails_is_an_error_where_kernels_are_asked_for(source):
    done = build(source, CXX='false', CC='false', WSBCN_BUILD='1')
    assert done.returncode != 0


def test_the_build_may_be_skipped(source):
    done = build(source, WSBCN_BUILD='0', CXX='false')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'not compiled' not in done.stderr
