"""What a layer costs the CPU that launches it: on a tiny map, where nothing else counts.

On a GPU a step is as slow as the slower of both, kernels and host; on the CPU kernels of a tiny map
take next to no time either. Nothing waits for the device while the clock runs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmark import peers, timing
from benchmark.settings import Settings, show_progress
from benchmark.timing import Case
from wsbcn_mm import WSConv2d, standardize_once_per_forward
from wsbcn_mm.backends import cpu

CHANNELS, SIZE = 32, 2
LAYERS = 20
"""Convolutions in a row: a scope is opened once for all of them."""
NORMS = ('GN', 'BN', 'BCN', 'BCN batch')
OURS = {'BCN': 1.2, 'BCN batch': 1.6}
"""Forward + backward in multiples of GroupNorm's: what the project wants at most."""
CONVOLUTIONS = {'WS conv': 0.8, 'WS conv in a scope': 0.1}
"""Likewise, of what is added to a plain convolution."""


def host(settings: Settings) -> dict:
    """Microseconds of CPU per layer, forward and backward, of one thread.

    On the CPU also, as ``launcher``, what the launcher of the GPU's kernels takes: on a GPU it is
    what is measured.
    """
    show_progress('host time')
    found = measured(settings)
    if settings.device.type == 'cpu':
        show_progress("host time of the GPU's launcher")
        found['launcher'] = _of_launcher(settings)
    return found


def _of_launcher(settings: Settings) -> dict | None:
    if cpu.unavailable() is not None or find_spec('triton') is None:
        return None
    code = f'from benchmark import launcher_time; launcher_time.main({settings.repeats})'
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=dict(os.environ, PYTHONPATH=paths),
    )
    return json.loads(done.stdout)


def measured(settings: Settings) -> dict:
    """See `host`."""
    device = settings.device
    x = torch.randn(1, CHANNELS, SIZE, SIZE, device=device, requires_grad=True)
    cotangent = torch.randn_like(x)
    norms = peers.norms(CHANNELS, device, torch.float32)
    cases = {name: _case([norms[name]], x, cotangent, device) for name in NORMS}
    for name, make, in_a_scope in (
        ('conv', nn.Conv2d, False),
        ('WS conv', WSConv2d, False),
        ('WS conv in a scope', WSConv2d, True),
    ):
        layers = [make(CHANNELS, CHANNELS, 1, bias=False).to(device) for _ in range(LAYERS)]
        cases[name] = _case(layers, x, cotangent, device, in_a_scope)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # The clock of the CPU, whatever the device.
        times = timing.round_robin(cases, torch.device('cpu'), settings.repeats)
    finally:
        torch.set_num_threads(threads)
    found = {
        name: {
            phase: summary['ms'] * 1e3 / (1 if name in NORMS else LAYERS)
            for phase, summary in phases.items()
        }
        for name, phases in times.items()
    }
    return dict(microseconds=found, ratios=_ratios(found))


def _ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Forward + backward in multiples of GroupNorm's; of convolutions, what WS adds."""
    both = {name: phases['both'] for name, phases in found.items()}
    ratios = {name: both[name] / both['GN'] for name in NORMS}
    for name in CONVOLUTIONS:
        ratios[name] = (both[name] - both['conv']) / both['GN']
    return ratios


def _case(
    layers: Sequence[nn.Module],
    x: Tensor,
    cotangent: Tensor,
    device: torch.device,
    in_a_scope: bool = False,
) -> Case:
    network = nn.Sequential(*layers)
    if in_a_scope:
        standardize_once_per_forward(network)
    tensors = [x, *network.parameters()]
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == 'cuda' else lambda: None

    def prepare() -> None:
        for tensor in tensors:
            tensor.grad = None
        wait()

    return Case(lambda: network(x), lambda y: y.backward(cotangent), prepare)
