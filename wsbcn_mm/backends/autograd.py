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

import torch
from torch import Tensor

from wsbcn_mm import backends, reference
from wsbcn_mm.backends import ops
from wsbcn_mm.backends.ops import accumulation_dtype


def batch_channel_norm(
    x: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    mode: str,
    momentum: float | Tensor,
    eps: float,
    counts: Tensor | None = None,
) -> Tensor:
    """See `wsbcn_mm.functional.batch_channel_norm`; the arguments were checked there.

    ``counts``: see `wsbcn_mm.backends.ops`.
    """
    # A single value per channel has no variance: where BatchNorm raises (image pooling at one
    # image), batch mode uses the running statistics. An empty x says nothing about the channels.
    from_batch = training and mode == 'batch' and x.numel() // x.size(1) > 1
    update = training and mode == 'estimate'
    momentum, rate = (0.0, momentum) if isinstance(momentum, Tensor) else (float(momentum), None)
    x = _dense(x)
    backend = backends.select(x)
    parameters = (batch_weight, batch_bias, weight, bias)
    if has_nodes(backend) and not from_batch and x.numel() > 0:
        return torch.ops.wsbcn_mm.batch_channel_norm.default(
            x,
            *parameters,
            running_mean,
            running_var,
            num_groups,
            update,
            momentum,
            rate,
            eps,
            counts,
        )
    arguments = (
        x,
        *parameters,
        running_mean,
        running_var,
        backend,
        num_groups,
        from_batch,
        update,
        momentum,
        rate,
        counts,
        eps,
    )
    if torch.is_grad_enabled():
        return _Normalize.apply(*arguments)
    if not training and x.numel() > 0:
        kernels = backends.BACKENDS[backend].kernels()
        return kernels.evaluate(x, num_groups, running_mean, running_var, *parameters, eps)
    return _normalize(*arguments)[0]  # without the cost of a node


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (sample, channel) of x (N, C, *): (N, C), (N, C).

    Without gradient and without a copy of x.
    """
    with torch.no_grad():
        kernels = backends.BACKENDS[backends.select(x)].kernels()
        return kernels.row_moments(_dense(x.detach()))


def channel_means(x: Tensor) -> Tensor:
    """The mean of every channel of x (N, C, *), without gradient and without a copy of x."""
    return row_moments(x)[0].mean(0)


def weight_standardize(weight: Tensor, eps: float, formula: str, dtype: torch.dtype) -> Tensor:
    """See `wsbcn_mm.functional.weight_standardize`; the arguments were checked there."""
    if weight.numel() == 0:
        return weight.to(dtype, copy=True)
    weight = _dense(weight)
    backend = backends.select(weight)
    if has_nodes(backend):
        return torch.ops.wsbcn_mm.weight_standardize.default(weight, eps, formula, dtype)
    return _Standardize.apply(weight, backend, eps, formula, dtype)


def has_nodes(backend: str) -> bool:
    """Whether the backend brings autograd nodes of its own, which a compiler cannot look into."""
    return backend == 'cpu' and not torch.compiler.is_compiling()


def _normalize(
    x,
    batch_weight,
    batch_bias,
    weight,
    bias,
    running_mean,
    running_var,
    backend,
    num_groups,
    from_batch,
    update,
    momentum,
    rate,
    counts,
    eps,
):
    """The result, followed by the statistics that the backward pass needs."""
    if x.numel() == 0:
        return (torch.empty_like(x),)
    kernels = backends.BACKENDS[backend].kernels()
    affine = (batch_weight, batch_bias, weight, bias)
    if from_batch:
        m, q = kernels.row_moments(x)
        mean, var = _update_from_batch(
            m,
            q,
            x.numel() // x.size(1),
            running_mean,
            running_var,
            momentum if rate is None else rate,
            counts,
        )
        y, *group = kernels.normalize(x, m, q, mean, var, num_groups, *affine, eps)
        return y, m, q, mean, var, *group
    results = kernels.normalize_with_estimates(
        x, num_groups, running_mean, running_var, *affine, update, momentum, rate, eps, counts
    )
    if update and not torch.compiler.is_compiling():
        # A kernel writes through pointers: torch must know that the buffers have changed.
        torch.autograd.graph.increment_version((running_mean, running_var))
    return results


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        y, *statistics = _normalize(*arguments)
        ctx.save_for_backward(*arguments[:5], *statistics)
        ctx.backend, ctx.num_groups, ctx.from_batch = arguments[7:10]
        ctx.eps = arguments[-1]
        return y

    @staticmethod
    def backward(ctx, grad):
        x, batch_weight, batch_bias, weight, bias, *statistics = ctx.saved_tensors
        inputs = (x, batch_weight, batch_bias, weight, bias)
        if grad.numel() == 0:
            # Zeros, not None: DistributedDataParallel waits for every parameter's gradient.
            gradients = [None if i is None else torch.zeros_like(i) for i in inputs]
        elif torch.is_grad_enabled():
            mean, var = (None, None) if ctx.from_batch else statistics[2:4]
            found = iter(_normalize_twice(grad, *inputs, mean, var, ctx.num_groups, ctx.eps))
            gradients = [next(found) if need else None for need in ctx.needs_input_grad[:5]]
        else:
            affine_size = max([0] + [p.numel() for p in (weight, bias) if p is not None])
            kernels = backends.BACKENDS[ctx.backend].kernels()
            gradients = kernels.normalize_backward(
                _dense_as(grad, x),
                x,
                *statistics,
                batch_weight,
                batch_bias,
                weight,
                ctx.num_groups,
                affine_size,
                ctx.eps,
                ctx.from_batch,
            )
            gradients = [None if i is None else _like(g, i) for i, g in zip(inputs, gradients)]
        return *gradients, *[None] * 10


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """In the dtype of its parameter; per channel where the parameter is per group: summed."""
    if gradient.numel() != parameter.numel():
        gradient = gradient.view(parameter.numel(), -1).sum(1)
    return gradient if gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)


def _update_from_batch(m, q, count, running_mean, running_var, momentum, counts):
    """The statistics of the batch from those of its rows; updates the buffers as BatchNorm does."""
    mean = m.mean(0)
    var = (q + (m - mean).square()).mean(0)
    unbiased = var * (count / (count - 1))
    ops.move_towards(mean, unbiased, running_mean, running_var, momentum, counts, len(m))
    return mean, var


def _normalize_twice(grad, x, batch_weight, batch_bias, weight, bias, mean, var, num_groups, eps):
    """Differentiable gradients of those inputs that require one; mean None: the batch's own."""
    dtype = accumulation_dtype(x.dtype)
    # Aliases: x may itself depend on the parameters (a shared layer), and a gradient with respect
    # to the tensors themselves would then count the way through x a second time.
    inputs = (x, batch_weight, batch_bias, weight, bias)
    inputs = [None if i is None else i.view_as(i) for i in inputs]
    x, *parameters = (None if i is None else i.to(dtype) for i in inputs)
    if mean is None:
        mean, var = reference.batch_statistics(x)
    y = reference.normalize(x, mean, var, num_groups, *parameters, eps)
    wanted = [i for i in inputs if i is not None and i.requires_grad]
    return list(torch.autograd.grad(y, wanted, grad.to(dtype), create_graph=True))


def _standardize_twice(grad, weight, eps, formula):
    alias = weight.view_as(weight)
    dtype = accumulation_dtype(weight.dtype)
    w_hat = reference.weight_standardize(alias.to(dtype), eps, formula)
    return torch.autograd.grad(w_hat, alias, grad.to(dtype), create_graph=True)[0]


ops.implement_twice(_normalize_twice, _standardize_twice)


def filter_statistics(weight: Tensor, eps: float, formula: str) -> tuple[Tensor, Tensor]:
    """Mean and sigma (see `ops`) of each row of a weight (O, *), without gradient."""
    with torch.no_grad():
        weight = _dense(weight.detach())
        kernels = backends.BACKENDS[backends.select(weight)].kernels()
        return kernels.standardize(weight, eps, formula, weight.dtype)[1:]


def check_version(weight: Tensor, version: int) -> None:
    """Raises where a weight was edited since its version was that one."""
    if weight._version != version:
        raise RuntimeError(
            'a weight was modified by an inplace operation between the forward pass that '
            "standardized it and the backward pass\n  call backward() before the optimizer's "
            'step and before editing weights'
        )


def standardize_backward(grad, weight, mean, sigma, eps, formula, backend):
    """The gradient of a weight, differentiable where gradients are recorded."""
    if torch.is_grad_enabled():
        return _standardize_twice(grad, weight, eps, formula)
    kernels = backends.BACKENDS[backend].kernels()
    return kernels.standardize_backward(_dense_as(grad, weight), weight, mean, sigma, eps, formula)


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, backend, eps, formula, dtype):
        kernels = backends.BACKENDS[backend].kernels()
        w_hat, mean, sigma = kernels.standardize(weight, eps, formula, dtype)
        # Not save_for_backward, which allows a single backward pass and counts for activation
        # checkpointing: several uses of a layer may share the node. Torch's check for edits is then
        # ours to make; compiled code checks for itself.
        ctx.saved = weight, mean, sigma
        ctx.version = None if torch.compiler.is_compiling() else weight._version
        ctx.backend, ctx.eps, ctx.formula = backend, eps, formula
        return w_hat

    @staticmethod
    def backward(ctx, grad):
        weight, mean, sigma = ctx.saved
        if ctx.version is not None:
            check_version(weight, ctx.version)
        found = standardize_backward(grad, weight, mean, sigma, ctx.eps, ctx.formula, ctx.backend)
        return found, None, None, None, None


def _memory_format(x: Tensor) -> torch.memory_format:
    """The layout the kernels read x in: its own where it is dense, else the nearest."""
    if x.is_contiguous():
        return torch.contiguous_format
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    if last is not None and x.stride(1) == 1:
        return last
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return x
    return x.contiguous(memory_format=_memory_format(x))


def _dense_as(grad: Tensor, x: Tensor) -> Tensor:
    return grad.contiguous(memory_format=_memory_format(x))
