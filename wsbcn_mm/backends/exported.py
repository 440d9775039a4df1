"""Gradients of the operators themselves, for programs that have nothing else.

A layer is differentiated by `autograd`. What torch.export and torch.compile write down of it are
the operators that it calls: with the derivatives here a program is trained as its model is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wsbcn_mm import compat, reference
from wsbcn_mm.backends import autograd, cpu, dispatched, eager, ops
from wsbcn_mm.backends.carriers import Affine, Rate, Running, Statistics

_library = torch.library.Library(ops.NAMESPACE, 'FRAGMENT')


def _run(operator: str, *arguments: Any) -> Any:
    """An operator, without a node in autograd's graph."""
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.wsbcn_mm, operator).default(*arguments)


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(operator: str, *arguments: Any) -> Any:
        return _run(operator, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, ctx.eps, ctx.formula, _ = inputs
        _, mean, sigma = output
        ctx.mark_non_differentiable(mean, sigma)
        ctx.save_for_backward(weight, mean, sigma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, sigma = ctx.saved_tensors
        gradient = autograd.standardize_backward(
            grad, weight, mean, sigma, ctx.eps, ctx.formula, dispatched
        )
        return None, gradient, None, None, None


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(operator: str, *arguments: Any) -> Any:
        autograd.check_constant(Running(*arguments[2:4]))
        return _run(operator, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operator, x, ctx.num_groups = inputs[:3]
        # Behind the statistics that are given, or the buffers and counters that are updated.
        ctx.first = 5 if operator == 'normalize_with_given' else 7
        ctx.behind = len(inputs) - ctx.first - 4
        affine, statistics = inputs[ctx.first : ctx.first + 4], output[1:]
        ctx.eps, ctx.from_batch = inputs[-1], operator == 'normalize_with_batch'
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(x, *affine, *statistics)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        statistics, affine = Statistics(*saved[4:]), Affine(*saved[:4])
        grad_x, *of_affine = autograd.normalize_backward(
            grad, x, ctx.num_groups, statistics, affine, ctx.eps, ctx.from_batch, dispatched
        )
        between = [None] * (ctx.first - 2)
        return None, grad_x, *between, *of_affine, *[None] * ctx.behind


def _evaluate(_: str, x: Tensor, num_groups: int, mean: Tensor, var: Tensor, *others: Any) -> Any:
    given = x, num_groups, mean, var, *others[2:]  # without the counters
    return _Normalize.apply('normalize_with_given', *given)[0]  # type: ignore[no-untyped-call]


# ----------------------------------------------------------------------------------------------
# Inside a transform of torch.func, and where tangents may come along: of torch's own operations


def _standardize_in_torch(
    weight: Tensor, eps: float, formula: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _, mean, sigma = eager.standardize(weight.detach(), eps, formula, dtype)
    return autograd.weight_standardize_in_torch(weight, eps, formula, dtype), mean, sigma


def _normalize_in_torch(
    x: Tensor,
    num_groups: int,
    running: Running,
    affine: Affine,
    rate: Rate,
    eps: float,
    from_batch: bool,
) -> tuple[Tensor, Statistics]:
    y = autograd.batch_channel_norm_in_torch(x, num_groups, running, affine, rate, eps, from_batch)
    x, affine = x.detach(), Affine(*(None if p is None else p.detach() for p in affine))
    m, q = eager.row_moments(x)
    if from_batch:
        mean, var = reference.batch_statistics(x.to(m.dtype))
    else:
        mean, var = running.mean.to(m.dtype, copy=True), running.var.to(m.dtype, copy=True)
    _, *of_groups = eager.normalize(x, num_groups, m, q, mean, var, affine, eps)
    return y, Statistics(m, q, mean, var, *of_groups)


def _normalize_with_estimates_in_torch(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    return _normalize_in_torch(x, num_groups, running, affine, rate, eps, False)


def _normalize_with_given_in_torch(
    x: Tensor, num_groups: int, mean: Tensor, var: Tensor, affine: Affine, eps: float
) -> tuple[Tensor, Statistics]:
    return _normalize_in_torch(x, num_groups, Running(mean, var), affine, None, eps, False)


def _normalize_with_batch_in_torch(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    return _normalize_in_torch(x, num_groups, running, affine, rate, eps, True)


def _evaluate_in_torch(
    x: Tensor, num_groups: int, running: Running, affine: Affine, eps: float
) -> Tensor:
    return autograd.batch_channel_norm_in_torch(x, num_groups, running, affine, None, eps, False)


# ----------------------------------------------------------------------------------------------


def _differentiate(
    operator: str, with_node: Callable[..., Any], in_torch: Callable[..., Any]
) -> None:
    transformed = ops.flattened(in_torch)

    def run(*arguments: Any) -> Any:
        if compat.is_transformed():
            return transformed(*arguments)
        is_wanted = torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
        )
        return (with_node if is_wanted else _run)(operator, *arguments)

    _library.impl(operator, transformed, ops.TRANSFORMED)
    if cpu.unavailable() is None:
        # nodes/differentiated.cpp comes here where there is something to be differentiated.
        _library.impl(f'{operator}_differentiated', run, 'CompositeImplicitAutograd')
    else:
        _library.impl(operator, run, 'Autograd')


_differentiate('standardize', _Standardize.apply, _standardize_in_torch)
_differentiate('normalize_with_estimates', _Normalize.apply, _normalize_with_estimates_in_torch)
_differentiate('normalize_with_given', _Normalize.apply, _normalize_with_given_in_torch)
_differentiate('normalize_with_batch', _Normalize.apply, _normalize_with_batch_in_torch)
_differentiate('evaluate', _evaluate, _evaluate_in_torch)


def _normalize_with_given(
    x: Tensor, num_groups: int, mean: Tensor, var: Tensor, affine: Affine, eps: float
) -> tuple[Tensor, Statistics]:
    running = Running(mean, var)
    return dispatched.normalize_with_estimates(x, num_groups, running, affine, None, eps)


if cpu.unavailable() is not None:  # else in C++, which takes less time
    ops.implement(_normalize_with_given, 'CompositeExplicitAutograd', 'normalize_with_given')
