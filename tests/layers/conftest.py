"""Every test of layers gets memory full of NaN; fixtures of the tests of standardization."""

import pytest

import wsbcn_mm
from wsbcn_mm import backends
from wsbcn_mm.layers import scopes, standardization


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
        yield
    else:
        with backends.use_backend('eager'):
            yield


@pytest.fixture
def calls(monkeypatch):
    """What is standardized, in order: the number of weights of each operator call."""
    seen = []
    one, many = wsbcn_mm.backends.autograd.weight_standardize, scopes.Together

    def counted_one(*arguments):
        seen.append(1)
        return one(*arguments)

    def counted_many(weights, *arguments):
        seen.append(len(weights))
        return many(weights, *arguments)

    monkeypatch.setattr(wsbcn_mm.backends.autograd, 'weight_standardize', counted_one)
    monkeypatch.setattr(scopes, 'Together', counted_many)
    return seen
