"""The host time of the launcher of the GPU's kernels, without a GPU: prints JSON.

`host_time` runs `main` in a process of its own, in which the launcher serves CPU tensors.
Everything runs as on a GPU but the driver: nothing is launched, and no kernel is compiled.
"""

import json

import torch

from benchmark.settings import Settings
from wsbcn_mm.backends.triton import variants


def main(repeats: int) -> None:
    """Measures what `host_time.measured` measures."""
    from benchmark.host_time import measured

    # The kernels do not run: convolutions get what was in memory, and subnormal numbers take long.
    torch.set_flush_denormal(True)
    vars(variants).update(load=lambda *_: [1, 32, 0, 0], addresses=lambda: (0, 0, 0))
    torch.ops.wsbcn_mm.register_launcher.default(True)
    before = torch.ops.wsbcn_mm.launches.default()
    found = measured(Settings(torch.device('cpu'), [torch.float32], ['nchw'], repeats, False))
    assert torch.ops.wsbcn_mm.launches.default() > before
    print(json.dumps(found))
