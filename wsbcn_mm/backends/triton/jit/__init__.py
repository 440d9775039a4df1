"""The Triton kernels.

The contract and the formulas stand in `wsbcn_mm.backends.ops`, the launches in `launch`.

- `tiles`: where a program works, and what is merged across lanes and chunks;
- `statistics`: stage 1 and its statistics, the running ones included;
- `forward`, `backward`: two passes over x each, a reducing one and a writing one, and the algebra
  between them;
- `held`: all three in one, for maps so small that a program can hold a sample's group;
- `weights`: Weight Standardization.

What a chunk finds is written once, to its own place, and merged in a fixed order: there are no
atomics, and a result depends on the shape alone. Means and variances are accumulated around a value
of the data, never as E[x^2] - E[x]^2. Offsets are 64 bits wide where they can outgrow 32. ACC, the
accumulation dtype, is that of the statistics.
"""

import torch
import triton

OLDEST = (3, 2)
"""Interpreted, the kernels give NaN with Triton 3.0 and 3.1. torch 2.6 asks for 3.2."""


def check_triton(version: str) -> None:
    """Refuses a Triton that is too old; asked when this package is imported.

    Raises:
        ImportError: it is.
    """
    if tuple(int(part) for part in version.split('.')[:2]) < OLDEST:
        raise ImportError(
            f'the CUDA kernels need Triton >= {OLDEST[0]}.{OLDEST[1]}\n  got {version}; '
            f'pip install the one that torch {torch.__version__} asks for'
        )


check_triton(triton.__version__)
