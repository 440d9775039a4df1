"""The memory formats that the kernels read: contiguous, or channels_last with 4 or 5 axes."""

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By number of axes."""


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout the kernels read x in: its own where it is dense, else the nearest."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = CHANNELS_LAST.get(x.dim())
    if last is not None and x.stride(1) == 1:
        return last
    return torch.contiguous_format


def is_dense(x: Tensor) -> bool:
    """Whether x lies in one of the layouts that a kernel reads."""
    last = CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


def dense(x: Tensor) -> Tensor:
    """X itself where a kernel can read it, else a copy."""
    if x.is_contiguous():
        return x
    return x.contiguous(memory_format=memory_format(x))
