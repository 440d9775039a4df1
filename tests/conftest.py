"""What all tests share: seed, repository, every backend for CPU tensors, the built package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from wsbcn_mm import backends


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(params=['eager', 'cpu'])
def backend(request):
    """Forces one backend; tests/backends/test_triton.py does the same for Triton's interpreter."""
    reason = backends.BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    with backends.use_backend(request.param):
        yield request.param


class Distributions(NamedTuple):
    """What `python -m build` writes."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope='session')
def distributions(tmp_path_factory) -> Distributions:
    """Source package and wheel without kernels, of a copy of the tree: nothing is left in it."""
    root = Path(__file__).parents[1]
    source, built = (tmp_path_factory.mktemp(name) / name for name in ('source', 'built'))
    skip = {'.git', '.venv', 'build', 'dist', 'data', 'work_dirs', 'docs', 'tests'}

    def ignore(folder: str, names: list[str]) -> list[str]:
        top = skip if Path(folder) == root else set()
        return [n for n in names if n in top or n == '__pycache__' or n.endswith('.so')]

    shutil.copytree(root, source, symlinks=True, ignore=ignore)
    done = subprocess.run(
        [sys.executable, '-m', 'build', '--no-isolation', '--outdir', built],
        cwd=source,
        capture_output=True,
        text=True,
        env=dict(os.environ, WSBCN_BUILD='0'),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = built.glob('*.tar.gz'), built.glob('*.whl')
    return Distributions(sdist, wheel)


@pytest.fixture(scope='session')
def installed(distributions: Distributions) -> Path:
    """The folder that the wheel was installed into, for PYTHONPATH."""
    site = distributions.wheel.parent / 'site'
    command = ['pip', 'install', '-q', '--no-deps', '--no-index', '--target']
    done = subprocess.run(
        [sys.executable, '-m', *command, site, distributions.wheel],
        cwd=site.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return site
