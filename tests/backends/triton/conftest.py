"""How the tests of the Triton kernels run them.

On a GPU they are compiled; without one Triton's interpreter runs them, on CPU tensors, and
test_compile.py shows that they can be compiled too.
"""

import pytest
import torch

# Nothing here imports Triton before a test runs: `cases` decides how it is imported.

# As a GPU wants it, a program holds a group of these small maps. Then in three passes: in one tile,
# and in tiles of a few values, so that every loop has several turns and every row several chunks.
CUTS = {
    'held': {},
    'passes': dict(HELD=0, HELD_BACKWARD=0),
    'small tiles': dict(HELD=0, HELD_BACKWARD=0, TILE=16, REDUCING=12, APPLYING=16),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, poisoned_memory):
    """Memory is NaN until something writes it."""
    if not torch.cuda.is_available():
        monkeypatch.setenv('TRITON_INTERPRET', '1')


@pytest.fixture(params=['held', 'small tiles'])
def cut(request, monkeypatch):
    """Two ways to cut x; `indirect` asks for others."""
    from wsbcn_mm.backends.triton import cuts

    for name, value in CUTS[request.param].items():
        assert hasattr(cuts, name)
        monkeypatch.setattr(cuts, name, value)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched, in order."""
    from wsbcn_mm.backends.triton import device

    names = []

    def recording(kernel, *arguments, **constants):
        names.append(kernel.__name__)
        start(kernel, *arguments, **constants)

    start = device.start
    monkeypatch.setattr(device, 'start', recording)
    return names
