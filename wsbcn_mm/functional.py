"""The two operations as functions: check the arguments, then call the implementation."""

import torch
from torch import Tensor

from wsbcn_mm.backends import autograd
from wsbcn_mm.backends.carriers import Affine, Running
from wsbcn_mm.checks import (
    FORMULAS,
    MODES,
    check_choice,
    check_eps,
    check_fan_in,
    check_floating,
    check_groups,
    checked_rate,
)


def weight_standardize(
    weight: Tensor, eps: float = 1e-5, formula: str = 'paper', dtype: torch.dtype | None = None
) -> Tensor:
    """Standardizes every output channel of a convolution weight over its fan-in.

    ``w_hat[o] = (w[o] - mean(w[o])) / d[o]`` with the mean over the fan-in ``n = I * prod(k)``:

    =========== ============================ ====================================================
    formula     d                            source
    =========== ============================ ====================================================
    ``paper``   sqrt(var_biased + eps)       arXiv 1903.10520 v2, equations 5-7
    ``std_eps`` std_unbiased + eps           the authors' WS code, mmcv ConvWS, GN+WS checkpoints
    ``var_eps`` sqrt(var_unbiased + eps)     the authors' BCN code, BCN+WS checkpoints
    =========== ============================ ====================================================

    Gradients flow through mean and d. There is no difference between training and evaluation.

    Args:
        weight: (O, I, *k), the output channel first; n >= 2. Floating point; float16 and bfloat16
            are computed in float32 and rounded once.
        eps: Added in the denominator where the formula says; >= 0.
        formula: ``'paper'``, ``'std_eps'`` or ``'var_eps'``. A checkpoint fixes one of them.
        dtype: Of the result; None: that of ``weight``. Under autocast the layers ask for the dtype
            in which the convolution runs, which saves a cast.

    Returns:
        The standardized weight, with the shape of ``weight``. Differentiable twice.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: fewer than 2 axes, a fan-in below 2, a negative eps, an unknown formula.

    Examples:
        >>> w_hat = weight_standardize(torch.randn(8, 4, 3, 3))
        >>> bool(w_hat.mean((1, 2, 3)).abs().max() < 1e-6)
        True
    """
    check_floating(weight, 'weight')
    if weight.dim() < 2:
        raise ValueError(
            'weight must have at least 2 axes (out_channels, in_channels, *kernel_size)\n'
            f'  got shape {tuple(weight.shape)}'
        )
    check_eps(eps)
    check_choice(formula, FORMULAS, 'formula')
    if weight.size(0) > 0:
        check_fan_in(weight[0].numel())
    return autograd.weight_standardize(weight, eps, formula, dtype or weight.dtype)


def batch_channel_norm(
    input: Tensor,
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
) -> Tensor:
    """Batch-Channel Normalization (arXiv 1911.09738, equations 13-15).

    Stage 1, per channel c: ``x1 = batch_weight (x - mu) / sqrt(var + eps) + batch_bias``.
    Stage 2, per sample n and group g: ``y = weight (x1 - m) / sqrt(v + eps) + bias``, with m and v
    the mean and biased variance of x1 over the group's channels and all positions; always those of
    the sample itself. What mu and var are:

    - ``training=True, mode='estimate'`` (micro-batches): the running estimates, **updated first**
      with this input, ``mu <- (1 - r) mu + r mean(x)`` and
      ``var <- (1 - r) var + r mean((x - mu_old)^2)``, r = ``momentum``; no gradient flows through
      them.
    - ``training=True, mode='batch'`` (large batches): mean and biased variance of this input, with
      gradient. The running buffers are updated as in BatchNorm (unbiased variance). One value per
      channel has no variance: then the running statistics are used and left alone.
    - ``training=False``: the running statistics, left alone.

    A channel whose new running statistics would not be finite keeps them (ours).

    It updates as often as it is called, as `torch.nn.functional.batch_norm` does: where activation
    checkpointing (or torch.compile with ``activation_memory_budget`` below 1) runs it again, it
    updates again, and in estimate mode the gradient is that of the second run. The layers know
    which run they repeat.

    Args:
        input: (N, C, *), floating point, any memory format (kept). N = 0 gives an empty result and
            touches nothing.
        num_groups: G, divides C.
        running_mean: (C,), updated in place.
        running_var: (C,), updated in place.
        batch_weight: (C,), stage 1. None: 1.
        batch_bias: (C,), stage 1. None: 0.
        weight: (G,) as in the paper, or (C,); stage 2. None: 1.
        bias: (G,) or (C,), stage 2. None: 0.
        training: Whether to update and which statistics to use; see above.
        mode: ``'estimate'`` or ``'batch'``.
        momentum: The rate r in [0, 1], or a 0-d tensor.
        eps: Added to both variances, >= 0.

    Returns:
        A new tensor with shape, dtype and memory format of ``input``. float16 and bfloat16 are
        computed in float32; the result does not become float32 under autocast. Differentiable
        twice.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape, the number of groups, mode, momentum or eps does not fit.
    """
    check_floating(input, 'input')
    if input.dim() < 2:
        raise ValueError(
            'input must have at least 2 axes (N, num_channels, ...)\n'
            f'  got shape {tuple(input.shape)}'
        )
    num_channels = input.size(1)
    check_groups(num_channels, num_groups)
    num_groups = int(num_groups)
    for name, value in (
        ('running_mean', running_mean),
        ('running_var', running_var),
        ('batch_weight', batch_weight),
        ('batch_bias', batch_bias),
    ):
        if value is None and name.startswith('batch'):
            continue
        if not isinstance(value, Tensor) or value.shape != (num_channels,):
            actual = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f'{name} must have shape ({num_channels},), one value per channel of the input\n'
                f'  got {actual} for an input of shape {tuple(input.shape)}'
            )
    for name, value in (('weight', weight), ('bias', bias)):
        if value is not None and value.shape not in ((num_groups,), (num_channels,)):
            raise ValueError(
                f'{name} must have shape ({num_groups},), one value per group, or '
                f'({num_channels},), one per channel\n  got {tuple(value.shape)}'
            )
    check_choice(mode, MODES, 'mode')
    momentum = checked_rate(momentum)
    check_eps(eps)
    # From here on the momentum is called rate, and there is none where nothing is updated.
    rate = momentum if training else None
    running = Running(running_mean, running_var)
    affine = Affine(batch_weight, batch_bias, weight, bias)
    return autograd.batch_channel_norm(input, num_groups, running, affine, rate, eps, mode)


__all__ = ['FORMULAS', 'MODES', 'batch_channel_norm', 'weight_standardize']
