"""Where a program works, in both memory layouts, and what is merged across lanes and chunks.

A tile is BLOCK_C channels by BLOCK_L positions of one sample, whose fast axis is the one that is
contiguous in memory. AXIS, the axis of the positions, is therefore all that a kernel knows of the
layout: 1, a tile [C, L], for x (N, C, L); 0, a tile [L, C], for channels_last, x (N, L, C). A
program of a pass owns one block of channels and one chunk, ``tiles`` tiles, of their positions; K
chunks make a row, which is one (sample, channel). WHOLE: a tile holds whole rows, and there is one;
without a loop around it a program takes half as many instructions.
"""

import triton
import triton.language as tl

SIZES = (
    'samples',
    'channels',
    'groups',
    'length',
    'tiles',
    'splits',
    'running_mean_stride',
    'running_var_stride',
    'rate',
    'eps',
)
"""A size that is 1 or divisible by 16 must not compile a kernel anew: images come in every size."""


@triton.jit
def number(bits, dtype: tl.constexpr):
    """A Python float, which comes as its 64 bits because Triton would pass it as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def load_or(pointer, index, mask, otherwise: tl.constexpr, dtype: tl.constexpr):
    """Values of a tensor, or `otherwise` where the tensor is None."""
    if pointer is None:
        values = tl.full(index.shape, otherwise, dtype)
    else:
        values = tl.load(pointer + index, mask, other=otherwise).to(dtype)
    return values


# ----------------------------------------------------------------------------------------------
# Both layouts


@triton.jit
def multiple(size, VECTOR: tl.constexpr):
    """`size`, which VECTOR divides: tells the compiler that rows start where a vector may."""
    return size // VECTOR * VECTOR


@triton.jit
def vectorised(channels, length, AXIS: tl.constexpr, VECTOR: tl.constexpr):
    """The same sizes; the compiler learns that VECTOR divides the contiguous one."""
    if AXIS == 0:
        channels = multiple(channels, VECTOR)
    else:
        length = multiple(length, VECTOR)
    return channels, length


@triton.jit
def tile_of(channels, length, AXIS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """A tile: its channels and positions, shaped to broadcast, and where they lie from its corner.

    32 bits: an address is then one instruction, and these are in every load.
    """
    c = tl.expand_dims(tl.arange(0, BLOCK_C), AXIS)
    lane = tl.expand_dims(tl.arange(0, BLOCK_L), 1 - AXIS)
    if AXIS == 0:
        place = lane * channels.to(tl.int32) + c
    else:
        place = c * length.to(tl.int32) + lane
    return c, lane, place


@triton.jit
def corner_of(n, c, position, channels, length, AXIS: tl.constexpr):
    """Where in x a tile begins: 64 bits, once per tile."""
    sample = n * channels * length
    if AXIS == 0:
        place = sample + position * channels + c
    else:
        place = sample + c * length + position
    return place


@triton.jit
def part_of_program(channels, length, tiles, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """What a pass leaves to this program.

    Returns:
        Sample, first channel and how many there are from there on, first and last position
        (exclusive).
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks * BLOCK_C).to(tl.int64)
    size = tiles.to(tl.int64) * BLOCK_L
    first = tl.program_id(1) * size
    return n, channel, (channels - channel).to(tl.int32), first, tl.minimum(first + size, length)


@triton.jit
def reached(lane, start, last, BLOCK_L: tl.constexpr):
    """Which positions of the tile that begins at `start` come before `last`."""
    return lane < tl.minimum(last - start, BLOCK_L).to(tl.int32)


@triton.jit
def chunks_of_program(n, channel, channels, BLOCK_C: tl.constexpr):
    """Where what a program finds about its channels goes in (N, C, K)."""
    row = n * channels + channel + tl.arange(0, BLOCK_C)
    return row * tl.num_programs(1) + tl.program_id(1)


# ----------------------------------------------------------------------------------------------
# Moments


@triton.jit
def moments_of_rows(
    x,  # where the tile starts
    value,
    inside,
    mask,
    channels,
    length,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean and biased variance (C,) of rows that a tile holds whole, around their first values."""
    rows = corner_of(0, tl.arange(0, BLOCK_C), 0, channels, length, AXIS)
    first = tl.load(x + rows, inside, other=0.0).to(ACC)
    off = tl.where(mask, value - tl.expand_dims(first, AXIS), 0.0)
    centre = tl.sum(off, AXIS) / length
    off = tl.where(mask, off - tl.expand_dims(centre, AXIS), 0.0)
    return first + centre, tl.sum(off * off, AXIS) / length


@triton.jit
def welford(value, mask, seen, mean, squares):
    """One more value for the mean and the sum of squared deviations of every lane (Welford)."""
    delta = tl.where(mask, value - mean, 0.0)
    mean += delta * (1.0 / seen)
    return mean, squares + delta * (value - mean)


@triton.jit
def union(pivot, total, count, mean, squares, AXIS: tl.constexpr):
    """Mean and biased variance of the union of parts along AXIS, `total` values (Chan et al.).

    Around `pivot`, one of the values: exact for constants, whatever their size.
    """
    off = mean - tl.expand_dims(pivot, AXIS)
    centre = tl.sum(count * off, AXIS) / total
    off -= tl.expand_dims(centre, AXIS)
    return pivot + centre, tl.sum(squares + count * off * off, AXIS) / total


@triton.jit
def merged_moments(
    means,
    variances,
    row,
    mask,
    length,
    tiles,
    splits,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """Moments of the rows `row` (R,) from those of their chunks (N, C, K)."""
    k = tl.arange(0, BLOCK_K)[None, :]
    place = row[:, None] * splits + k
    inside = mask[:, None] & (k < splits)
    size = tiles.to(tl.int64) * BLOCK_L
    count = tl.where(k < splits, tl.minimum(size, length - k * size), 0).to(dtype)
    mean = tl.load(means + place, inside, other=0.0)
    squares = count * tl.load(variances + place, inside, other=0.0)
    pivot = tl.load(means + row * splits, mask, other=0.0)
    return union(pivot, length.to(dtype), count, mean, squares, 1)


@triton.jit
def merged_sums(sums, row, mask, splits, BLOCK_K: tl.constexpr):
    """Sums of the rows `row` (R,) from those of their chunks (N, C, K)."""
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = mask[:, None] & (k < splits)
    return tl.sum(tl.load(sums + row[:, None] * splits + k, inside, other=0.0), 1)


# ----------------------------------------------------------------------------------------------
# Groups: axis 0 of the grid


@triton.jit
def rows_of_group(i, first, last, channels, width):
    """Row number and mask of entry `i` of the (samples first..last, width) rows of a group."""
    c = tl.program_id(0) * width + i % width
    row = (first + i // width).to(tl.int64) * channels + c
    return row, i < (last - first) * width


@triton.jit
def block_of_group(start, channels, width, n, n_inside, BLOCK_C: tl.constexpr):
    """Channels `start`.. of a group: numbers (C,) and mask, rows [N, C] and mask."""
    i = start + tl.arange(0, BLOCK_C)
    c = tl.program_id(0) * width + i
    row = n[:, None].to(tl.int64) * channels + c[None, :]
    return c, i < width, row, n_inside[:, None] & (i < width)[None, :]
