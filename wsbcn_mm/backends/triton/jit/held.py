"""All passes in one, for maps so small that a program holds a group of a sample: one launch.

A program goes through all samples, for an update of the statistics and a gradient through them need
them all.
"""

import triton
import triton.language as tl

from wsbcn_mm.backends.triton.jit.backward import (
    coefficients_of_dx,
    sums_of_dx1,
    through_statistics,
)
from wsbcn_mm.backends.triton.jit.statistics import channel_statistics, parameters_of_stage_1
from wsbcn_mm.backends.triton.jit.tiles import (
    SIZES,
    corner_of,
    load_or,
    moments_of_rows,
    multiple,
    number,
    tile_of,
    vectorised,
)


@triton.jit
def group_of_program(
    channels,
    groups,
    length,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """What of a sample belongs to this program.

    Returns:
        The first channel of the group, and the mask of its (C,); where in a sample it starts, its
        tile from there, and the mask of that; the sizes again; that of a sample, and of the group.
    """
    channels, length = vectorised(channels, length, AXIS, VECTOR)
    width = channels // groups
    if AXIS == 0:
        width = multiple(width, VECTOR)
    corner = tl.program_id(0).to(tl.int64) * width
    inside = tl.arange(0, BLOCK_C) < width
    c, lane, tile = tile_of(channels, length, AXIS, BLOCK_C, BLOCK_L)
    start = corner_of(0, corner, 0, channels, length, AXIS)
    mask = (c < width) & (lane < length)
    size = channels.to(tl.int64) * length
    return corner, inside, start, tile, mask, channels, length, size, width


@triton.jit(do_not_specialize=SIZES)
def forward_held(
    x,  # (N, C, L)
    y,  # (N, C, L)
    m,  # (N, C) or None: nobody asks
    q,  # (N, C) or None
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
    samples,
    channels,
    groups,
    length,
    running_mean_stride,
    running_var_stride,
    rate,
    eps,
    STATISTICS: tl.constexpr,
    WEIGHT_REPEAT: tl.constexpr,
    BIAS_REPEAT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The result and all statistics. STATISTICS: see `channel_statistics`; 'given': they are."""
    ACC: tl.constexpr = mean.dtype.element_ty
    g = tl.program_id(0)
    corner, inside, start, tile, mask, channels, length, size, width = group_of_program(
        channels, groups, length, AXIS, VECTOR, BLOCK_C, BLOCK_L
    )
    i = tl.arange(0, BLOCK_C)
    eps = number(eps, ACC)

    if STATISTICS == 'estimate' or STATISTICS == 'batch':
        for n in range(samples):
            place = n * size + start
            value = tl.load(x + place + tile, mask, other=0.0).to(ACC)
            row_mean, row_variance = moments_of_rows(
                x + place, value, inside, mask, channels, length, AXIS, BLOCK_C, ACC
            )
            row = n * channels + corner
            tl.store(m + row + i, row_mean, inside)
            tl.store(q + row + i, row_variance, inside)
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

    _, gain, centre_of_channel, shift = parameters_of_stage_1(
        mean, var, batch_weight, batch_bias, corner + i, inside, eps
    )
    outer = load_or(weight, (corner + i) // WEIGHT_REPEAT, inside, 1.0, ACC)
    outer_shift = load_or(bias, (corner + i) // BIAS_REPEAT, inside, 0.0, ACC)
    for n in range(samples):
        place = n * size + start
        value = tl.load(x + place + tile, mask, other=0.0).to(ACC)
        row = n * channels + corner
        if STATISTICS == 'running':
            row_mean, row_variance = moments_of_rows(
                x + place, value, inside, mask, channels, length, AXIS, BLOCK_C, ACC
            )
            if m is not None:
                tl.store(m + row + i, row_mean, inside)
                tl.store(q + row + i, row_variance, inside)
        else:
            row_mean = tl.load(m + row + i, inside, other=0.0)
            row_variance = tl.load(q + row + i, inside, other=0.0)
        t = gain * (row_mean - centre_of_channel) + shift
        centre = tl.sum(tl.where(inside, t, 0.0), 0) / width
        off = t - centre
        squares = tl.sum(tl.where(inside, gain * gain * row_variance + off * off, 0.0), 0)
        inverse = 1.0 / tl.sqrt(squares / width + eps)
        if group_mean is not None:
            tl.store(group_mean + n * groups + g, centre)
            tl.store(inv_group_std + n * groups + g, inverse)
        slope = outer * inverse
        result = (value - tl.expand_dims(row_mean, AXIS)) * tl.expand_dims(slope * gain, AXIS)
        result += tl.expand_dims(slope * off + outer_shift, AXIS)
        tl.store(y + place + tile, result.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES)
def backward_held(
    grad,  # (N, C, L)
    x,  # (N, C, L)
    dx,  # (N, C, L)
    m,  # (N, C)
    q,  # (N, C)
    mean,  # (C,)
    var,  # (C,)
    group_mean,  # (N, G)
    inv_group_std,  # (N, G)
    batch_weight,  # (C,) or None
    batch_bias,  # (C,) or None
    weight,  # (C / WEIGHT_REPEAT,) or None
    mean_h,  # (2, N, G), scratch for THROUGH_STATISTICS
    grad_batch_weight,  # (C,)
    grad_batch_bias,  # (C,)
    grad_weight,  # (C,) or (G,); None: there is no outer affine
    grad_bias,  # (C,) or (G,)
    samples,
    channels,
    groups,
    length,
    eps,
    WEIGHT_REPEAT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    THROUGH_STATISTICS: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dx, and the gradients of the parameters."""
    ACC: tl.constexpr = mean.dtype.element_ty
    g = tl.program_id(0)
    corner, inside, start, tile, mask, channels, length, size, width = group_of_program(
        channels, groups, length, AXIS, VECTOR, BLOCK_C, BLOCK_L
    )
    i = tl.arange(0, BLOCK_C)
    eps = number(eps, ACC)
    positions = length.to(ACC)
    inv_std, gain, centre_of_channel, shift = parameters_of_stage_1(
        mean, var, batch_weight, batch_bias, corner + i, inside, eps
    )
    outer = load_or(weight, (corner + i) // WEIGHT_REPEAT, inside, 1.0, ACC)

    sum_x1 = tl.zeros([BLOCK_C], ACC)  # of dx1
    sum_x1_x = tl.zeros([BLOCK_C], ACC)  # of dx1 (x - mean)
    sum_gz = tl.zeros([BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_C], ACC)
    for n in range(samples):
        place = n * size + start
        row = n * channels + corner
        row_mean = tl.load(m + row + i, inside, other=0.0)
        tile_g = tl.load(grad + place + tile, mask, other=0.0).to(ACC)
        value = tl.load(x + place + tile, mask, other=0.0).to(ACC)
        value -= tl.expand_dims(row_mean, AXIS)
        row_g = tl.sum(tile_g, AXIS)
        row_gx = tl.sum(tile_g * value, AXIS)  # 0 outside: tile_g is
        centred = row_mean - centre_of_channel
        t = gain * centred + shift - tl.load(group_mean + n * groups + g)
        s = tl.load(inv_group_std + n * groups + g)
        row_gz = s * (gain * row_gx + t * row_g)
        h = tl.sum(tl.where(inside, outer * row_g, 0.0), 0) / (width * positions)
        hz = tl.sum(tl.where(inside, outer * row_gz, 0.0), 0) / (width * positions)
        row_q = tl.load(q + row + i, inside, other=0.0)
        row_x1, row_x1_x = sums_of_dx1(
            row_g, row_gx, row_q, gain, centred, t, outer, s, h, hz, positions
        )
        sum_x1 += tl.where(inside, row_x1, 0.0)
        sum_x1_x += tl.where(inside, row_x1_x, 0.0)
        sum_gz += tl.where(inside, row_gz, 0.0)
        sum_g += row_g
        if THROUGH_STATISTICS:
            tl.store(mean_h + n * groups + g, h)
            tl.store(mean_h + (samples + n) * groups + g, hz)
        else:
            slope_g, slope_x, offset = coefficients_of_dx(gain, t, outer, s, h, hz)
            result = tl.expand_dims(slope_g, AXIS) * tile_g
            result += tl.expand_dims(slope_x, AXIS) * value + tl.expand_dims(offset, AXIS)
            tl.store(dx + place + tile, result.to(dx.dtype.element_ty), mask)

    channel = corner + i
    tl.store(grad_batch_bias + channel, sum_x1, inside)
    tl.store(grad_batch_weight + channel, sum_x1_x * inv_std, inside)
    if grad_weight is not None:
        if PER_CHANNEL:
            tl.store(grad_weight + channel, sum_gz, inside)
            tl.store(grad_bias + channel, sum_g, inside)
        else:
            tl.store(grad_weight + g, tl.sum(sum_gz, 0))
            tl.store(grad_bias + g, tl.sum(sum_g, 0))

    if THROUGH_STATISTICS:
        tl.debug_barrier()  # mean_h was written
        values = samples * positions
        for n in range(samples):
            place = n * size + start
            row_mean = tl.load(m + n * channels + corner + i, inside, other=0.0)
            tile_g = tl.load(grad + place + tile, mask, other=0.0).to(ACC)
            value = tl.load(x + place + tile, mask, other=0.0).to(ACC)
            value -= tl.expand_dims(row_mean, AXIS)
            centred = row_mean - centre_of_channel
            t = gain * centred + shift - tl.load(group_mean + n * groups + g)
            s = tl.load(inv_group_std + n * groups + g)
            h = tl.load(mean_h + n * groups + g)
            hz = tl.load(mean_h + (samples + n) * groups + g)
            slope_g, slope_x, offset = coefficients_of_dx(gain, t, outer, s, h, hz)
            slope_x, offset = through_statistics(
                slope_x,
                offset,
                centred,
                gain * inv_std * inv_std * sum_x1_x / values,
                gain * sum_x1 / values,
            )
            result = tl.expand_dims(slope_g, AXIS) * tile_g
            result += tl.expand_dims(slope_x, AXIS) * value + tl.expand_dims(offset, AXIS)
            tl.store(dx + place + tile, result.to(dx.dtype.element_ty), mask)
