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
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from wsbcn_mm.backends import cpu, eager, states, triton
from wsbcn_mm.backends.ops import Kernels

WHOLE = (Tensor, torch.nn.Parameter)  # what is of one of these types is no DTensor


class Backend(Protocol):
    """The functions of a backend's module."""

    def unavailable(self) -> str | None:
        """Why it cannot be used here, or None."""

    def supports(self, x: Tensor) -> str | None:
        """Why it cannot take ``x``, or None."""

    def kernels(self) -> Kernels:
        """Its operators."""


BACKENDS: dict[str, Backend] = {'cpu': cpu, 'triton': triton, 'eager': eager}
"""By name, in the order of preference."""

DEVICES = {'cpu': 'cpu', 'cuda': 'triton'}
"""The backend that a device should have; others have `eager`."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f'{source} must be one of {", ".join(BACKENDS)}\n  got {name!r}')
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f'{source}: the backend {name!r} cannot be used\n  {reason}')
    return name


_environment: str | None = None
if os.environ.get('WSBCN_BACKEND'):
    _environment = _checked(os.environ['WSBCN_BACKEND'], 'WSBCN_BACKEND')
_forced = _environment  # what holds now

_open_blocks: list[list[str]] = []  # of use_backend; one after the other has begun
_changing_blocks = threading.Lock()

_warned: set[str] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs everything inside with one backend, in all threads of the process.

    For all threads, because a network may run in several (DataParallel, autograd on a GPU). Of
    blocks that are open at the same time, nested or in several threads or tasks, the one entered
    last decides; when it ends, the one entered last of those still open. In whatever order they
    end, nothing is left of them.

    Args:
        name: ``'cpu'``, ``'triton'`` or ``'eager'``.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot be used on this machine, with the reason; later, for a tensor that
            it does not support.

    Examples:
        >>> with use_backend('eager'):
        ...     y = norm(x)
    """
    block = [_checked(name, 'use_backend')]  # a list: equal names are different blocks
    _change_blocks(entered=block)
    try:
        yield
    finally:
        _change_blocks(left=block)


def _change_blocks(entered: list[str] | None = None, left: list[str] | None = None) -> None:
    global _forced
    with _changing_blocks:
        _open_blocks[:] = [block for block in _open_blocks if block is not left]
        if entered is not None:
            _open_blocks.append(entered)
        _forced = _open_blocks[-1][0] if _open_blocks else _environment
        states.note_change()


def kernels(name: str) -> Kernels:
    """The operators of a backend."""
    return BACKENDS[name].kernels()


def forced() -> str | None:
    """The backend that was asked for by name, if any."""
    return _forced


def select(x: Tensor) -> str:
    """The name of the backend that takes ``x``.

    Raises:
        RuntimeError: a backend was asked for by name and does not support ``x``, which has values.
        TypeError: ``x`` is a part of a tensor that is spread over processes.
    """
    if type(x) not in WHOLE and not torch.compiler.is_compiling():
        _check_whole(x)
    if _forced is not None:
        reason = BACKENDS[_forced].supports(x)
        if reason is not None and x.numel() == 0:
            return 'eager'  # of an empty tensor there is nothing to compute
        if reason is not None:
            raise RuntimeError(
                f'the backend {_forced!r} was asked for and cannot be used\n  {reason}'
            )
        return _forced
    name = DEVICES.get(x.device.type, 'eager')
    if UNAVAILABLE[name] is not None:
        if not torch.compiler.is_compiling() and name not in _warned:
            _warned.add(name)
            warnings.warn(
                f'wsbcn_mm computes with plain torch calls, which is slower: {UNAVAILABLE[name]}',
                stacklevel=2,
            )
        return 'eager'
    return name if BACKENDS[name].supports(x) is None else 'eager'


def _check_whole(x: Tensor) -> None:
    # Somebody else has imported it, or there is none.
    spread = getattr(sys.modules.get('torch.distributed.tensor'), 'DTensor', ())
    if isinstance(x, spread):
        raise TypeError(
            'the layers of wsbcn_mm take whole tensors\n  got a DTensor: distribute_module and '
            'parallelize_module spread a layer over processes, which is not supported here\n  '
            'fully_shard (FSDP2) gives a layer its whole weight, and is'
        )


# Known from here on: torch.compile traces select().
UNAVAILABLE = {name: module.unavailable() for name, module in BACKENDS.items()}


def release_memory() -> None:
    """Frees what the CPU kernels keep of weights that were standardized, for those to come.

    They keep about as much as the weights and their gradients take, and free what was not asked for
    during some passes. For who goes on without WS layers, as `torch.cuda.empty_cache`.
    """
    if UNAVAILABLE['cpu'] is None:
        torch.ops.wsbcn_mm.release_memory.default()


def register_bytes() -> int:
    """The width of the registers that the CPU kernels compute in: 16, 32 or 64 on an x86-64."""
    width: int = torch.ops.wsbcn_mm.register_bytes.default()
    return width


def report() -> str:
    """One line per backend: whether it can be used here, and why not."""
    lines = [f'torch {torch.__version__}, {torch.get_num_threads()} CPU threads']
    for name, module in BACKENDS.items():
        lines.append(f'{name:<7} {module.unavailable() or "available"}')
    if UNAVAILABLE['cpu'] is None:
        lines.append(f'on the CPU in registers of {register_bytes()} bytes')
    if UNAVAILABLE['triton'] is None:
        lines.append(f'launched by {"C++" if triton.HAS_NODES else "Python"}')
    if _forced is not None:
        lines.append(f'chosen for everything: {_forced}')
    return '\n'.join(lines)
