"""Both operations with their gradients, over the operators (`ops`) of any backend.

BCN: stage 1 is a per-channel affine map of x, so the first two moments of x per (sample, channel)
give the statistics of both stages in closed form: one pass over x for the moments, (N, C) algebra,
one pass for the result; likewise backward. Of full-size tensors only x is saved: together with an
in-place ReLU twice the input, as with BatchNorm or GroupNorm. The algebra is ours; it is checked
against `wsbcn_mm.reference`, gradients and buffers included.

A second differentiation (``create_graph=True``) goes through the specification, which is
differentiable as often as wanted: the saved moments depend on x, which it would not see in the
closed form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsbcn_mm import backends, compat, reference
from wsbcn_mm.backends import dispatched, eager, ops, triton
from wsbcn_mm.backends.carriers import (
    Affine,
    AffineGradients,
    Rate,
    Running,
    Statistics,
    flat_rate,
)
from wsbcn_mm.backends.layouts import dense
from wsbcn_mm.backends.ops import accumulation_dtype
from wsbcn_mm.backends.running import update_estimates, update_from_batch
from wsbcn_mm.backends.states import count_backward_call
from wsbcn_mm.checks import check_fan_in


def batch_channel_norm(
    x: Tensor,
    num_groups: int,
    running: Running,
    affine: Affine,
    rate: Rate,
    eps: float,
    mode: str,
) -> Tensor:
    """See `wsbcn_mm.functional.batch_channel_norm`; the arguments were checked there.

    Args:
        x: (N, C, *).
        num_groups: G.
        running: Updated in place, unless rate is None.
        affine: Scales and shifts.
        rate: The weight of this input in the running statistics; None: evaluation.
        eps: Added to both variances.
        mode: Whose statistics training uses, ``'estimate'`` or ``'batch'``.
    """
    # A single value per channel has no variance: where BatchNorm raises (image pooling at one
    # image), batch mode uses the running statistics. An empty x says nothing about the channels.
    from_batch = rate is not None and mode == 'batch' and x.numel() // x.size(1) > 1
    if mode == 'batch' and not from_batch:
        rate = None
    x, eps = dense(x), float(eps)  # see `weight_standardize`
    if rate is not None and not isinstance(rate, Tensor):
        rate = float(rate)
    backend = backends.select(x)
    y: Tensor
    if x.numel() > 0 and _needs_torch(backend):
        y = batch_channel_norm_in_torch(x, num_groups, running, affine, rate, eps, from_batch)
    elif has_nodes(backend) and x.numel() > 0:
        y = torch.ops.wsbcn_mm.batch_channel_norm.default(
            x, num_groups, *running, *affine, *flat_rate(rate), eps, from_batch
        )
    elif torch.is_grad_enabled() and _is_written_down(backend) and x.numel() > 0:
        check_constant(running)
        call = _Call(num_groups, running, rate, eps, from_batch, backend)
        y, _ = _normalize(x, affine, call)
    elif torch.is_grad_enabled():
        check_constant(running)
        call = _Call(num_groups, running, rate, eps, from_batch, backend)
        y = _Normalize.apply(x, *affine, call)  # type: ignore[no-untyped-call]
    elif rate is None and x.numel() > 0:
        y = backends.kernels(backend).evaluate(x, num_groups, running, affine, eps)
    else:
        call = _Call(num_groups, running, rate, eps, from_batch, backend)
        y, _ = _normalize(x, affine, call)  # without the cost of a node
    return y


def check_constant(running: Running) -> None:
    """Raises where a statistic requires a gradient, which it would not get.

    Args:
        running: Of a call that is differentiated.
    """
    for name, statistic in (('running_mean', running.mean), ('running_var', running.var)):
        if statistic.requires_grad:
            raise ValueError(
                'the running statistics must not require a gradient: they are no parameters\n  got '
                f'a {name} that does\n  detach() it, or call under torch.no_grad()'
            )


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (sample, channel) of x (N, C, *): (N, C), (N, C).

    Without gradient and without a copy of x.
    """
    with torch.no_grad():
        return backends.kernels(backends.select(x)).row_moments(dense(x.detach()))


def weight_standardize(weight: Tensor, eps: float, formula: str, dtype: torch.dtype) -> Tensor:
    """See `wsbcn_mm.functional.weight_standardize`; the arguments were checked there."""
    if weight.numel() == 0:
        return weight.to(dtype, copy=True)
    if weight.numel() == weight.size(0):  # channels were pruned since the layer was made
        check_fan_in(1)
    weight = dense(weight)
    eps = float(eps)  # dynamic=True of torch.compile makes a symbol of it, which no node can take
    backend = backends.select(weight)
    w_hat: Tensor
    if _needs_torch(backend):
        w_hat = weight_standardize_in_torch(weight, eps, formula, dtype)
    elif has_nodes(backend):
        w_hat = torch.ops.wsbcn_mm.weight_standardize.default(weight, eps, formula, dtype)
    elif _is_written_down(backend):
        w_hat, _, _ = backends.kernels(backend).standardize(weight, eps, formula, dtype)
    else:
        arguments = weight, eps, formula, dtype, backend
        w_hat = _Standardize.apply(*arguments)  # type: ignore[no-untyped-call]
    return w_hat


def gradient_of(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    """A kernel's gradient for its parameter: in its dtype; summed where it is per group."""
    if parameter is None:
        return None
    if gradient.numel() != parameter.numel():
        gradient = gradient.view(parameter.numel(), -1).sum(1)
    return gradient if gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)


def gradients_of(affine: Affine, gradients: AffineGradients) -> list[Tensor | None]:
    """`gradient_of` each parameter."""
    return [gradient_of(parameter, gradient) for parameter, gradient in zip(affine, gradients)]


def has_nodes(backend: str) -> bool:
    """Whether the backend brings autograd nodes of its own, which a compiler cannot look into."""
    there = backend == 'cpu' or (backend == 'triton' and triton.HAS_NODES)
    return there and not torch.compiler.is_compiling() and not compat.compiles_backward_passes()


def _is_written_down(backend: str) -> bool:
    """Whether a compiler writes the operator down, which `exported` differentiates."""
    return torch.compiler.is_compiling() and backend != 'eager'


def _needs_torch(backend: str) -> bool:
    """Whether a result must be made of torch's own operations; see `compat.is_transformed`."""
    if torch.compiler.is_compiling():
        # Of a Function torch.export keeps what runs forward. An operator is written down, whatever
        # then transforms it, but for ONNX, which does not know it.
        return compat.is_exporting() and (backend == 'eager' or compat.is_exporting_to_onnx())
    return compat.is_transformed() or compat.is_exporting_to_onnx()


class _Call(NamedTuple):
    """What a call computes with, beside the tensors that it is differentiated by."""

    num_groups: int
    running: Running
    rate: Rate
    eps: float
    from_batch: bool
    backend: str


def _normalize(x: Tensor, affine: Affine, call: _Call) -> tuple[Tensor, Statistics | None]:
    """The result, and the statistics that the backward pass needs; none of an empty x."""
    num_groups, running, rate, eps, from_batch, backend = call
    if x.numel() == 0:
        return torch.empty_like(x), None
    if rate is None and _is_written_down(backend):
        # Not running[:2], which torch.compile cannot look into on torch 2.6.
        mean, var = running.mean, running.var
        return dispatched.normalize_with_given(x, num_groups, mean, var, affine, eps)
    kernels = backends.kernels(backend)
    normalize = kernels.normalize_with_batch if from_batch else kernels.normalize_with_estimates
    y, statistics = normalize(x, num_groups, running, affine, rate, eps)
    if rate is not None and not torch.compiler.is_compiling():
        # A kernel writes through pointers: torch must know that the buffers have changed.
        written = [b for b in (*running[:2], running.num_batches_tracked) if b is not None]
        torch.autograd.graph.increment_version(written)
    return y, statistics


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        batch_weight: Tensor | None,
        batch_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        call: _Call,
    ) -> Tensor:
        affine = Affine(batch_weight, batch_bias, weight, bias)
        y, statistics = _normalize(x, affine, call)
        ctx.save_for_backward(x, *affine, *(statistics or ()))
        ctx.num_groups, ctx.eps, ctx.from_batch = call.num_groups, call.eps, call.from_batch
        ctx.backend = call.backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        affine = Affine(*saved[:4])
        gradients: list[Tensor | None]
        if grad.numel() == 0:
            # Zeros, not None: DistributedDataParallel waits for every parameter's gradient.
            gradients = [None if i is None else torch.zeros_like(i) for i in (x, *affine)]
        else:
            of = x, ctx.num_groups, Statistics(*saved[4:]), affine, ctx.eps, ctx.from_batch
            gradients = normalize_backward(grad, *of, backends.kernels(ctx.backend))
        return *gradients, None


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    from_batch: bool,
    kernels: ops.Kernels,
) -> list[Tensor | None]:
    """The gradients of x and of the parameters, differentiable where gradients are recorded.

    Args:
        grad: That of the result.
        x: (N, C, *), not empty.
        num_groups: G.
        statistics: Of the forward pass.
        affine: Scales and shifts.
        eps: Added to both variances.
        from_batch: Whether the statistics are those of x.
        kernels: Of a backend.
    """
    if compat.is_differentiated():
        mean, var = (None, None) if from_batch else (statistics.mean, statistics.var)
        found = iter(normalize_twice(grad, x, num_groups, mean, var, affine, eps))
        inputs = x, *affine
        return [next(found) if i is not None and i.requires_grad else None for i in inputs]
    grad_x, of_affine = kernels.normalize_backward(
        grad, x, num_groups, statistics, affine, eps, from_batch
    )
    return [grad_x, *gradients_of(affine, of_affine)]


@torch.enable_grad()  # where tangents alone ask for it, it is off
def normalize_twice(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    mean: Tensor | None,
    var: Tensor | None,
    affine: Affine,
    eps: float,
) -> list[Tensor]:
    """Differentiable gradients of those inputs that require one; mean None: the batch's own."""
    dtype = accumulation_dtype(x.dtype)
    # Aliases: x may itself depend on the parameters (a shared layer), and a gradient with respect
    # to the tensors themselves would then count the way through x a second time.
    x = x.view_as(x)
    affine = Affine(*(None if p is None else p.view_as(p) for p in affine))
    wide = x.to(dtype)
    if mean is None or var is None:
        mean, var = reference.batch_statistics(wide)
    wide_affine = Affine(*(None if p is None else p.to(dtype) for p in affine))
    y = reference.normalize(wide, mean, var, num_groups, *wide_affine, eps)
    wanted = [i for i in (x, *affine) if i is not None and i.requires_grad]
    return list(torch.autograd.grad(y, wanted, grad.to(dtype), create_graph=True))


@torch.enable_grad()
def standardize_twice(grad: Tensor, weight: Tensor, eps: float, formula: str) -> Tensor:
    """The differentiable gradient of a weight."""
    alias = weight.view_as(weight)
    dtype = accumulation_dtype(weight.dtype)
    w_hat = reference.weight_standardize(alias.to(dtype), eps, formula)
    return torch.autograd.grad(w_hat, alias, grad.to(dtype), create_graph=True)[0]


def batch_channel_norm_in_torch(
    x: Tensor,
    num_groups: int,
    running: Running,
    affine: Affine,
    rate: Rate,
    eps: float,
    from_batch: bool,
) -> Tensor:
    """The whole operation by the specification: differentiable in every way that torch knows."""
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    if from_batch:
        mean, var = reference.batch_statistics(wide)
    if rate is not None:
        m, q = eager.row_moments(x.detach())
        if from_batch:
            update_from_batch(m, q, x.numel() // x.size(1), running, rate)
        else:
            mean, var = update_estimates(m, q, running, rate)
    elif not from_batch:
        mean, var = running.mean.to(dtype), running.var.to(dtype)
    wide_affine = Affine(*(None if p is None else p.to(dtype) for p in affine))
    return reference.normalize(wide, mean, var, num_groups, *wide_affine, eps).to(x.dtype)


def weight_standardize_in_torch(
    weight: Tensor, eps: float, formula: str, dtype: torch.dtype
) -> Tensor:
    """Likewise."""
    wide = weight.to(accumulation_dtype(weight.dtype))
    return reference.weight_standardize(wide, eps, formula).to(dtype)


# What code that was traced or exported before is transformed into.
ops.implement(batch_channel_norm_in_torch, ops.TRANSFORMED, 'batch_channel_norm')
ops.implement(weight_standardize_in_torch, ops.TRANSFORMED, 'weight_standardize')
ops.implement(normalize_twice, 'CompositeImplicitAutograd')
ops.implement(standardize_twice, 'CompositeImplicitAutograd')


def filter_statistics(weight: Tensor, eps: float, formula: str) -> tuple[Tensor, Tensor]:
    """Mean and sigma (see `ops`) of each row of a weight (O, *), without gradient."""
    with torch.no_grad():
        weight = dense(weight.detach())
        kernels = backends.kernels(backends.select(weight))
        _, mean, sigma = kernels.standardize(weight, eps, formula, weight.dtype)
        return mean, sigma


def version_of(weight: Tensor) -> int:
    """How often a weight was edited; an inference tensor does not count."""
    return 0 if weight.is_inference() else weight._version


def check_version(weight: Tensor, version: int) -> None:
    """Raises where a weight was edited since its version was that one."""
    if version_of(weight) != version:
        raise RuntimeError(
            'a weight was modified by an inplace operation between the forward pass that '
            "standardized it and the backward pass\n  call backward() before the optimizer's "
            'step and before editing weights'
        )


def standardize_backward(
    grad: Tensor,
    weight: Tensor,
    mean: Tensor,
    sigma: Tensor,
    eps: float,
    formula: str,
    kernels: ops.Kernels,
) -> Tensor:
    """The gradient of a weight, differentiable where gradients are recorded."""
    if compat.is_differentiated():
        return standardize_twice(grad, weight, eps, formula)
    return kernels.standardize_backward(grad, weight, mean, sigma, eps, formula)


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, eps: float, formula: str, dtype: torch.dtype, backend: str
    ) -> Tensor:
        w_hat, mean, sigma = backends.kernels(backend).standardize(weight, eps, formula, dtype)
        # Not save_for_backward, which allows a single backward pass and counts for activation
        # checkpointing: several uses of a layer may share the node. Torch's check for edits is then
        # ours to make; compiled code, where nothing is shared, leaves both to torch.
        ctx.version = None if torch.compiler.is_compiling() else version_of(weight)
        if ctx.version is None:
            ctx.save_for_backward(weight, mean, sigma)
        else:
            ctx.saved = weight, mean, sigma
        ctx.backend, ctx.eps, ctx.formula = backend, eps, formula
        return w_hat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.version is None:
            weight, mean, sigma = ctx.saved_tensors
        else:
            weight, mean, sigma = ctx.saved
            check_version(weight, ctx.version)
            count_backward_call()
        kernels = backends.kernels(ctx.backend)
        gradient = standardize_backward(grad, weight, mean, sigma, ctx.eps, ctx.formula, kernels)
        return gradient, None, None, None, None
