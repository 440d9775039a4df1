"""The Triton kernels: three passes over x and two small kernels for the algebra between them.

The contract and the formulas stand in `wsbcn_mm.backends.ops`, the launches in `launch`.

A tile is BLOCK_C channels by BLOCK_L positions of one sample, whose fast axis is the one that is
contiguous in memory: [C, L] for x (N, C, L), [L, C] for channels_last, x (N, L, C). A program of a
pass owns one block of channels and one chunk, ``tiles`` tiles, of their positions; K chunks make a
row. What a chunk finds is written once, to its own place, and merged in a fixed order: there are no
atomics, and a result depends on the shape alone.

Means and variances are accumulated around a value of the data, never as E[x^2] - E[x]^2. Offsets
are 64 bits wide where they can outgrow 32. ACC, the accumulation dtype, is that of the statistics.
"""

import triton
import triton.language as tl

# A size that is 1 or divisible by 16 must not compile a kernel anew: images come in every size.
_SIZES = (
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
    'momentum',
    'eps',
)


# ----------------------------------------------------------------------------------------------
# Shared pieces


@triton.jit
def _number(bits, dtype: tl.constexpr):
    """A Python float, which comes as its 64 bits because Triton would pass it as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def _load(pointer, index, mask, otherwise: tl.constexpr, dtype: tl.constexpr):
    """Values of a tensor, or `otherwise` where the tensor is None."""
    if pointer is None:
        values = tl.full(index.shape, otherwise, dtype)
    else:
        values = tl.load(pointer + index, mask, other=otherwise).to(dtype)
    return values


@triton.jit
def _channels_of_program(channels, BLOCK_C: tl.constexpr):
    """The sample and the channels that axis 0 of the grid gives to this program."""
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return n, c.to(tl.int64)


@triton.jit
def _positions_of_program(length, tiles, BLOCK_L: tl.constexpr):
    """First and last position (exclusive) of the chunk that axis 1 gives to this program."""
    size = tiles.to(tl.int64) * BLOCK_L
    first = tl.program_id(1) * size
    return first, tl.minimum(first + size, length)


@triton.jit
def _offsets(n, c, positions, channels, length, CHANNELS_LAST: tl.constexpr):
    """Where a tile lies in x, from broadcastable channels and positions."""
    sample = n * channels * length
    if CHANNELS_LAST:
        offsets = sample + positions * channels + c
    else:
        offsets = sample + c * length + positions
    return offsets


@triton.jit
def _multiple(size, VECTOR: tl.constexpr):
    """`size`, which VECTOR divides: tells the compiler that rows start where a vector may."""
    return size // VECTOR * VECTOR


@triton.jit
def _welford(value, mask, seen, mean, squares):
    """One more value for the mean and the sum of squared deviations of every lane (Welford)."""
    delta = tl.where(mask, value - mean, 0.0)
    mean += delta * (1.0 / seen)
    return mean, squares + delta * (value - mean)


@triton.jit
def _lane_counts(lane, first, last, BLOCK: tl.constexpr):
    """How many values a lane sees when tiles of BLOCK cover [first, last)."""
    return (last - first - lane + BLOCK - 1) // BLOCK


@triton.jit
def _union(index, count, mean, squares, AXIS: tl.constexpr):
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
def _merged_moments(
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
    return _union(k, count, mean, squares, 1)


@triton.jit
def _merged_sums(sums, row, mask, splits, BLOCK_K: tl.constexpr):
    """Sums of the rows `row` (R,) from those of their chunks (N, C, K)."""
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = mask[:, None] & (k < splits)
    return tl.sum(tl.load(sums + row[:, None] * splits + k, inside, other=0.0), 1)


@triton.jit
def _rows_of_group(i, first, last, channels, width):
    """Row number and mask of entry `i` of the (samples first..last, width) rows of a group."""
    c = tl.program_id(0) * width + i % width
    row = (first + i // width).to(tl.int64) * channels + c
    return row, i < (last - first) * width


@triton.jit
def _block_of_group(start, channels, width, n, n_inside, BLOCK_C: tl.constexpr):
    """Channels `start`.. of a group: numbers (C,) and mask, rows [N, C] and mask."""
    i = start + tl.arange(0, BLOCK_C)
    c = tl.program_id(0) * width + i
    row = n[:, None].to(tl.int64) * channels + c[None, :]
    return c, i < width, row, n_inside[:, None] & (i < width)[None, :]


@triton.jit
def _stage_1(m, mean, var, batch_weight, batch_bias, c, inside, row, mask, eps):
    """Stage 1, x1 = gain (x - mean) + batch_bias.

    1 / std and gain (C,); m - mean and the row means of x1 [N, C].
    """
    ACC: tl.constexpr = m.dtype.element_ty
    inv_std = 1.0 / tl.sqrt(tl.load(var + c, inside, other=1.0) + eps)
    gain = inv_std * _load(batch_weight, c, inside, 1.0, ACC)
    centred = tl.load(m + row, mask, other=0.0) - tl.load(mean + c, inside, other=0.0)[None, :]
    t = gain[None, :] * centred + _load(batch_bias, c, inside, 0.0, ACC)[None, :]
    return inv_std, gain, centred, t


# ----------------------------------------------------------------------------------------------
# Batch-Channel Normalization, forward


@triton.jit(do_not_specialize=_SIZES)
def moments(
    x,  # (N, C, L)
    means,  # (N, C, K), of the chunks
    variances,  # (N, C, K)
    channels,
    length,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Mean and biased variance of every chunk: one read of x."""
    ACC: tl.constexpr = means.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1  # of the positions
    if CHANNELS_LAST:
        channels = _multiple(channels, VECTOR)
    else:
        length = _multiple(length, VECTOR)
    n, channel = _channels_of_program(channels, BLOCK_C)
    first, last = _positions_of_program(length, tiles, BLOCK_L)
    c = tl.expand_dims(channel, AXIS)
    lane = tl.expand_dims(tl.arange(0, BLOCK_L), 1 - AXIS)

    mean = tl.zeros((c + lane).shape, ACC)
    squares = tl.zeros((c + lane).shape, ACC)
    seen = tl.zeros([1, 1], ACC)
    for start in range(first, last, BLOCK_L):
        positions = start + lane
        mask = (c < channels) & (positions < length)
        place = _offsets(n, c, positions, channels, length, CHANNELS_LAST)
        value = tl.load(x + place, mask, other=0.0).to(ACC)
        seen += 1.0
        mean, squares = _welford(value, mask, seen, mean, squares)

    count = _lane_counts(lane, first, last, BLOCK_L).to(ACC)
    chunk_mean, chunk_variance = _union(lane, count, mean, squares, AXIS)
    place = (n * channels + channel) * tl.num_programs(1) + tl.program_id(1)
    tl.store(means + place, chunk_mean, channel < channels)
    tl.store(variances + place, chunk_variance, channel < channels)


@triton.jit(do_not_specialize=_SIZES)
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
    mean, variance = _merged_moments(
        means, variances, row, mask, length, tiles, splits, BLOCK_L, BLOCK_K, ACC
    )
    tl.store(m + row, mean, mask)
    tl.store(q + row, variance, mask)


@triton.jit(do_not_specialize=_SIZES)
def forward_algebra(
    means,  # (N, C, K), of the chunks; None: m and q are there
    variances,  # (N, C, K)
    m,  # (N, C)
    q,  # (N, C)
    running_mean,  # (C,); None: mean and var are there
    running_var,  # (C,)
    rate,  # (); None: momentum
    counts,  # (2, C), int64, or None
    mean,  # (C,)
    var,  # (C,)
    batch_weight,  # (C,) or None
    batch_bias,  # (C,) or None
    weight,  # (C / weight_repeat,) or None
    bias,  # (C / bias_repeat,) or None
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
    weight_repeat,
    bias_repeat,
    momentum,
    eps,
    UPDATE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All statistics and the coefficients of y, for one group and a share of the samples.

    With UPDATE the share must be all samples: the estimates need them, and are written in place.
    Otherwise programs that share a group write the same mean and var.
    """
    ACC: tl.constexpr = m.dtype.element_ty
    g = tl.program_id(0)
    width = channels // groups
    share = tl.cdiv(samples, tl.num_programs(1))
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, samples)
    eps = _number(eps, ACC)

    if means is not None:
        for start in range(0, (last - first) * width, BLOCK_R):
            row, inside = _rows_of_group(
                start + tl.arange(0, BLOCK_R), first, last, channels, width
            )
            row_mean, row_variance = _merged_moments(
                means, variances, row, inside, length, tiles, splits, BLOCK_L, BLOCK_K, ACC
            )
            tl.store(m + row, row_mean, inside)
            tl.store(q + row, row_variance, inside)
        tl.debug_barrier()  # other threads of this program read them

    if running_mean is not None:
        for start in range(0, width, BLOCK_C):
            i = start + tl.arange(0, BLOCK_C)
            c = g * width + i
            mean_place = running_mean + c.to(tl.int64) * running_mean_stride
            var_place = running_var + c.to(tl.int64) * running_var_stride
            new_mean = tl.load(mean_place, i < width, other=0.0).to(ACC)
            new_var = tl.load(var_place, i < width, other=0.0).to(ACC)
            if UPDATE:
                if rate is None:
                    r = _number(momentum, ACC)
                else:
                    r = tl.load(rate).to(ACC)
                sum_off = tl.zeros([BLOCK_C], ACC)
                sum_squares = tl.zeros([BLOCK_C], ACC)
                for s in range(0, samples, BLOCK_N):
                    n = s + tl.arange(0, BLOCK_N)
                    _, _, row, mask = _block_of_group(
                        start, channels, width, n, n < samples, BLOCK_C
                    )
                    off = tl.load(m + row, mask, other=0.0) - new_mean[None, :]
                    off = tl.where(mask, off, 0.0)
                    sum_off += tl.sum(off, 0)
                    sum_squares += tl.sum(off * off + tl.load(q + row, mask, other=0.0), 0)
                batch_mean = new_mean + sum_off / samples
                old_mean, old_var = new_mean, new_var
                new_mean = (1.0 - r) * old_mean + r * batch_mean
                new_var = (1.0 - r) * old_var + r * (sum_squares / samples)  # around the old mean
                # In the dtype of the buffers; false for NaN.
                stored_mean = new_mean.to(running_mean.dtype.element_ty).to(ACC)
                stored_var = new_var.to(running_var.dtype.element_ty).to(ACC)
                finite = (tl.abs(stored_mean) < float('inf')) & (tl.abs(stored_var) < float('inf'))
                new_mean = tl.where(finite, new_mean, old_mean)
                new_var = tl.where(finite, new_var, old_var)
                if counts is not None:
                    count = counts + tl.where(finite, c, channels + c)
                    more = tl.where(finite, samples, 1)
                    tl.store(count, tl.load(count, i < width, other=0) + more, i < width)
                tl.debug_barrier()  # all threads have read what is written now
                tl.store(mean_place, new_mean.to(running_mean.dtype.element_ty), i < width)
                tl.store(var_place, new_var.to(running_var.dtype.element_ty), i < width)
            tl.store(mean + c, new_mean, i < width)
            tl.store(var + c, new_var, i < width)
        tl.debug_barrier()

    for s in range(first, last, BLOCK_N):
        n = s + tl.arange(0, BLOCK_N)
        n_inside = n < last
        sum_t = tl.zeros([BLOCK_N], ACC)
        for start in range(0, width, BLOCK_C):
            c, inside, row, mask = _block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            _, _, _, t = _stage_1(m, mean, var, batch_weight, batch_bias, c, inside, row, mask, eps)
            sum_t += tl.sum(tl.where(mask, t, 0.0), 1)
        centre = sum_t / width
        sum_squares = tl.zeros([BLOCK_N], ACC)
        for start in range(0, width, BLOCK_C):
            c, inside, row, mask = _block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            _, gain, _, t = _stage_1(
                m, mean, var, batch_weight, batch_bias, c, inside, row, mask, eps
            )
            off = t - centre[:, None]
            within = (gain * gain)[None, :] * tl.load(q + row, mask, other=0.0)
            sum_squares += tl.sum(tl.where(mask, within + off * off, 0.0), 1)
        inverse = 1.0 / tl.sqrt(sum_squares / width + eps)
        place = n.to(tl.int64) * groups + g
        tl.store(group_mean + place, centre, n_inside)
        tl.store(inv_group_std + place, inverse, n_inside)
        for start in range(0, width, BLOCK_C):
            c, inside, row, mask = _block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            _, gain, _, t = _stage_1(
                m, mean, var, batch_weight, batch_bias, c, inside, row, mask, eps
            )
            outer = _load(weight, c // weight_repeat, inside, 1.0, ACC)
            offset = _load(bias, c // bias_repeat, inside, 0.0, ACC)
            slope = outer[None, :] * inverse[:, None]
            tl.store(scale + row, slope * gain[None, :], mask)
            tl.store(shift + row, slope * (t - centre[:, None]) + offset[None, :], mask)


@triton.jit(do_not_specialize=_SIZES)
def forward_apply(
    x,  # (N, C, L)
    y,  # (N, C, L)
    m,  # (N, C)
    scale,  # (N, C)
    shift,  # (N, C)
    channels,
    length,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The last pass, y = scale (x - m) + shift: one read, one write."""
    ACC: tl.constexpr = m.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    if CHANNELS_LAST:
        channels = _multiple(channels, VECTOR)
    else:
        length = _multiple(length, VECTOR)
    n, channel = _channels_of_program(channels, BLOCK_C)
    first, last = _positions_of_program(length, tiles, BLOCK_L)
    c = tl.expand_dims(channel, AXIS)
    lane = tl.expand_dims(tl.arange(0, BLOCK_L), 1 - AXIS)

    row = n * channels + c
    centre = tl.load(m + row, c < channels, other=0.0)
    slope = tl.load(scale + row, c < channels, other=0.0)
    offset = tl.load(shift + row, c < channels, other=0.0)
    for start in range(first, last, BLOCK_L):
        positions = start + lane
        mask = (c < channels) & (positions < length)
        place = _offsets(n, c, positions, channels, length, CHANNELS_LAST)
        value = tl.load(x + place, mask, other=0.0).to(ACC)
        tl.store(y + place, ((value - centre) * slope + offset).to(y.dtype.element_ty), mask)


# ----------------------------------------------------------------------------------------------
# Batch-Channel Normalization, backward


@triton.jit(do_not_specialize=_SIZES)
def backward_sums(
    grad,  # (N, C, L)
    x,  # (N, C, L)
    m,  # (N, C)
    sums_g,  # (N, C, K), of the chunks
    sums_gx,  # (N, C, K)
    channels,
    length,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Sums of grad and grad (x - m) over every chunk: one read of each."""
    ACC: tl.constexpr = m.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    if CHANNELS_LAST:
        channels = _multiple(channels, VECTOR)
    else:
        length = _multiple(length, VECTOR)
    n, channel = _channels_of_program(channels, BLOCK_C)
    first, last = _positions_of_program(length, tiles, BLOCK_L)
    c = tl.expand_dims(channel, AXIS)
    lane = tl.expand_dims(tl.arange(0, BLOCK_L), 1 - AXIS)

    centre = tl.load(m + n * channels + c, c < channels, other=0.0)
    sum_g = tl.zeros((c + lane).shape, ACC)
    sum_gx = tl.zeros((c + lane).shape, ACC)
    for start in range(first, last, BLOCK_L):
        positions = start + lane
        mask = (c < channels) & (positions < length)
        place = _offsets(n, c, positions, channels, length, CHANNELS_LAST)
        g = tl.load(grad + place, mask, other=0.0).to(ACC)
        value = tl.load(x + place, mask, other=0.0).to(ACC)
        sum_g += g
        sum_gx += g * (value - centre)  # 0 outside: g is

    place = (n * channels + channel) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_g + place, tl.sum(sum_g, AXIS), channel < channels)
    tl.store(sums_gx + place, tl.sum(sum_gx, AXIS), channel < channels)


@triton.jit(do_not_specialize=_SIZES)
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
    weight,  # (C / weight_repeat,) or None
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
    weight_repeat,
    eps,
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
    eps = _number(eps, ACC)
    positions = length.to(ACC)

    if sums_g is not None:
        for start in range(0, samples * width, BLOCK_R):
            row, inside = _rows_of_group(start + tl.arange(0, BLOCK_R), 0, samples, channels, width)
            tl.store(sum_g + row, _merged_sums(sums_g, row, inside, splits, BLOCK_K), inside)
            tl.store(sum_gx + row, _merged_sums(sums_gx, row, inside, splits, BLOCK_K), inside)
        tl.debug_barrier()  # other threads of this program read them

    # dx1 = s (h - mean(h) - z mean(h z)), the means over the group.
    for start_n in range(0, samples, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        n_inside = n < samples
        place = n.to(tl.int64) * groups + g
        centre = tl.load(group_mean + place, n_inside, other=0.0)[:, None]
        s = tl.load(inv_group_std + place, n_inside, other=0.0)[:, None]
        sum_h = tl.zeros([BLOCK_N], ACC)
        sum_hz = tl.zeros([BLOCK_N], ACC)
        for start in range(0, width, BLOCK_C):
            c, inside, row, mask = _block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            _, gain, _, t = _stage_1(
                m, mean, var, batch_weight, batch_bias, c, inside, row, mask, eps
            )
            outer = _load(weight, c // weight_repeat, inside, 1.0, ACC)[None, :]
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
            c, inside, row, mask = _block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            _, gain, centred, t = _stage_1(
                m, mean, var, batch_weight, batch_bias, c, inside, row, mask, eps
            )
            t -= tl.load(group_mean + place, n_inside, other=0.0)[:, None]
            outer = _load(weight, c // weight_repeat, inside, 1.0, ACC)[None, :]
            row_g = tl.load(sum_g + row, mask, other=0.0)
            row_gx = tl.load(sum_gx + row, mask, other=0.0)
            row_q = tl.load(q + row, mask, other=0.0)
            row_x1 = s * (outer * row_g - positions * (h + s * hz * t))
            row_x1_x = s * (outer * row_gx - s * hz * gain[None, :] * positions * row_q)
            row_x1_x += centred * row_x1
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
            c, inside, row, mask = _block_of_group(start, channels, width, n, n_inside, BLOCK_C)
            _, gain, centred, t = _stage_1(
                m, mean, var, batch_weight, batch_bias, c, inside, row, mask, eps
            )
            t -= tl.load(group_mean + place, n_inside, other=0.0)[:, None]
            outer = _load(weight, c // weight_repeat, inside, 1.0, ACC)[None, :]
            gain_s = gain[None, :] * s
            slope = -gain_s * gain_s * hz
            offset = -gain_s * (h + s * hz * t)
            if THROUGH_STATISTICS:  # BatchNorm's own two terms
                values = samples * positions
                towards_var = (gain * inv_std * sum_x1_x / values)[None, :]
                slope -= towards_var
                offset -= (gain * sum_x1 / values)[None, :] + towards_var * centred
            tl.store(to_grad + row, gain_s * outer, mask)
            tl.store(to_x + row, slope, mask)
            tl.store(constant + row, offset, mask)

    if grad_weight is not None and not PER_CHANNEL:
        tl.store(grad_weight + g, group_sum_gz)
        tl.store(grad_bias + g, group_sum_g)


@triton.jit(do_not_specialize=_SIZES)
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
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The last pass, dx = to_grad grad + to_x (x - m) + constant: two reads, one write."""
    ACC: tl.constexpr = m.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    if CHANNELS_LAST:
        channels = _multiple(channels, VECTOR)
    else:
        length = _multiple(length, VECTOR)
    n, channel = _channels_of_program(channels, BLOCK_C)
    first, last = _positions_of_program(length, tiles, BLOCK_L)
    c = tl.expand_dims(channel, AXIS)
    lane = tl.expand_dims(tl.arange(0, BLOCK_L), 1 - AXIS)

    row = n * channels + c
    centre = tl.load(m + row, c < channels, other=0.0)
    slope_g = tl.load(to_grad + row, c < channels, other=0.0)
    slope_x = tl.load(to_x + row, c < channels, other=0.0)
    offset = tl.load(constant + row, c < channels, other=0.0)
    for start in range(first, last, BLOCK_L):
        positions = start + lane
        mask = (c < channels) & (positions < length)
        place = _offsets(n, c, positions, channels, length, CHANNELS_LAST)
        g = tl.load(grad + place, mask, other=0.0).to(ACC)
        value = tl.load(x + place, mask, other=0.0).to(ACC)
        result = slope_g * g + (slope_x * (value - centre) + offset)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask)


# ----------------------------------------------------------------------------------------------
# Weight Standardization


@triton.jit
def _denominator(sigma, eps, FORMULA: tl.constexpr):
    if FORMULA == 'std_eps':
        denominator = sigma + eps
    else:
        denominator = sigma
    return denominator


@triton.jit
def _freedom(length, FORMULA: tl.constexpr):
    """By what the sum of squares is divided."""
    if FORMULA == 'paper':
        freedom = length
    else:
        freedom = length - 1
    return freedom


@triton.jit(do_not_specialize=_SIZES)
def standardize(
    weight,  # (O, L)
    w_hat,  # (O, L)
    mean,  # (O,)
    sigma,  # (O,)
    length,
    eps,
    FORMULA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One output channel per program; the second read comes from the cache."""
    ACC: tl.constexpr = mean.dtype.element_ty
    length = _multiple(length, VECTOR)
    o = tl.program_id(0).to(tl.int64)
    eps = _number(eps, ACC)
    lane = tl.arange(0, BLOCK)

    lane_mean = tl.zeros([BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    seen = tl.zeros([1], ACC)
    for start in range(0, length, BLOCK):
        mask = start + lane < length
        value = tl.load(weight + o * length + start + lane, mask, other=0.0).to(ACC)
        seen += 1.0
        lane_mean, squares = _welford(value, mask, seen, lane_mean, squares)
    count = _lane_counts(lane, 0, length, BLOCK).to(ACC)
    centre, variance = _union(lane, count, lane_mean, squares, 0)
    variance *= length.to(ACC) / _freedom(length, FORMULA).to(ACC)
    if FORMULA == 'std_eps':
        deviation = tl.sqrt(variance)
    else:
        deviation = tl.sqrt(variance + eps)
    tl.store(mean + o, centre)
    tl.store(sigma + o, deviation)

    factor = 1.0 / _denominator(deviation, eps, FORMULA)
    for start in range(0, length, BLOCK):
        mask = start + lane < length
        place = o * length + start + lane
        value = tl.load(weight + place, mask, other=0.0).to(ACC)
        tl.store(w_hat + place, ((value - centre) * factor).to(w_hat.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_SIZES)
def standardize_backward(
    grad,  # (O, L)
    weight,  # (O, L)
    dw,  # (O, L)
    mean,  # (O,)
    sigma,  # (O,)
    length,
    eps,
    FORMULA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One output channel per program; the second reads come from the cache."""
    ACC: tl.constexpr = mean.dtype.element_ty
    length = _multiple(length, VECTOR)
    o = tl.program_id(0).to(tl.int64)
    centre = tl.load(mean + o)
    deviation = tl.load(sigma + o)
    denominator = _denominator(deviation, _number(eps, ACC), FORMULA)
    lane = tl.arange(0, BLOCK)

    sum_g = tl.zeros([BLOCK], ACC)
    sum_gw = tl.zeros([BLOCK], ACC)
    for start in range(0, length, BLOCK):
        mask = start + lane < length
        place = o * length + start + lane
        g = tl.load(grad + place, mask, other=0.0).to(ACC)
        value = tl.load(weight + place, mask, other=0.0).to(ACC)
        sum_g += g
        sum_gw += g * (value - centre)  # 0 outside: g is
    mean_g = tl.sum(sum_g, 0) / length.to(ACC)
    freedom = _freedom(length, FORMULA).to(ACC)
    k = 1.0 / (freedom * deviation * denominator * denominator)
    k = tl.where(deviation > 0, k, 0.0)  # a constant row's standard deviation has no gradient
    slope = k * tl.sum(sum_gw, 0)

    for start in range(0, length, BLOCK):
        mask = start + lane < length
        place = o * length + start + lane
        g = tl.load(grad + place, mask, other=0.0).to(ACC)
        value = tl.load(weight + place, mask, other=0.0).to(ACC)
        result = (g - mean_g) / denominator - slope * (value - centre)
        tl.store(dw + place, result.to(dw.dtype.element_ty), mask)
