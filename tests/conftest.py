"""What all tests share: the seed, the repository, and every backend for CPU tensors."""

from pathlib import Path

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
