"""The operators of `ops` through torch's dispatcher: it finds the kernel for the device."""

import torch
from torch import Tensor

from wsbcn_mm.backends.carriers import Affine, AffineGradients, Rate, Running, Statistics, flat_rate


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`, as for everything here."""
    m, q = torch.ops.wsbcn_mm.row_moments.default(x)
    return m, q


def normalize_with_estimates(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    y, *statistics = torch.ops.wsbcn_mm.normalize_with_estimates.default(
        x, num_groups, *running, *affine, *flat_rate(rate), eps
    )
    return y, Statistics(*statistics)


def normalize_with_given(
    x: Tensor, num_groups: int, mean: Tensor, var: Tensor, affine: Affine, eps: float
) -> tuple[Tensor, Statistics]:
    y, *statistics = torch.ops.wsbcn_mm.normalize_with_given.default(
        x, num_groups, mean, var, *affine, eps
    )
    return y, Statistics(*statistics)


def normalize_with_batch(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    y, *statistics = torch.ops.wsbcn_mm.normalize_with_batch.default(
        x, num_groups, *running, *affine, *flat_rate(rate), eps
    )
    return y, Statistics(*statistics)


def evaluate(x: Tensor, num_groups: int, running: Running, affine: Affine, eps: float) -> Tensor:
    y: Tensor = torch.ops.wsbcn_mm.evaluate.default(x, num_groups, *running, *affine, eps)
    return y


def update_estimates(m: Tensor, q: Tensor, running: Running, rate: Rate) -> tuple[Tensor, Tensor]:
    mean, var = torch.ops.wsbcn_mm.update_estimates.default(m, q, *running, *flat_rate(rate))
    return mean, var


def normalize(
    x: Tensor,
    num_groups: int,
    m: Tensor,
    q: Tensor,
    mean: Tensor,
    var: Tensor,
    affine: Affine,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y, group_mean, inv_group_std = torch.ops.wsbcn_mm.normalize.default(
        x, num_groups, m, q, mean, var, *affine, eps
    )
    return y, group_mean, inv_group_std


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    through_statistics: bool,
) -> tuple[Tensor, AffineGradients]:
    grad_x, *gradients = torch.ops.wsbcn_mm.normalize_backward.default(
        grad, x, num_groups, *statistics, *affine, eps, through_statistics
    )
    return grad_x, AffineGradients(*gradients)


def standardize(
    weight: Tensor, eps: float, formula: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    w_hat, mean, sigma = torch.ops.wsbcn_mm.standardize.default(weight, eps, formula, dtype)
    return w_hat, mean, sigma


def standardize_backward(
    grad: Tensor, weight: Tensor, mean: Tensor, sigma: Tensor, eps: float, formula: str
) -> Tensor:
    gradient: Tensor = torch.ops.wsbcn_mm.standardize_backward.default(
        grad, weight, mean, sigma, eps, formula
    )
    return gradient


def standardize_all(
    weights: list[Tensor],
    eps: float,
    formula: str,
    out: list[Tensor],
    mean: Tensor,
    sigma: Tensor,
) -> None:
    torch.ops.wsbcn_mm.standardize_all.default(weights, eps, formula, out, mean, sigma)


def standardize_all_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    offsets: list[int],
    mean: Tensor,
    sigma: Tensor,
    eps: float,
    formula: str,
    out: list[Tensor],
) -> None:
    torch.ops.wsbcn_mm.standardize_all_backward.default(
        grads, weights, offsets, mean, sigma, eps, formula, out
    )
