"""What all tests share: seed, device and dtype, backends, poisoned memory, the built package."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.tool import go_on_at_the_end_of_data, leave_configs_unformatted
from wsbcn_mm import backends
from wsbcn_mm.backends import autograd, cpu
from wsbcn_mm.backends.together import Results
from wsbcn_mm.layers import scopes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_default_scope() -> None:
    """Forgets the default scope of OpenMMLab's registries that an earlier test has left.

    A runner sets it for its whole process, so what a test builds depended on those before it.
    """
    registries = sys.modules.get('mmengine.registry')
    if registries is not None:
        registries.DefaultScope._instance_dict.clear()


@pytest.fixture
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Takes all that was imported so far out of the garbage collector's rounds: they are many."""
    leave_configs_unformatted()
    go_on_at_the_end_of_data()
    gc.collect()
    gc.freeze()


@pytest.fixture
def formatted_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets mmengine format the configs that it writes, as it does outside of the tests."""
    yapf_api = pytest.importorskip('yapf.yapflib.yapf_api', reason='mmengine formats with it')
    monkeypatch.setattr('mmengine.config.config.FormatCode', yapf_api.FormatCode)


DTYPES = {str(d).removeprefix('torch.'): d for d in (torch.float64, torch.float32)}
DTYPES |= {str(d).removeprefix('torch.'): d for d in (torch.float16, torch.bfloat16)}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup('wsbcn_mm')
    group.addoption('--device', default='cpu', help='where the specification is tested')
    group.addoption('--dtype', default='float64', choices=DTYPES, help='what it is tested in')


@pytest.fixture(scope='session')
def device(request) -> torch.device:
    """What --device says. Tensors are made there by default where `on_device` is used."""
    return torch.device(request.config.getoption('--device'))


@pytest.fixture(scope='session')
def dtype(request) -> torch.dtype:
    """What --dtype says: the dtype of the tested side; the specification stays in float64."""
    return DTYPES[request.config.getoption('--dtype')]


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """Makes `device` the one on which torch makes tensors."""
    if device.type == 'cpu':
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills all memory that torch hands out uninitialised with NaN, in C++ too (integers: maximum).

    A kernel that reads what it has not written, or leaves out a part of its result, is then seen.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(params=['eager', 'kernels'])
def backend(request, device: torch.device) -> Iterator[str]:
    """Forces one backend: plain torch, or the kernels that the device has."""
    kernels = 'cpu' if device.type == 'cpu' else 'triton'
    name = kernels if request.param == 'kernels' else 'eager'
    reason = backends.BACKENDS[name].unavailable()
    if reason is not None:
        pytest.skip(reason)
    with backends.use_backend(name):
        yield name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is standardized, in order: the number of weights of each operator call."""
    seen: list[int] = []
    one, many = autograd.weight_standardize, scopes.standardize_all

    def counted_one(*arguments: Any) -> torch.Tensor:
        seen.append(1)
        return one(*arguments)

    def counted_many(weights: list[torch.Tensor], *arguments: Any) -> Results:
        seen.append(len(weights))
        return many(weights, *arguments)

    monkeypatch.setattr(autograd, 'weight_standardize', counted_one)
    monkeypatch.setattr(scopes, 'standardize_all', counted_many)
    if cpu.entries is not None:
        usual, in_a_scope = cpu.entries.weight_standardize, cpu.entries.get_usual

        def counted_usual(*arguments: Any) -> torch.Tensor | None:
            result: torch.Tensor | None = usual(*arguments)
            if result is not None:
                seen.append(1)
            return result

        def counted_in_a_scope(held: dict[Any, Any], *arguments: Any) -> torch.Tensor | None:
            before = len(held)
            result: torch.Tensor | None = in_a_scope(held, *arguments)
            if len(held) > before:
                seen.append(len(held) - before)
            return result

        monkeypatch.setattr(cpu.entries, 'weight_standardize', counted_usual)
        monkeypatch.setattr(cpu.entries, 'get_usual', counted_in_a_scope)
    return seen


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
