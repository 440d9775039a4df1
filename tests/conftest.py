"""The fixture that runs a test on every backend for CPU tensors."""

import pytest

from wsbcn_mm import backends


@pytest.fixture(params=['eager', 'cpu'])
def backend(request):
    """Forces one backend; tests/test_triton.py does the same for Triton's interpreter."""
    reason = backends.BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    with backends.use_backend(request.param):
        yield request.param
