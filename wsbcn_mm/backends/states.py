"""What a standardized weight depends on: as long as it is the same, a result holds."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from wsbcn_mm import compat
from wsbcn_mm.backends import cpu, triton


def state_of(weight: Tensor, one_pass: bool) -> object:
    """Whatever a standardized weight depends on, of its weight and of this thread.

    Equal as long as a result holds; None where it cannot be known. Not in it: writes through
    ``.data``, optimizers that write so, what the layer says.

    Args:
        weight: A plain tensor.
        one_pass: Whether a backward pass ends it.
    """
    if not triton.HAS_NODES and is_captured(weight):
        return None
    if cpu.entries is not None:
        state = cpu.entries.state(weight, one_pass)
        return None if state is None else (state, _backward_calls if one_pass else None)
    if is_watched():
        return None
    device = weight.device
    return (
        (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.requires_grad),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        torch.cuda.current_stream(device).cuda_stream if weight.is_cuda else None,
        compat.backward_pass(),
        compat.autocast_dtype(device.type),
        _changes,
        backward_calls() if one_pass else None,
    )


def result_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a weight is standardized: its own, or that of autocast."""
    autocast = compat.autocast_dtype(weight.device.type)
    return weight.dtype if autocast is None or weight.dtype == torch.float64 else autocast


_changes = 0


def note_change() -> None:
    """Ends whatever results hold for: an optimizer made a step, or another backend was asked for.

    What torch counts need not be told.
    """
    global _changes
    _changes += 1
    if cpu.entries is not None:
        cpu.entries.note_change()


def is_captured(weight: Tensor) -> bool:
    """Whether what is computed now is computed when a graph runs, again and again."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def is_watched() -> bool:
    """Whether operators are traced, watched or transformed, and results are not what they seem."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._len_torch_dispatch_stack() > 0
        or compat.is_transformed()
    )


_backward_calls = 0  # of the nodes written in Python
# The counter of the nodes written in C++, read where it is: a call of an operator takes longer.
_by_nodes: ctypes.c_int64 | None = None
if cpu.unavailable() is None:
    _by_nodes = ctypes.c_int64.from_address(torch.ops.wsbcn_mm.backward_calls_address.default())


def backward_calls() -> int:
    """How often a weight's gradient was computed in this process so far, by any node."""
    return _backward_calls if _by_nodes is None else _backward_calls + _by_nodes.value


def count_backward_call() -> None:
    """Called by the nodes written in Python."""
    global _backward_calls
    _backward_calls += 1
