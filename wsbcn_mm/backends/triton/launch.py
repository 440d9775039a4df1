"""One function per operator of `wsbcn_mm.backends.ops`: allocates the results, launches kernels.

The kernels stand in `jit`.

No function waits for the device, reads a value from it or tunes by measuring, so that all of them
can be captured in a CUDA graph. How a tensor is cut into programs depends on its shape alone.
"""

from typing import Literal

import torch
from torch import Tensor

from wsbcn_mm.backends.carriers import (
    Affine,
    AffineGradients,
    Rate,
    Running,
    Statistics,
    outer_size,
)
from wsbcn_mm.backends.triton import at_once, cuts, device, passes
from wsbcn_mm.backends.triton.arguments import (
    check_affine,
    check_running,
    check_statistics,
    check_tensor,
    checked_input,
    number_or_pointer,
)
from wsbcn_mm.backends.triton.weights import (
    standardize,
    standardize_all,
    standardize_all_backward,
    standardize_backward,
)
from wsbcn_mm.backends.triton.work import Results, Stage1

__all__ = [
    'evaluate',
    'normalize',
    'normalize_backward',
    'normalize_with_batch',
    'normalize_with_estimates',
    'row_moments',
    'standardize',
    'standardize_all',
    'standardize_all_backward',
    'standardize_backward',
]


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`."""
    x = checked_input(x, 1)
    m, q = device.small_results(x, x.shape[:2], x.shape[:2])
    cut, chunks = passes.moments(x, m, q)
    if chunks is not None:
        passes.merge(chunks, m, q, cut)
    return m, q


def normalize_with_estimates(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    """See `wsbcn_mm.backends.ops`."""
    source: Literal['running', 'estimate'] = 'running' if rate is None else 'estimate'
    stage_1 = Stage1(source, running, *number_or_pointer(rate, x))
    return _normalize_from_x(x, num_groups, stage_1, affine, eps)


def normalize_with_batch(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    """See `wsbcn_mm.backends.ops`."""
    stage_1 = Stage1('batch', running, *number_or_pointer(rate, x))
    return _normalize_from_x(x, num_groups, stage_1, affine, eps)


def evaluate(x: Tensor, num_groups: int, running: Running, affine: Affine, eps: float) -> Tensor:
    """See `wsbcn_mm.backends.ops`."""
    x = _checked_forward(x, num_groups, running, affine)
    cut = cuts.held(x, num_groups, cuts.HELD)
    if cut is None:
        return normalize_with_estimates(x, num_groups, running, affine, None, eps)[0]
    y = torch.empty_like(x)
    mean, var = device.scratch(x, x.size(1), x.size(1))
    results = Results(y, None, None, mean, var, None, None)
    at_once.normalize(x, results, Stage1('running', running), cut, affine, eps)
    return y


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
    """See `wsbcn_mm.backends.ops`."""
    x = checked_input(x, num_groups)
    check_affine(affine, num_groups, x)
    of_groups = (x.size(0), num_groups)
    group_mean, inv_group_std = device.small_results(x, of_groups, of_groups)
    m, q, mean, var = (value.contiguous() for value in (m, q, mean, var))
    statistics = Statistics(m, q, mean, var, group_mean, inv_group_std)
    check_statistics(statistics, num_groups, x)
    results = Results(torch.empty_like(x), *statistics)
    cut = cuts.held(x, num_groups, cuts.HELD)
    if cut is None:
        passes.normalize(x, results, Stage1('given'), affine, eps)
    else:
        at_once.normalize(x, results, Stage1('given'), cut, affine, eps)
    return results.y, group_mean, inv_group_std


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    through_statistics: bool,
) -> tuple[Tensor, AffineGradients]:
    """See `wsbcn_mm.backends.ops`."""
    x = checked_input(x, num_groups)
    check_tensor('grad', grad, (x.shape,), x.device)
    check_statistics(statistics, num_groups, x)
    check_affine(affine, num_groups, x)
    grad = grad.contiguous(memory_format=cuts.memory_format(x))
    statistics = Statistics(*(value.contiguous() for value in statistics))
    channels, outer = x.shape[1:2], (outer_size(affine),)
    gradients = AffineGradients(*device.small_results(x, channels, channels, outer, outer))
    dx = torch.empty_like(x)
    cut = cuts.held(x, num_groups, cuts.HELD_BACKWARD)
    tensors = grad, x, dx
    if cut is None:
        passes.gradients_of(tensors, statistics, affine, gradients, eps, through_statistics)
    else:
        at_once.gradients_of(tensors, cut, statistics, affine, gradients, eps, through_statistics)
    return dx, gradients


def _checked_forward(x: Tensor, num_groups: int, running: Running, affine: Affine) -> Tensor:
    x = checked_input(x, num_groups)
    check_running(running, x)
    check_affine(affine, num_groups, x)
    return x


def _normalize_from_x(
    x: Tensor, num_groups: int, stage_1: Stage1, affine: Affine, eps: float
) -> tuple[Tensor, Statistics]:
    assert stage_1.running is not None
    x = _checked_forward(x, num_groups, stage_1.running, affine)
    rows, channels, groups = x.shape[:2], x.shape[1:2], (x.size(0), num_groups)
    shapes = rows, rows, channels, channels, groups, groups
    statistics = Statistics(*device.small_results(x, *shapes))
    results = Results(torch.empty_like(x), *statistics)
    cut = cuts.held(x, num_groups, cuts.HELD)
    if cut is not None:
        at_once.normalize(x, results, stage_1, cut, affine, eps)
    else:
        _, chunks = passes.moments(x, statistics.m, statistics.q)
        passes.normalize(x, results, stage_1, affine, eps, chunks)
    return results.y, statistics
