"""Layers, autograd and scopes over the launcher in C++: a network trains as the specification says.

In a process of its own: there the launcher's operators are those of CPU tensors too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.triton.cases import DEVICE
from wsbcn_mm import backends

reason = backends.BACKENDS['cpu'].unavailable()
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=str(reason)),
    pytest.mark.skipif(DEVICE != 'cpu', reason='stands in for a GPU'),
]

TRAIN = """
import copy, threading
import pytest, torch
from tests.backends.triton import driver as drivers
from tests.backends.triton.network import Network, train
import wsbcn_mm
from wsbcn_mm import backends
from wsbcn_mm.backends.triton import weights

driver = drivers.Driver()
drivers.use(driver, pytest.MonkeyPatch())
torch.manual_seed(0)

steps = [torch.randn(2, 3, size, 7, dtype=torch.float64) for size in (6, 8)]
models = {mode: Network(mode).double() for mode in ('estimate', 'batch')}
expected = {}
for mode, model in models.items():
    with backends.use_backend('eager'):
        of_eager = copy.deepcopy(model)
        expected[mode] = train(of_eager, steps), of_eager.state_dict()

torch.ops.wsbcn_mm.register_launcher(True)
for mode, model in models.items():
    wsbcn_mm.standardize_once_per_forward(model)
    found = train(model, steps)
    if driver.error is not None:
        raise driver.error
    torch.testing.assert_close(found, expected[mode][0])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[mode][1][name])
launched = [launch.kernel for launch in driver.launches]
# One launch for both weights, forward and backward, in each of the two steps of both networks; with
# a Triton that cannot, one for each.
many, each = ('_many', 1) if weights.AT_ONCE > 1 else ('', 2)
assert launched.count(f'standardize{many}') == 2 * (2 + 1) * each, launched
assert launched.count(f'standardize{many}_backward') == 2 * 2 * each
assert launched.count('forward_held') == 2 * 3 * (2 + 1)
assert launched.count('backward_held') == 2 * 3 * 2

# Python is asked for a variant once, in whichever thread.
loaded = len(driver._loaded)
x = steps[0]
for model in models.values():
    model.train()
    def again(model=model):
        model(x).square().mean().backward()
    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
assert len(driver._loaded) == loaded
print('equal', len(driver.launches))
"""


def test_a_network_trains_over_the_launcher(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[3]))
    done = subprocess.run(
        [sys.executable, '-c', TRAIN], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.startswith('equal'), done.stderr[-3000:]
