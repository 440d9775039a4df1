"""The specification: Weight Standardization and Batch-Channel Normalization in plain torch.

Papers: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization" (arXiv 1903.10520, equations 5-7) and "Rethinking Normalization and
Elimination Singularity in Neural Networks" (arXiv 1911.09738, equations 13-15). The estimate mode
follows the authors' released code.

Every other implementation in this package is judged against this file. Nothing here is fast, checks
its arguments or changes them in place; every dtype is computed as it comes, so give it float64.
Shapes: ``x`` is (N, C, *), ``C = num_channels``, ``G = num_groups``, ``*`` any number of axes.
"""

from torch import Tensor


def weight_standardize(weight: Tensor, eps: float = 1e-5, formula: str = 'paper') -> Tensor:
    """Standardizes every output channel of a weight (O, I, *k) over its fan-in ``n = I * prod(k)``.

    ``w_hat = (w - mean) / d`` with ``d``, by ``formula``:

    - ``'paper'``: ``sqrt(var_biased + eps)`` (1903.10520, eq. 7);
    - ``'std_eps'``: ``std_unbiased + eps`` (the authors' WS repository, mmcv's ConvWS);
    - ``'var_eps'``: ``sqrt(var_unbiased + eps)`` (the authors' BCN repository).
    """
    w = weight.flatten(1)
    w = w - w.mean(1, keepdim=True)
    if formula == 'paper':
        denominator = (w.square().mean(1, keepdim=True) + eps).sqrt()
    elif formula == 'std_eps':
        denominator = w.std(1, keepdim=True, unbiased=True) + eps
    elif formula == 'var_eps':
        denominator = (w.square().sum(1, keepdim=True) / (w.size(1) - 1) + eps).sqrt()
    else:
        raise ValueError(f'unknown formula {formula!r}')
    return (w / denominator).view_as(weight)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over the batch and all positions: (C,), (C,)."""
    dims = [0, *range(2, x.dim())]
    return x.mean(dims), x.var(dims, unbiased=False)


def update_estimates(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float | Tensor,
    average: bool = False,
) -> tuple[Tensor, Tensor]:
    """The new estimates after one step of the estimate mode, without gradient.

    The second moment is taken around the **old** mean::

        m = mean(x);  v = mean((x - running_mean)^2)
        running_mean <- (1 - r) running_mean + r m;  running_var <- (1 - r) running_var + r v

    With ``average`` (ours; where the rate at step t is 1 / t) around the true one instead::

        v = mean((x - m)^2) + (1 - r) (m - running_mean)^2

    which makes ``running_var`` after t steps the variance of all t inputs together, each with the
    same weight (Welford), whatever the estimates were before. The first formula would add
    ``r^2 (m - running_mean)^2`` at each step: little at a small rate, everything at the first ones.

    A channel for which this gives a value that is not finite keeps its estimates (`keep_finite`).
    """
    x = x.detach()
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims)
    if average:
        own = (x - per_channel(mean, x)).square().mean(dims)
        var = own + (1 - momentum) * (mean - running_mean).square()
    else:
        var = (x - per_channel(running_mean, x)).square().mean(dims)
    new_mean = (1 - momentum) * running_mean + momentum * mean
    new_var = (1 - momentum) * running_var + momentum * var
    return keep_finite(new_mean, new_var, running_mean, running_var)


def keep_finite(
    new_mean: Tensor, new_var: Tensor, running_mean: Tensor, running_var: Tensor
) -> tuple[Tensor, Tensor]:
    """The new estimates of the channels in which both are finite, the old ones of the others.

    An overflow would otherwise stay in an average for ever. Ours; per channel, because a channel's
    estimates depend on nothing but its own values, and because it needs no look at the result.
    """
    finite = new_mean.isfinite() & new_var.isfinite()
    return new_mean.where(finite, running_mean), new_var.where(finite, running_var)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    num_groups: int,
    batch_weight: Tensor | None = None,
    batch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Both stages with given channel statistics (1911.09738, eq. 13-15).

    1. ``x1 = batch_weight[c] (x - mean[c]) / sqrt(var[c] + eps) + batch_bias[c]``
    2. ``y = weight[g] (x1 - m[n, g]) / sqrt(v[n, g] + eps) + bias[g]``, where ``m`` and ``v`` are
       the mean and biased variance of x1 over the sample n and the channels of group g.

    ``weight`` and ``bias`` are (G,) as in the paper, or (C,).
    """
    x1 = (x - per_channel(mean, x)) / per_channel((var + eps).sqrt(), x)
    if batch_weight is not None:
        x1 = x1 * per_channel(batch_weight, x)
    if batch_bias is not None:
        x1 = x1 + per_channel(batch_bias, x)
    groups = x1.reshape(x.size(0), num_groups, -1)
    groups = groups - groups.mean(2, keepdim=True)
    y = groups / (groups.square().mean(2, keepdim=True) + eps).sqrt()
    y = y.view_as(x)
    if weight is not None:
        y = y * per_channel(expand_groups(weight, x.size(1)), x)
    if bias is not None:
        y = y + per_channel(expand_groups(bias, x.size(1)), x)
    return y


def batch_channel_norm(
    x: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Tensor | None = None,
    batch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    mode: str = 'estimate',
    momentum: float | Tensor = 0.01,
    eps: float = 1e-5,
    average: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch-Channel Normalization: ``(y, new running_mean, new running_var)``.

    Training, ``'estimate'``: update the estimates, then normalise this same x with the new ones,
    as constants. Training, ``'batch'``: normalise with the statistics of x, which carry gradient;
    the running variance takes the unbiased variance, as in BatchNorm. Not training: normalise with
    the running statistics. ``average``: see `update_estimates`. A value that is not finite never
    enters a running statistic.
    """
    if not training:
        mean, var = running_mean, running_var
    elif mode == 'estimate':
        mean, var = update_estimates(x, running_mean, running_var, momentum, average)
        running_mean, running_var = mean, var
    elif mode == 'batch':
        mean, var = batch_statistics(x)
        count = x.numel() // x.size(1)
        unbiased = var.detach() * count / (count - 1)
        running_mean, running_var = keep_finite(
            (1 - momentum) * running_mean + momentum * mean.detach(),
            (1 - momentum) * running_var + momentum * unbiased,
            running_mean,
            running_var,
        )
    else:
        raise ValueError(f'unknown mode {mode!r}')
    y = normalize(x, mean, var, num_groups, batch_weight, batch_bias, weight, bias, eps)
    return y, running_mean, running_var


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast against x (N, C, *)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def expand_groups(values: Tensor, num_channels: int) -> Tensor:
    """(G,) to (C,): each group's value once per channel of the group; (C,) stays as it is."""
    return values.repeat_interleave(num_channels // values.numel())
