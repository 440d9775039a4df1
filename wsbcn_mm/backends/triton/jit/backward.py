"""Batch-Channel Normalization, backward: sums over x and grad, the algebra, dx."""

import triton
import triton.language as tl

from wsbcn_mm.backends.triton.jit.statistics import stage_1
from wsbcn_mm.backends.triton.jit.tiles import (
    SIZES,
    block_of_group,
    chunks_of_program,
    corner_of,
    load_or,
    merged_sums,
    number,
    part_of_program,
    reached,
    rows_of_group,
    tile_of,
    vectorised,
)

# With h = weight grad, z the normalised x1, and means over the group:
#     dx1 = s (h - mean(h) - z mean(h z))
# t is the row mean of x1 less that of the group, s one over the group's standard deviation.


@triton.jit
def sums_of_dx1(row_g, row_gx, row_q, gain, centred, t, outer, s, h, hz, positions):
    """Row sums of dx1 and of dx1 (x - mean), from those of grad and grad (x - m)."""
    row_x1 = s * (outer * row_g - positions * (h + s * hz * t))
    row_x1_x = s * (outer * row_gx - s * hz * gain * positions * row_q)
    return row_x1, row_x1_x + centred * row_x1


@triton.jit
def coefficients_of_dx(gain, t, outer, s, h, hz):
    """Dx = to_grad grad + to_x (x - m) + constant, with the statistics of stage 1 as constants."""
    gain_s = gain * s
    return gain_s * outer, -gain_s * gain_s * hz, -gain_s * (h + s * hz * t)


@triton.jit
def through_statistics(to_x, constant, centred, towards_var, towards_mean):
    """The two terms of BatchNorm's own statistics."""
    return to_x - towards_var, constant - (towards_mean + towards_var * centred)


@triton.jit
def terms_of_tile(grad, x, corner, tile, mask, centre, ACC: tl.constexpr):
    """What is summed: grad and grad (x - m), 0 outside."""
    g = tl.load(grad + corner + tile, mask, other=0.0).to(ACC)
    return g, g * (tl.load(x + corner + tile, mask, other=0.0).to(ACC) - centre)


@triton.jit(do_not_specialize=SIZES)
def backward_sums(
    grad,  # (N, C, L)
    x,  # (N, C, L)
    m,  # (N, C)
    sums_g,  # (N, C, K), of the chunks
    sums_gx,  # (N, C, K)
    channels,
    length,
    tiles,
    WHOLE: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Sums of grad and grad (x - m) over every chunk: one read of each."""
    ACC: tl.constexpr = m.dtype.element_ty
    channels, length = vectorised(channels, length, AXIS, VECTOR)
    n, channel, width, first, last = part_of_program(channels, length, tiles, BLOCK_C, BLOCK_L)
    c, lane, tile = tile_of(channels, length, AXIS, BLOCK_C, BLOCK_L)

    centre = tl.load(m + n * channels + channel + c, c < width, other=0.0)
    if WHOLE:
        corner = corner_of(n, channel, 0, channels, length, AXIS)
        mask = (c < width) & (lane < length)
        sum_g, sum_gx = terms_of_tile(grad, x, corner, tile, mask, centre, ACC)
    else:
        sum_g = tl.zeros((c + lane).shape, ACC)
        sum_gx = tl.zeros((c + lane).shape, ACC)
        for start in range(first, last, BLOCK_L):
            corner = corner_of(n, channel, start, channels, length, AXIS)
            mask = (c < width) & reached(lane, start, last, BLOCK_L)
            g, gx = terms_of_tile(grad, x, corner, tile, mask, centre, ACC)
            sum_g += g
            sum_gx += gx

    chunk = chunks_of_program(n, channel, channels, BLOCK_C)
    inside = tl.arange(0, BLOCK_C) < width
    tl.store(sums_g + chunk, tl.sum(sum_g, AXIS), inside)
    tl.store(sums_gx + chunk, tl.sum(sum_gx, AXIS), inside)


@triton.jit(do_not_specialize=SIZES)
def backward_algebra(
    sums_g,  # (N, C, K), of the chunks; None: sum_g and sum_gx are there
    sums_gx,  # (N, C, K)
    sum_g,  # (N, C)
    sum_gx,  # (N, C)
    m,  # (N, C)
    q,  # (N, C)
    mean,  # (C,)
    var,  # (C,)
    group_mean,  # (N, G)
    inv_group_std,  # (N, G)
    batch_weight,  # (C,) or None
    batch_bias,  # (C,) or None
    weight,  # (C / WEIGHT_REPEAT,) or None
    mean_h,  # (N, G), scratch: over the group, of h = weight grad
    mean_hz,  # (N, G), scratch: of h z, z the normalised x1
    grad_batch_weight,  # (C,)
    grad_batch_bias,  # (C,)
    grad_weight,  # (C,) or (G,); None: there is no outer affine
    grad_bias,  # (C,) or (G,)
    to_grad,  # (N, C): dx = to_grad grad + to_x (x - m) + constant
    to_x,  # (N, C)
    constant,  # (N, C)
    samples,
    channels,
    groups,
    length,
    splits,
    eps,
    WEIGHT_REPEAT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    THROUGH_STATISTICS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of the parameters and the coefficients of dx, for one group."""
    ACC: tl.constexpr = m.dtype.element_ty
    g = tl.program_id(0)
    width = channels // groups
    eps = number(eps, ACC)
    positions = length.to(ACC)

    if sums_g is not None:
        for start in range(0, samples * width, BLOCK_R):
            row, inside = rows_of_group(start + tl.arange(0, BLOCK_R), 0, samples, channels, width)
            tl.store(sum_g + row, merged_sums(sums_g, row, inside, splits, BLOCK_K), inside)
            tl.store(sum_gx + row, merged_sums(sums_gx, row, inside, splits, BLOCK_K), inside)
        tl.debug_barrier()  # other threads of this program read them

    for start_n in range(0, samples, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        n_inside = n < samples
        place = n.to(tl.int64) * groups + g
        centre = tl.load(group_mean + place, n_inside, other=0.0)[:, None]
        s = tl.load(inv_group_std + place, n_inside, other=0.0)[:, None]
        sum_h = tl.zeros([BLOCK_N], ACC)
        sum_hz = tl.zeros([BLOCK_N], ACC)
        for start in range(0, width, BLOCK_C):
            c, inside, row, mask = block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            row_mean = tl.load(m + row, mask, other=0.0)
            _, gain, _, t = stage_1(row_mean, mean, var, batch_weight, batch_bias, c, inside, eps)
            outer = load_or(weight, c // WEIGHT_REPEAT, inside, 1.0, ACC)[None, :]
            row_g = tl.load(sum_g + row, mask, other=0.0)
            row_gx = tl.load(sum_gx + row, mask, other=0.0)
            row_gz = s * (gain[None, :] * row_gx + (t - centre) * row_g)
            sum_h += tl.sum(tl.where(mask, outer * row_g, 0.0), 1)
            sum_hz += tl.sum(tl.where(mask, outer * row_gz, 0.0), 1)
        tl.store(mean_h + place, sum_h / (width * positions), n_inside)
        tl.store(mean_hz + place, sum_hz / (width * positions), n_inside)
    tl.debug_barrier()

    group_sum_gz = tl.zeros([], ACC)
    group_sum_g = tl.zeros([], ACC)
    for start in range(0, width, BLOCK_C):
        sum_x1 = tl.zeros([BLOCK_C], ACC)  # of dx1
        sum_x1_x = tl.zeros([BLOCK_C], ACC)  # of dx1 (x - mean)
        channel_sum_gz = tl.zeros([BLOCK_C], ACC)
        channel_sum_g = tl.zeros([BLOCK_C], ACC)
        for start_n in range(0, samples, BLOCK_N):
            n = start_n + tl.arange(0, BLOCK_N)
            n_inside = n < samples
            place = n.to(tl.int64) * groups + g
            s = tl.load(inv_group_std + place, n_inside, other=0.0)[:, None]
            h = tl.load(mean_h + place, n_inside, other=0.0)[:, None]
            hz = tl.load(mean_hz + place, n_inside, other=0.0)[:, None]
            c, inside, row, mask = block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            row_mean = tl.load(m + row, mask, other=0.0)
            _, gain, centred, t = stage_1(
                row_mean, mean, var, batch_weight, batch_bias, c, inside, eps
            )
            t -= tl.load(group_mean + place, n_inside, other=0.0)[:, None]
            outer = load_or(weight, c // WEIGHT_REPEAT, inside, 1.0, ACC)[None, :]
            row_g = tl.load(sum_g + row, mask, other=0.0)
            row_gx = tl.load(sum_gx + row, mask, other=0.0)
            row_q = tl.load(q + row, mask, other=0.0)
            row_x1, row_x1_x = sums_of_dx1(
                row_g, row_gx, row_q, gain[None, :], centred, t, outer, s, h, hz, positions
            )
            row_gz = s * (gain[None, :] * row_gx + t * row_g)
            sum_x1 += tl.sum(tl.where(mask, row_x1, 0.0), 0)
            sum_x1_x += tl.sum(tl.where(mask, row_x1_x, 0.0), 0)
            channel_sum_gz += tl.sum(tl.where(mask, row_gz, 0.0), 0)
            channel_sum_g += tl.sum(row_g, 0)

        i = start + tl.arange(0, BLOCK_C)
        c = g * width + i
        inside = i < width
        inv_std = 1.0 / tl.sqrt(tl.load(var + c, inside, other=1.0) + eps)
        sum_x1_x *= inv_std
        tl.store(grad_batch_bias + c, sum_x1, inside)
        tl.store(grad_batch_weight + c, sum_x1_x, inside)
        if PER_CHANNEL:
            tl.store(grad_weight + c, channel_sum_gz, inside)
            tl.store(grad_bias + c, channel_sum_g, inside)
        group_sum_gz += tl.sum(channel_sum_gz, 0)
        group_sum_g += tl.sum(channel_sum_g, 0)

        for start_n in range(0, samples, BLOCK_N):
            n = start_n + tl.arange(0, BLOCK_N)
            n_inside = n < samples
            place = n.to(tl.int64) * groups + g
            s = tl.load(inv_group_std + place, n_inside, other=0.0)[:, None]
            h = tl.load(mean_h + place, n_inside, other=0.0)[:, None]
            hz = tl.load(mean_hz + place, n_inside, other=0.0)[:, None]
            c, inside, row, mask = block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            row_mean = tl.load(m + row, mask, other=0.0)
            _, gain, centred, t = stage_1(
                row_mean, mean, var, batch_weight, batch_bias, c, inside, eps
            )
            t -= tl.load(group_mean + place, n_inside, other=0.0)[:, None]
            outer = load_or(weight, c // WEIGHT_REPEAT, inside, 1.0, ACC)[None, :]
            slope_g, slope_x, offset = coefficients_of_dx(gain[None, :], t, outer, s, h, hz)
            if THROUGH_STATISTICS:
                slope_x, offset = through_statistics(
                    slope_x,
                    offset,
                    centred,
                    (gain * inv_std * sum_x1_x / (samples * positions))[None, :],
                    (gain * sum_x1 / (samples * positions))[None, :],
                )
            tl.store(to_grad + row, slope_g, mask)
            tl.store(to_x + row, slope_x, mask)
            tl.store(constant + row, offset, mask)

    if grad_weight is not None and not PER_CHANNEL:
        tl.store(grad_weight + g, group_sum_gz)
        tl.store(grad_bias + g, group_sum_g)


@triton.jit
def apply_to_tile(
    grad, x, dx, corner, tile, mask, centre, slope_g, slope_x, offset, ACC: tl.constexpr
):
    g = tl.load(grad + corner + tile, mask, other=0.0).to(ACC)
    value = tl.load(x + corner + tile, mask, other=0.0).to(ACC)
    result = slope_g * g + (slope_x * (value - centre) + offset)
    tl.store(dx + corner + tile, result.to(dx.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES)
def backward_apply(
    grad,  # (N, C, L)
    x,  # (N, C, L)
    dx,  # (N, C, L)
    m,  # (N, C)
    to_grad,  # (N, C)
    to_x,  # (N, C)
    constant,  # (N, C)
    channels,
    length,
    tiles,
    WHOLE: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The last pass, dx = to_grad grad + to_x (x - m) + constant: two reads, one write."""
    ACC: tl.constexpr = m.dtype.element_ty
    channels, length = vectorised(channels, length, AXIS, VECTOR)
    n, channel, width, first, last = part_of_program(channels, length, tiles, BLOCK_C, BLOCK_L)
    c, lane, tile = tile_of(channels, length, AXIS, BLOCK_C, BLOCK_L)

    row = n * channels + channel
    centre = tl.load(m + row + c, c < width, other=0.0)
    slope_g = tl.load(to_grad + row + c, c < width, other=0.0)
    slope_x = tl.load(to_x + row + c, c < width, other=0.0)
    offset = tl.load(constant + row + c, c < width, other=0.0)
    if WHOLE:
        corner = corner_of(n, channel, 0, channels, length, AXIS)
        mask = (c < width) & (lane < length)
        apply_to_tile(grad, x, dx, corner, tile, mask, centre, slope_g, slope_x, offset, ACC)
    else:
        for start in range(first, last, BLOCK_L):
            corner = corner_of(n, channel, start, channels, length, AXIS)
            mask = (c < width) & reached(lane, start, last, BLOCK_L)
            apply_to_tile(grad, x, dx, corner, tile, mask, centre, slope_g, slope_x, offset, ACC)
