"""Every test of layers gets memory full of NaN; fixtures of the tests of standardization."""

import pytest

from wsbcn_mm import backends
from wsbcn_mm.layers import standardization


@pytest.fixture(autouse=True)
def kernel_test(poisoned_memory):
    pass


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    yield
    assert standardization.open_scopes() == 0


@pytest.fixture(params=['nodes', 'eager'])
def backend(request):
    """The backend that brings nodes of its own, where it can be used, and the one of Python."""
    if request.param == 'nodes':
        if backends.BACKENDS['cpu'].unavailable():
            pytest.skip('the CPU kernels are not compiled')
        yield 'nodes'
    else:
        with backends.use_backend('eager'):
            yield 'eager'
