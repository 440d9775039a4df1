"""Where a program works, in both memory layouts, and what is merged across lanes and chunks.

A tile is BLOCK_C channels by BLOCK_L positions of one sample, whose fast axis is the one that is
contiguous in memory. AXIS, the axis of the positions, is therefore all that a kernel knows of the
layout: 1, a tile [C, L], for x (N, C, L); 0, a tile [L, C], for channels_last, x (N, L, C). A
program of a pass owns one block of channels and one chunk, ``tiles`` tiles, of their positions; K
chunks make a row, which is one (sample, channel).
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
    'weight_repeat',
    'bias_repeat',
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
def axes(channel, AXIS: tl.constexpr, BLOCK_L: tl.constexpr):
    """Channels (C,) and the positions of a first tile, shaped to broadcast against each other."""
    c = tl.expand_dims(channel, AXIS)
    lane = tl.expand_dims(tl.arange(0, BLOCK_L), 1 - AXIS)
    return c, lane


@triton.jit
def offsets(n, c, positions, channels, length, AXIS: tl.constexpr):
    """Where a tile lies in x."""
    sample = n * channels * length
    if AXIS == 0:
        place = sample + positions * channels + c
    else:
        place = sample + c * length + positions
    return place


@triton.jit
def part_of_program(channels, length, tiles, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """What a pass leaves to this program.

    Returns:
        Sample, channels (C,), first and last position (exclusive), and where what it finds about
        these channels goes in (N, C, K).
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    size = tiles.to(tl.int64) * BLOCK_L
    first = tl.program_id(1) * size
    chunk = (n * channels + channel) * tl.num_programs(1) + tl.program_id(1)
    return n, channel, first, tl.minimum(first + size, length), chunk


# ----------------------------------------------------------------------------------------------
# Moments


@triton.jit
def welford(value, mask, seen, mean, squares):
    """One more value for the mean and the sum of squared deviations of every lane (Welford)."""
    delta = tl.where(mask, value - mean, 0.0)
    mean += delta * (1.0 / seen)
    return mean, squares + delta * (value - mean)


@triton.jit
def lane_counts(lane, first, last, BLOCK: tl.constexpr):
    """How many values a lane sees when tiles of BLOCK cover [first, last)."""
    return (last - first - lane + BLOCK - 1) // BLOCK


@triton.jit
def union(index, count, mean, squares, AXIS: tl.constexpr):
    """Mean and biased variance of the union of parts along AXIS (Chan et al.).

    Around the mean of part 0, which is never empty: exact for constants, whatever their size.
    """
    pivot = tl.sum(tl.where(index == 0, mean, 0.0), AXIS)
    total = tl.sum(count, AXIS)
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
    return union(k, count, mean, squares, 1)


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
