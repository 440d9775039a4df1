"""How work is cut into programs: by the shape of a tensor alone, never by measuring."""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from wsbcn_mm.backends.layouts import CHANNELS_LAST

TILE = 2048
"""Values that a program treats at a time: 16 per thread of four warps."""

REDUCING = 1024
"""Programs that keep a large GPU busy in a pass that reduces: several per multiprocessor (an H100
has 132). Not many more, for every further chunk of a row is one more partial result to merge; of a
small map a quarter, for the same reason."""

APPLYING = 16384
"""The same for a pass that writes: shorter programs, so that none is left over at the end."""

HELD = 16384
"""Values of a sample's group that a program can hold in registers: 32 per thread of 16 warps."""

HELD_BACKWARD = 8192
"""The same where it holds x and grad."""

HELD_AT_ONCE = 32768
"""The same of a group in all samples: one program goes through them, twice."""

HELD_SAMPLES = 4
"""How many samples that may be: for more of them three passes take less time."""

Constants = dict[str, int]
"""The constants a kernel is compiled for."""


class Cut(NamedTuple):
    """How a pass cuts x: ``tiles`` tiles make a chunk, ``splits`` chunks a row."""

    grid: tuple[int, int]
    length: int
    tiles: int
    splits: int
    layout: Constants


def memory_format(x: Tensor, name: str = 'x') -> torch.memory_format:
    """The layout of a dense tensor.

    Raises:
        ValueError: it is neither contiguous nor channels_last.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    last = CHANNELS_LAST.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return last
    raise ValueError(
        f'{name}: expected a contiguous or channels_last tensor\n'
        f'  got shape {tuple(x.shape)} with strides {x.stride()}'
    )


def reducing(x: Tensor) -> Cut:
    """Cuts x for a pass that reduces."""
    programs = min(REDUCING, max(REDUCING // 4, x.numel() // (8 * TILE)))
    # Where channels are contiguous, warps share the positions: two merge faster than four.
    return _cut(x, programs, TILE if x.is_contiguous() else TILE // 2)


def applying(x: Tensor) -> Cut:
    """Cuts x for a pass that writes."""
    return _cut(x, APPLYING, TILE)


def _cut(x: Tensor, programs: int, tile: int) -> Cut:
    contiguous = memory_format(x) == torch.contiguous_format
    return cut_shape(x.shape, contiguous, x.element_size(), programs, tile)


@functools.lru_cache(maxsize=4096)
def cut_shape(
    shape: tuple[int, ...], contiguous: bool, itemsize: int, programs: int, tile: int
) -> Cut:
    """Cuts x into tiles of so many values, and these into at least so many programs.

    Fewer where x is small.
    """
    samples, channels, *positions = shape
    length = math.prod(positions)
    channels_last = not contiguous or length == 1
    if channels_last:
        # At least 128 channels wide, if there are as many: segments that memory delivers whole.
        block_c = block(channels, max(min(128, tile), tile // triton.next_power_of_2(length)))
        block_l = block(length, tile // block_c)
    else:
        block_l = block(length, tile)
        # A warp reads as many values at once as it has threads where they are not vectors: a
        # program of one warp then has no row that several would have to reduce.
        values = tile // 4 if length % 2 else tile
        block_c = block(channels, max(1, values // block_l))
    blocks_of_channels = samples * triton.cdiv(channels, block_c)
    tiles_of_row = triton.cdiv(length, block_l)
    tiles = triton.cdiv(tiles_of_row, triton.cdiv(programs, blocks_of_channels))
    splits = triton.cdiv(tiles_of_row, tiles)
    layout = dict(
        WHOLE=length <= block_l,
        AXIS=0 if channels_last else 1,
        VECTOR=math.gcd(channels if channels_last else length, 16 // itemsize),  # 128 bits
        BLOCK_C=block_c,
        BLOCK_L=block_l,
        num_warps=warps(block_c * block_l),
    )
    return Cut((blocks_of_channels, splits), length, tiles, splits, layout)


class Held(NamedTuple):
    """How x is cut where a program holds a group of a sample."""

    num_groups: int
    length: int
    layout: Constants


def held(x: Tensor, num_groups: int, most: int) -> Held | None:
    """How to cut x in this way; None: a group of a sample, or of all, has too many values."""
    contiguous = memory_format(x) == torch.contiguous_format
    limits = most, HELD_AT_ONCE, HELD_SAMPLES
    return held_shape(x.shape, contiguous, x.element_size(), num_groups, limits)


@functools.lru_cache(maxsize=4096)
def held_shape(
    shape: tuple[int, ...],
    contiguous: bool,
    itemsize: int,
    num_groups: int,
    limits: tuple[int, int, int],
) -> Held | None:
    """See `held`."""
    samples, channels, *positions = shape
    length, width = math.prod(positions), channels // num_groups
    channels_last = not contiguous or length == 1
    block_c, block_l = triton.next_power_of_2(width), triton.next_power_of_2(length)
    values = block_c * block_l * max(1, itemsize // 4)
    of_sample, at_once, most_samples = limits
    if values > of_sample or samples * values > at_once or samples > most_samples:
        return None
    if channels * length >= 2**31:  # places in a sample are of 32 bits
        return None
    layout = dict(
        AXIS=0 if channels_last else 1,
        VECTOR=math.gcd(width if channels_last else length, 16 // itemsize),
        BLOCK_C=block_c,
        BLOCK_L=block_l,
        num_warps=warps(2 * values, most=16),  # 8 per thread
    )
    return Held(num_groups, length, layout)


def merge_blocks(rows: int, splits: int) -> Constants:
    """R rows by K chunks."""
    block_k = triton.next_power_of_2(splits)
    return dict(BLOCK_R=block(rows, TILE // block_k), BLOCK_K=block_k)


def algebra_blocks(samples: int, width: int) -> Constants:
    """N samples by C channels, for a group of ``width`` channels."""
    block_c = block(width, TILE // block(samples, 32))
    return dict(BLOCK_N=block(samples, TILE // block_c), BLOCK_C=block_c)


def algebra_constants(samples: int, width: int, splits: int) -> Constants:
    """The blocks of a group, and those of its merging."""
    blocks = algebra_blocks(samples, width)
    merge = merge_blocks(samples * width, splits)
    values = max(math.prod(blocks.values()), math.prod(merge.values()))
    # Few values per thread: this kernel waits, for one result after the other.
    return blocks | merge | dict(num_warps=warps(2 * values))


def block(size: int, limit: int) -> int:
    """The power of two that covers ``size``, up to ``limit``."""
    return max(1, min(triton.next_power_of_2(size), limit))


def warps(values: int, most: int = 8) -> int:
    """16 values per thread."""
    return max(1, min(values // 512, most))
