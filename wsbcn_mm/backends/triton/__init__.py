"""The operators in Triton, for CUDA: compiled at their first use, cached by Triton on disk.

Importing this package imports neither Triton nor anything of CUDA; the first call does. With
``TRITON_INTERPRET=1`` in the environment, Triton's interpreter runs the same kernels on CPU
tensors: for tests, not for speed.
"""

import importlib
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from wsbcn_mm.backends.ops import NAMESPACE

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPERATORS = (
    'row_moments',
    'normalize_with_estimates',
    'evaluate',
    'normalize',
    'normalize_backward',
    'standardize',
    'standardize_backward',
)
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'

_library: torch.library.Library | None = None


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None.

    Whether there is a GPU is not asked: the package must not touch CUDA while it is imported, and
    whoever has a tensor on a GPU has a GPU.
    """
    if find_spec('triton') is None:
        return 'triton is not installed'
    if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
        return 'torch is installed without CUDA'
    return None


def supports(x: Tensor) -> str | None:
    """Why this backend cannot take ``x``, or None."""
    if not x.is_cuda and not (INTERPRETED and x.device.type == 'cpu'):
        return f'the Triton kernels cannot take a tensor on {x.device}'
    if x.dtype not in DTYPES:
        return f'the Triton kernels cannot take {x.dtype}'
    if x.numel() == 0:
        return 'the Triton kernels cannot take an empty tensor'
    return None


def kernels():
    """The operators of `wsbcn_mm.backends.ops`."""
    return _launch() if INTERPRETED else torch.ops.wsbcn_mm


def register() -> None:
    """Makes the functions of `launch` the CUDA kernels of the operators, once."""
    global _library
    if _library is None:
        _library = torch.library.Library(NAMESPACE, 'IMPL')
        for name in OPERATORS:
            _library.impl(name, _launcher(name), 'CUDA')


def _launch():
    return importlib.import_module(f'{__name__}.launch')  # imports Triton


def _launcher(name: str):
    def launcher(x: Tensor, *args):
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return getattr(_launch(), name)(x, *args)

    return launcher


# Now, for at the first use torch.compile may be tracing.
if unavailable() is None:
    register()
