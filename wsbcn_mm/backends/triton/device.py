"""Memory for results, and the one place where a kernel is launched."""

import functools
import itertools
import math
import struct
from typing import Any

import torch
from torch import Tensor

from wsbcn_mm.backends.ops import accumulation_dtype

Shape = tuple[int, ...]


def start(kernel: Any, grid: Shape, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel."""
    kernel[grid](*arguments, **constants)


def small_results(x: Tensor, *shapes: Shape) -> list[Tensor]:
    """Uninitialised tensors in the accumulation dtype, cut from one allocation."""
    size, places = _places(shapes)
    memory = torch.empty(size, dtype=accumulation_dtype(x.dtype), device=x.device)
    return [memory.as_strided(*place) for place in places]


def scratch(x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """The same for what no one but kernels sees: flat, and a little longer than asked for."""
    padded = [_padded(size) for size in sizes]
    memory = torch.empty(sum(padded), dtype=accumulation_dtype(x.dtype), device=x.device)
    return memory.split_with_sizes(padded)


def _padded(size: int) -> int:
    """So that what follows starts at a multiple of 16 bytes.

    Triton compiles a kernel for the alignment of its pointers.
    """
    return -(-size // 4) * 4


@functools.lru_cache(maxsize=4096)
def _places(shapes: tuple[Shape, ...]) -> tuple[int, list[tuple[Shape, Shape, int]]]:
    """Elements in all, and shape, strides and offset of each tensor."""
    starts = [0, *itertools.accumulate(_padded(math.prod(shape)) for shape in shapes)]
    strides = [tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))) for shape in shapes]
    return starts[-1], list(zip(shapes, strides, starts))


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors: copies of those that are not."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def stride(buffer: Tensor | None) -> int:
    """Elements from one value of a (C,) tensor to the next."""
    return 0 if buffer is None else buffer.stride(0)


def repeat(affine: Tensor | None, channels: int) -> int:
    """Channels per value of a (C,) or (G,) tensor."""
    return 1 if affine is None else channels // affine.numel()


def bits(value: float) -> int:
    """A float as `jit.tiles.number` reads it."""
    result: int = struct.unpack('<q', struct.pack('<d', value))[0]
    return result
