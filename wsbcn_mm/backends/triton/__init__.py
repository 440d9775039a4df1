"""The operators in Triton, for CUDA: compiled at their first use, cached by Triton on disk.

Two sets of functions launch the same kernels in the same way: those in C++ (`host`), which run no
Python once a kernel is compiled, and the plain ones (`launch`), which the first are tested against.
The plain ones serve where the compiled extension or the driver of an NVIDIA GPU is missing (ROCm),
and where ``WSBCN_LAUNCHER=python`` is in the environment.

Importing this package imports neither Triton nor anything of CUDA; the first call does. With
``TRITON_INTERPRET=1`` in the environment, Triton's interpreter runs the same kernels on CPU
tensors: for tests, not for speed.
"""

import functools
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from wsbcn_mm.backends import cpu, dispatched
from wsbcn_mm.backends.ops import DTYPES, NAMESPACE, OPERATORS, Kernels, flattened
from wsbcn_mm.backends.triton import variants

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


def kernels() -> Kernels:
    """The operators of `wsbcn_mm.backends.ops`."""
    return _launch() if INTERPRETED else cast(Kernels, dispatched)


def register() -> bool:
    """Makes the functions of `host` or of `launch` the CUDA kernels of the operators, once.

    Returns:
        Whether those of `host`.

    Raises:
        ValueError: WSBCN_LAUNCHER is neither ``cpp`` nor ``python``.
        RuntimeError: WSBCN_LAUNCHER is ``cpp``, and that cannot be had here.
    """
    wanted = os.environ.get('WSBCN_LAUNCHER')
    if wanted not in (None, '', 'cpp', 'python'):
        raise ValueError(f'WSBCN_LAUNCHER must be cpp or python\n  got {wanted!r}')
    if wanted != 'python' and not INTERPRETED and cpu.unavailable() is None and variants.install():
        return True
    if wanted == 'cpp':
        raise RuntimeError(
            'WSBCN_LAUNCHER=cpp needs the compiled extension, torch with CUDA, and its driver\n  '
            + (cpu.unavailable() or 'the extension is there')
        )
    global _library
    if _library is None:
        _library = torch.library.Library(NAMESPACE, 'IMPL')
        for name in OPERATORS:
            _library.impl(name, launcher(name), 'CUDA')
    return False


def _launch() -> Kernels:
    return cast(Kernels, importlib.import_module(f'{__name__}.launch'))  # imports Triton


def launcher(name: str) -> Callable[..., Any]:
    """The implementation of an operator, with the flat arguments of its schema."""

    def launch(first: Tensor | list[Tensor], *args: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            return _flat(name)(first, *args)

    return launch


@functools.cache
def _flat(name: str) -> Callable[..., Any]:
    return flattened(getattr(_launch(), name))


# Now, for at the first use torch.compile may be tracing.
HAS_NODES = unavailable() is None and register()
"""Whether the nodes of autograd's graph in C++ serve CUDA tensors too."""
