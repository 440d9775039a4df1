"""Batch-Channel Normalization, forward: moments of x, the algebra, the result."""

import triton
import triton.language as tl

from wsbcn_mm.backends.triton.jit.statistics import channel_statistics, stage_1
from wsbcn_mm.backends.triton.jit.tiles import (
    SIZES,
    block_of_group,
    chunks_of_program,
    corner_of,
    load_or,
    merged_moments,
    moments_of_rows,
    number,
    part_of_program,
    reached,
    rows_of_group,
    tile_of,
    union,
    vectorised,
    welford,
)


@triton.jit(do_not_specialize=SIZES)
def moments(
    x,  # (N, C, L)
    means,  # (N, C, K), of the chunks
    variances,  # (N, C, K)
    channels,
    length,
    tiles,
    WHOLE: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Mean and biased variance of every chunk: one read of x."""
    ACC: tl.constexpr = means.dtype.element_ty
    channels, length = vectorised(channels, length, AXIS, VECTOR)
    n, channel, width, first, last = part_of_program(channels, length, tiles, BLOCK_C, BLOCK_L)
    c, lane, tile = tile_of(channels, length, AXIS, BLOCK_C, BLOCK_L)
    corner = x + corner_of(n, channel, first, channels, length, AXIS)
    inside = tl.arange(0, BLOCK_C) < width
    if WHOLE:
        mask = (c < width) & (lane < length)
        value = tl.load(corner + tile, mask, other=0.0).to(ACC)
        chunk_mean, chunk_variance = moments_of_rows(
            corner, value, inside, mask, channels, length, AXIS, BLOCK_C, ACC
        )
    else:
        rows = corner_of(0, tl.arange(0, BLOCK_C), 0, channels, length, AXIS)
        pivot = tl.load(corner + rows, inside, other=0.0).to(ACC)
        mean = tl.zeros((c + lane).shape, ACC)
        squares = tl.zeros((c + lane).shape, ACC)
        seen = tl.zeros([1, 1], ACC)
        for start in range(first, last, BLOCK_L):
            mask = (c < width) & reached(lane, start, last, BLOCK_L)
            corner = x + corner_of(n, channel, start, channels, length, AXIS)
            value = tl.load(corner + tile, mask, other=0.0).to(ACC)
            seen += 1.0
            mean, squares = welford(value, mask, seen, mean, squares)
        values = (last - first).to(tl.int32)
        count = ((values - lane + BLOCK_L - 1) // BLOCK_L).to(ACC)  # that a lane has seen
        chunk_mean, chunk_variance = union(pivot, values.to(ACC), count, mean, squares, AXIS)

    chunk = chunks_of_program(n, channel, channels, BLOCK_C)
    tl.store(means + chunk, chunk_mean, inside)
    tl.store(variances + chunk, chunk_variance, inside)


@triton.jit(do_not_specialize=SIZES)
def merge_moments(
    means,  # (N, C, K), of the chunks
    variances,  # (N, C, K)
    m,  # (N, C)
    q,  # (N, C)
    samples,
    channels,
    length,
    tiles,
    splits,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Moments of the rows from those of their chunks."""
    ACC: tl.constexpr = m.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = row < samples * channels
    mean, variance = merged_moments(
        means, variances, row, mask, length, tiles, splits, BLOCK_L, BLOCK_K, ACC
    )
    tl.store(m + row, mean, mask)
    tl.store(q + row, variance, mask)


@triton.jit(do_not_specialize=SIZES)
def forward_algebra(
    means,  # (N, C, K), of the chunks; None: m and q are there
    variances,  # (N, C, K)
    m,  # (N, C)
    q,  # (N, C)
    running_mean,  # (C,) or None
    running_var,  # (C,) or None
    rate_tensor,  # (); None: rate
    counts,  # (2, C), int64, or None
    num_batches_tracked,  # (), int64, or None
    mean,  # (C,)
    var,  # (C,)
    batch_weight,  # (C,) or None
    batch_bias,  # (C,) or None
    weight,  # (C / WEIGHT_REPEAT,) or None
    bias,  # (C / BIAS_REPEAT,) or None
    group_mean,  # (N, G)
    inv_group_std,  # (N, G)
    scale,  # (N, C): y = scale (x - m) + shift
    shift,  # (N, C)
    samples,
    channels,
    groups,
    length,
    tiles,
    splits,
    running_mean_stride,
    running_var_stride,
    rate,
    eps,
    STATISTICS: tl.constexpr,
    WEIGHT_REPEAT: tl.constexpr,
    BIAS_REPEAT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All statistics and the coefficients of y, for one group and a share of the samples.

    STATISTICS: see `channel_statistics`; 'given': mean and var are there. Those that are updated
    need all samples in one share. Programs that share a group write the same mean and var.
    """
    ACC: tl.constexpr = m.dtype.element_ty
    g = tl.program_id(0)
    width = channels // groups
    share = tl.cdiv(samples, tl.num_programs(1))
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, samples)
    eps = number(eps, ACC)

    if means is not None:
        for start in range(0, (last - first) * width, BLOCK_R):
            row, inside = rows_of_group(start + tl.arange(0, BLOCK_R), first, last, channels, width)
            row_mean, row_variance = merged_moments(
                means, variances, row, inside, length, tiles, splits, BLOCK_L, BLOCK_K, ACC
            )
            tl.store(m + row, row_mean, inside)
            tl.store(q + row, row_variance, inside)
        tl.debug_barrier()  # other threads of this program read them

    if STATISTICS != 'given':
        channel_statistics(
            m,
            q,
            running_mean,
            running_var,
            rate_tensor,
            counts,
            num_batches_tracked,
            mean,
            var,
            samples,
            channels,
            groups,
            length,
            running_mean_stride,
            running_var_stride,
            rate,
            STATISTICS,
            BLOCK_N,
            BLOCK_C,
        )

    for s in range(first, last, BLOCK_N):
        n = s + tl.arange(0, BLOCK_N)
        n_inside = n < last
        sum_t = tl.zeros([BLOCK_N], ACC)
        for start in range(0, width, BLOCK_C):
            c, inside, row, mask = block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            row_mean = tl.load(m + row, mask, other=0.0)
            _, _, _, t = stage_1(row_mean, mean, var, batch_weight, batch_bias, c, inside, eps)
            sum_t += tl.sum(tl.where(mask, t, 0.0), 1)
        centre = sum_t / width
        sum_squares = tl.zeros([BLOCK_N], ACC)
        for start in range(0, width, BLOCK_C):
            c, inside, row, mask = block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            row_mean = tl.load(m + row, mask, other=0.0)
            _, gain, _, t = stage_1(row_mean, mean, var, batch_weight, batch_bias, c, inside, eps)
            off = t - centre[:, None]
            within = (gain * gain)[None, :] * tl.load(q + row, mask, other=0.0)
            sum_squares += tl.sum(tl.where(mask, within + off * off, 0.0), 1)
        inverse = 1.0 / tl.sqrt(sum_squares / width + eps)
        place = n.to(tl.int64) * groups + g
        tl.store(group_mean + place, centre, n_inside)
        tl.store(inv_group_std + place, inverse, n_inside)
        for start in range(0, width, BLOCK_C):
            c, inside, row, mask = block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            row_mean = tl.load(m + row, mask, other=0.0)
            _, gain, _, t = stage_1(row_mean, mean, var, batch_weight, batch_bias, c, inside, eps)
            outer = load_or(weight, c // WEIGHT_REPEAT, inside, 1.0, ACC)
            offset = load_or(bias, c // BIAS_REPEAT, inside, 0.0, ACC)
            slope = outer[None, :] * inverse[:, None]
            tl.store(scale + row, slope * gain[None, :], mask)
            tl.store(shift + row, slope * (t - centre[:, None]) + offset[None, :], mask)


@triton.jit
def apply_to_tile(x, y, corner, tile, mask, centre, slope, offset, ACC: tl.constexpr):
    value = tl.load(x + corner + tile, mask, other=0.0).to(ACC)
    result = (value - centre) * slope + offset
    tl.store(y + corner + tile, result.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES)
def forward_apply(
    x,  # (N, C, L)
    y,  # (N, C, L)
    m,  # (N, C)
    scale,  # (N, C)
    shift,  # (N, C)
    channels,
    length,
    tiles,
    WHOLE: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The last pass, y = scale (x - m) + shift: one read, one write."""
    ACC: tl.constexpr = m.dtype.element_ty
    channels, length = vectorised(channels, length, AXIS, VECTOR)
    n, channel, width, first, last = part_of_program(channels, length, tiles, BLOCK_C, BLOCK_L)
    c, lane, tile = tile_of(channels, length, AXIS, BLOCK_C, BLOCK_L)

    row = n * channels + channel
    centre = tl.load(m + row + c, c < width, other=0.0)
    slope = tl.load(scale + row + c, c < width, other=0.0)
    offset = tl.load(shift + row + c, c < width, other=0.0)
    if WHOLE:
        corner = corner_of(n, channel, 0, channels, length, AXIS)
        mask = (c < width) & (lane < length)
        apply_to_tile(x, y, corner, tile, mask, centre, slope, offset, ACC)
    else:
        for start in range(first, last, BLOCK_L):
            corner = corner_of(n, channel, start, channels, length, AXIS)
            mask = (c < width) & reached(lane, start, last, BLOCK_L)
            apply_to_tile(x, y, corner, tile, mask, centre, slope, offset, ACC)
