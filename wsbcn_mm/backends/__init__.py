"""Implementations of the operators in `ops`: equal to `wsbcn_mm.reference`, different in speed.

========= ============================== =========================================================
name      runs on                        made of
========= ============================== =========================================================
`cpu`     CPU                            C++, compiled when the package is installed
`triton`  CUDA                           Triton kernels, compiled at their first use
`eager`   every device that torch knows  plain torch calls
========= ============================== =========================================================

The fastest that can take a tensor is chosen by itself; where a faster one is missing, a warning
says so once. ``WSBCN_BACKEND=eager`` in the environment or ``with use_backend('eager')`` choose one
for everything; then a tensor it cannot take is an error. ``python -m wsbcn_mm.backends`` prints
what there is.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from wsbcn_mm.backends import cpu, eager, ops, triton  # noqa: F401  ops: defines the operators

BACKENDS: dict[str, ModuleType] = {'cpu': cpu, 'triton': triton, 'eager': eager}
"""By name, in the order of preference. Each module has ``unavailable()``, ``supports(x)`` (both a
reason or None) and ``kernels()``: the operators of `ops` as attributes."""

DEVICES = {'cpu': 'cpu', 'cuda': 'triton'}
"""The backend that a device should have; others have `eager`."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f'{source} must be one of {", ".join(BACKENDS)}\n  got {name!r}')
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f'{source}: the backend {name!r} cannot be used\n  {reason}')
    return name


_forced: str | None = None
if os.environ.get('WSBCN_BACKEND'):
    _forced = _checked(os.environ['WSBCN_BACKEND'], 'WSBCN_BACKEND')

_warned: set[str] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs everything inside with one backend, in all threads of the process.

    Args:
        name: ``'cpu'``, ``'triton'`` or ``'eager'``.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot be used on this machine, with the reason; later, for a tensor that
            it does not support.

    Example:
        >>> with use_backend('eager'):
        ...     y = norm(x)
    """
    global _forced
    before, _forced = _forced, _checked(name, 'use_backend')
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that was asked for by name, if any."""
    return _forced


def select(x: Tensor) -> str:
    """The name of the backend that takes ``x``.

    Raises:
        RuntimeError: a backend was asked for by name and does not support ``x``.
    """
    if _forced is not None:
        reason = BACKENDS[_forced].supports(x)
        if reason is not None:
            raise RuntimeError(
                f'the backend {_forced!r} was asked for and cannot be used\n  {reason}'
            )
        return _forced
    name = DEVICES.get(x.device.type, 'eager')
    if _UNAVAILABLE[name] is not None:
        if not torch.compiler.is_compiling() and name not in _warned:
            _warned.add(name)
            warnings.warn(
                f'wsbcn_mm computes with plain torch calls, which is slower: {_UNAVAILABLE[name]}',
                stacklevel=2,
            )
        return 'eager'
    return name if BACKENDS[name].supports(x) is None else 'eager'


# Known from here on: torch.compile traces select().
_UNAVAILABLE = {name: module.unavailable() for name, module in BACKENDS.items()}


def report() -> str:
    """One line per backend: whether it can be used here, and why not."""
    lines = [f'torch {torch.__version__}, {torch.get_num_threads()} CPU threads']
    for name, module in BACKENDS.items():
        lines.append(f'{name:<7} {module.unavailable() or "available"}')
    if _forced is not None:
        lines.append(f'chosen for everything: {_forced}')
    return '\n'.join(lines)
