"""Stage 1 and its statistics, the running ones included, for the group of a program."""

import triton
import triton.language as tl

from wsbcn_mm.backends.triton.jit.tiles import block_of_group, load_or, number


@triton.jit
def parameters_of_stage_1(mean, var, batch_weight, batch_bias, c, inside, eps):
    """Stage 1, x1 = gain (x - mean) + shift: 1 / std, gain, mean and shift of the channels c."""
    ACC: tl.constexpr = mean.dtype.element_ty
    inv_std = 1.0 / tl.sqrt(tl.load(var + c, inside, other=1.0) + eps)
    gain = inv_std * load_or(batch_weight, c, inside, 1.0, ACC)
    shift = load_or(batch_bias, c, inside, 0.0, ACC)
    return inv_std, gain, tl.load(mean + c, inside, other=0.0), shift


@triton.jit
def stage_1(row_mean, mean, var, batch_weight, batch_bias, c, inside, eps):
    """Stage 1 of rows with the means `row_mean` [N, C].

    1 / std and gain (C,); row_mean - mean and the row means of x1 [N, C].
    """
    inv_std, gain, channel_mean, shift = parameters_of_stage_1(
        mean, var, batch_weight, batch_bias, c, inside, eps
    )
    centred = row_mean - channel_mean[None, :]
    return inv_std, gain, centred, gain[None, :] * centred + shift[None, :]


@triton.jit
def moments_over_samples(
    m, q, around, start, samples, channels, width, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The mean of x and its second moment around `around` (C,), for channels `start`.. of a group.

    From the moments of the rows, each of which has the same weight.
    """
    sum_off = tl.zeros_like(around)
    sum_squares = tl.zeros_like(around)
    for s in range(0, samples, BLOCK_N):
        n = s + tl.arange(0, BLOCK_N)
        _, _, row, mask = block_of_group(start, channels, width, n, n < samples, BLOCK_C)
        off = tl.load(m + row, mask, other=0.0) - around[None, :]
        off = tl.where(mask, off, 0.0)
        sum_off += tl.sum(off, 0)
        sum_squares += tl.sum(off * off + tl.load(q + row, mask, other=0.0), 0)
    return around + sum_off / samples, sum_squares / samples


@triton.jit
def channel_statistics(
    m,  # (N, C)
    q,  # (N, C)
    running_mean,  # (C,)
    running_var,  # (C,)
    rate_tensor,  # (); None: rate
    counts,  # (2, C), int64, or None
    num_batches_tracked,  # (), int64, or None
    mean,  # (C,), written
    var,  # (C,), written
    samples,
    channels,
    groups,
    length,
    running_mean_stride,
    running_var_stride,
    rate,
    STATISTICS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The statistics of stage 1, of one group.

    STATISTICS 'running': the running ones, as they are. 'estimate': the same, updated before.
    'batch': those of x, towards which the running ones move. An update needs all samples.
    """
    ACC: tl.constexpr = mean.dtype.element_ty
    width = channels // groups
    if STATISTICS != 'running' and num_batches_tracked is not None:  # noqa: SIM102  when compiled
        # An update has one program for each group. Not a mask: Triton 3.2's interpreter does not
        # look at one of a single value.
        if tl.program_id(0) == 0:
            tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1)
    for start in range(0, width, BLOCK_C):
        i = start + tl.arange(0, BLOCK_C)
        inside = i < width
        c = tl.program_id(0) * width + i
        mean_place = running_mean + c.to(tl.int64) * running_mean_stride
        var_place = running_var + c.to(tl.int64) * running_var_stride
        old_mean = tl.load(mean_place, inside, other=0.0).to(ACC)
        old_var = tl.load(var_place, inside, other=0.0).to(ACC)
        if STATISTICS == 'running':
            used_mean, used_var = old_mean, old_var
        else:
            if rate_tensor is None:
                r = number(rate, ACC)
            else:
                r = tl.load(rate_tensor).to(ACC)
            if STATISTICS == 'estimate':
                batch_mean, batch_var = moments_over_samples(
                    m, q, old_mean, start, samples, channels, width, BLOCK_N, BLOCK_C
                )
            else:
                around = tl.load(m + c, inside, other=0.0)  # of the first sample
                batch_mean, _ = moments_over_samples(
                    m, q, around, start, samples, channels, width, BLOCK_N, BLOCK_C
                )
                _, used_var = moments_over_samples(
                    m, q, batch_mean, start, samples, channels, width, BLOCK_N, BLOCK_C
                )
                used_mean = batch_mean
                values = samples.to(ACC) * length.to(ACC)
                batch_var = used_var * (values / (values - 1.0))  # unbiased, as BatchNorm has it
            new_mean = (1.0 - r) * old_mean + r * batch_mean
            new_var = (1.0 - r) * old_var + r * batch_var
            # In the dtype of the buffers; false for NaN.
            stored_mean = new_mean.to(running_mean.dtype.element_ty).to(ACC)
            stored_var = new_var.to(running_var.dtype.element_ty).to(ACC)
            finite = (tl.abs(stored_mean) < float('inf')) & (tl.abs(stored_var) < float('inf'))
            new_mean = tl.where(finite, new_mean, old_mean)
            new_var = tl.where(finite, new_var, old_var)
            if counts is not None:
                count = counts + tl.where(finite, c, channels + c)
                more = tl.where(finite, samples, 1)
                tl.store(count, tl.load(count, inside, other=0) + more, inside)
            tl.debug_barrier()  # all threads have read what is written now
            tl.store(mean_place, new_mean.to(running_mean.dtype.element_ty), inside)
            tl.store(var_place, new_var.to(running_var.dtype.element_ty), inside)
            if STATISTICS == 'estimate':
                used_mean, used_var = new_mean, new_var
        tl.store(mean + c, used_mean, inside)
        tl.store(var + c, used_var, inside)
    tl.debug_barrier()  # other threads of this program read them
