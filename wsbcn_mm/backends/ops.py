"""The contract of the fused kernels: what each operator computes, for every device that has one.

An operator is one call into a kernel library; C++ (`cpu/`) and Triton (`triton/`) supply them, and
`autograd` strings them together and differentiates. They are registered with torch under
``torch.ops.wsbcn_mm``, with shapes for ``torch.compile``, and know nothing of autograd.

**One order of arguments**, from the layer to the kernel and back through autograd::

    x, num_groups, running, affine, rate, eps

running, affine and rate are carriers (`wsbcn_mm.backends.carriers`). A function takes only what it
needs, in this order; ``grad`` comes before x, what a function alone knows comes last; with given
statistics, they stand in the place of running. A schema lists the fields of a carrier in its place.
What users know as ``momentum`` is called rate from `wsbcn_mm.functional` and the layers on, and is
None where nothing is updated.

Names: x is (N, C, *), contiguous or channels_last; a row is one (sample, channel) of it. G groups.
``m``, ``q`` (N, C): mean and biased variance of each row. ``mean``, ``var`` (C,): the statistics
of stage 1. ``group_mean``, ``inv_group_std`` (N, G): those of stage 2. All of these have the
accumulation dtype, float64 for float64 and float32 for everything else; parameters and buffers come
in any floating dtype. With ``gain[c] = batch_weight[c] / sqrt(var[c] + eps)``, row means
``t[n, c] = gain (m - mean) + batch_bias`` of x1, and the group of a channel understood::

    group_mean    = mean over the group of t
    group_var     = mean over the group of gain^2 q + (t - group_mean)^2
    inv_group_std = 1 / sqrt(group_var + eps)
    y             = weight inv_group_std (gain (x - m) + t - group_mean) + bias
"""

import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from wsbcn_mm.backends.carriers import (
    FLAT,
    Affine,
    AffineGradients,
    Rate,
    Running,
    Statistics,
    outer_size,
)

NAMESPACE = 'wsbcn_mm'

_library = torch.library.Library(NAMESPACE, 'DEF')

_RUNNING = 'Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? counts'
_AFFINE = 'Tensor? batch_weight, Tensor? batch_bias, Tensor? weight, Tensor? bias'
_RATE = 'float? rate, Tensor? rate_tensor'
_STATISTICS = 'Tensor m, Tensor q, Tensor mean, Tensor var, Tensor group_mean, Tensor inv_group_std'

_library.define('row_moments(Tensor x) -> (Tensor m, Tensor q)')
# Estimate mode and evaluation, in one call. With a rate r the running statistics are updated first,
# in place:
#   running_mean <- (1 - r) running_mean + r mean(x)
#   running_var  <- (1 - r) running_var + r mean((x - old running_mean)^2)
# A channel in which one of them would not be finite, in the dtype of the buffers, keeps both;
# `counts` say so without anybody having to wait for it. `mean` and `var` are copies of what was
# then used.
_library.define(
    f'normalize_with_estimates(Tensor x, int num_groups, {_RUNNING}, {_AFFINE}, {_RATE}, '
    f'float eps) -> (Tensor y, {_STATISTICS})'
)
# Batch mode: the statistics of x itself, with two values per channel at least; the running ones
# move towards them at the rate, as BatchNorm's do, with the unbiased variance.
_library.define(
    f'normalize_with_batch(Tensor x, int num_groups, {_RUNNING}, {_AFFINE}, {_RATE}, '
    f'float eps) -> (Tensor y, {_STATISTICS})'
)
# Evaluation when nothing is differentiated: the same without an update, y alone.
_library.define(
    'evaluate(Tensor x, int num_groups, Tensor running_mean, Tensor running_var, Tensor? counts, '
    f'{_AFFINE}, float eps) -> Tensor'
)
# The update alone, from the moments, for backends without a kernel of their own; returns copies. An
# operator, because a compiler may compute again for the backward pass what it can see into, and
# would do so with running statistics that have changed by then.
_library.define(
    f'update_estimates(Tensor m, Tensor q, {_RUNNING}, {_RATE}) -> (Tensor mean, Tensor var)'
)
# The second half of batch mode, after the moments were combined over samples (and ranks).
_library.define(
    'normalize(Tensor x, int num_groups, Tensor m, Tensor q, Tensor mean, Tensor var, '
    f'{_AFFINE}, float eps) -> (Tensor y, Tensor group_mean, Tensor inv_group_std)'
)
# grad has the shape of x, in any layout and floating dtype. Gradients of x, like x, and of the
# parameters (`AffineGradients`). With `through_statistics` mean and var are those of x itself
# (batch mode) and the gradient flows through them too.
_library.define(
    f'normalize_backward(Tensor grad, Tensor x, int num_groups, {_STATISTICS}, {_AFFINE}, '
    'float eps, bool through_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
)
# weight (O, *), contiguous or channels_last: rows standardized into `dtype`, in the same layout.
# `mean`, `sigma` (O,): the row's mean and, by formula, 'paper' sqrt(var_biased + eps), 'var_eps'
# sqrt(var_unbiased + eps), 'std_eps' std_unbiased, to which eps is added before dividing.
_library.define(
    'standardize(Tensor weight, float eps, str formula, ScalarType dtype) -> '
    '(Tensor w_hat, Tensor mean, Tensor sigma)'
)
# grad has the shape of weight, in any layout and floating dtype.
# dw = (g - mean(g)) / d - k (w - mean) sum((w - mean) g), d the denominator and, by formula,
# k = 1 / (n d^3), 1 / ((n - 1) d^3), 1 / ((n - 1) std d^2), the last one 0 where std is 0.
_library.define(
    'standardize_backward(Tensor grad, Tensor weight, Tensor mean, Tensor sigma, float eps, '
    'str formula) -> Tensor'
)
# The same for many weights of one dtype and device at once, into memory that the caller brings:
# `out[k]` lies as `weights[k]` does; `mean` and `sigma` hold the rows of all weights one after the
# other. Backward, `offsets[k]` is the place of the first row of `weights[k]` in them, and `out[k]`
# may be `grads[k]`.
_library.define(
    'standardize_all(Tensor[] weights, float eps, str formula, Tensor(a!)[] out, Tensor(b!) mean, '
    'Tensor(c!) sigma) -> ()'
)
_library.define(
    'standardize_all_backward(Tensor[] grads, Tensor[] weights, int[] offsets, Tensor mean, '
    'Tensor sigma, float eps, str formula, Tensor(a!)[] out) -> ()'
)

# The two operations as a whole, differentiable, for a backend that brings nodes of autograd's graph
# of its own (the CPU's, in C++): of a dense x that is not empty, and of a dense weight. The others
# are differentiated by `autograd`.
_library.define(
    f'batch_channel_norm(Tensor x, int num_groups, {_RUNNING}, {_AFFINE}, {_RATE}, float eps, '
    'bool from_batch) -> Tensor'
)
_library.define(
    'weight_standardize(Tensor weight, float eps, str formula, ScalarType dtype) -> Tensor'
)
# Many weights by one node, to whose graph a weight belongs only after `join`: see `together`.
_library.define(
    'weight_standardize_all(Tensor[] weights, float eps, str formula, ScalarType dtype) -> Tensor[]'
)
_library.define('join(Tensor w_hat, Tensor weight) -> ()')
# Where it is counted how often such a node has computed gradients, in the whole process.
_library.define('backward_calls_address() -> int')
# Frees the memory that a backend keeps for its next results.
_library.define('release_memory() -> ()')
# What such nodes call to be differentiated again: differentiable gradients of those inputs that
# require one, in order; without mean and var, those of x are differentiated too.
_library.define(
    'normalize_twice(Tensor grad, Tensor x, int num_groups, Tensor? mean, Tensor? var, '
    f'{_AFFINE}, float eps) -> Tensor[]'
)
_library.define('standardize_twice(Tensor grad, Tensor weight, float eps, str formula) -> Tensor')


TRANSFORMED = 'FuncTorchDynamicLayerFrontMode'
"""The dispatch key of what runs inside a transform of torch.func."""


def implement(function: Callable[..., Any], key: str, operator: str | None = None) -> None:
    """Makes a function that takes carriers the implementation of an operator.

    Args:
        function: In Python.
        key: The dispatch key: a device, a composite one for all of them, or `TRANSFORMED`.
        operator: Its name; None: that of the function.
    """
    _library.impl(operator or function.__name__, flattened(function), key)


class Kernels(Protocol):
    """The operators as a backend offers them: a module with these functions, see above."""

    def row_moments(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def normalize_with_estimates(
        self, x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
    ) -> tuple[Tensor, Statistics]: ...

    def normalize_with_batch(
        self, x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
    ) -> tuple[Tensor, Statistics]: ...

    def evaluate(
        self, x: Tensor, num_groups: int, running: Running, affine: Affine, eps: float
    ) -> Tensor: ...

    def normalize(
        self,
        x: Tensor,
        num_groups: int,
        m: Tensor,
        q: Tensor,
        mean: Tensor,
        var: Tensor,
        affine: Affine,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def normalize_backward(
        self,
        grad: Tensor,
        x: Tensor,
        num_groups: int,
        statistics: Statistics,
        affine: Affine,
        eps: float,
        through_statistics: bool,
    ) -> tuple[Tensor, AffineGradients]: ...

    def standardize(
        self, weight: Tensor, eps: float, formula: str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def standardize_backward(
        self, grad: Tensor, weight: Tensor, mean: Tensor, sigma: Tensor, eps: float, formula: str
    ) -> Tensor: ...

    def standardize_all(
        self,
        weights: list[Tensor],
        eps: float,
        formula: str,
        out: list[Tensor],
        mean: Tensor,
        sigma: Tensor,
    ) -> None: ...

    def standardize_all_backward(
        self,
        grads: list[Tensor],
        weights: list[Tensor],
        offsets: list[int],
        mean: Tensor,
        sigma: Tensor,
        eps: float,
        formula: str,
        out: list[Tensor],
    ) -> None: ...


OPERATORS = tuple(name for name in vars(Kernels) if not name.startswith('_'))
"""What a backend implements."""


def flattened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes carriers as the implementation of its operator, which is flat."""
    readers: list[Callable[[tuple[Any, ...]], Any]] = []
    first = 0
    for kind in _kinds(function):
        readers.append(_reader(kind, first))
        first += len(FLAT.get(kind, ('',)))

    def flat(*values: Any) -> Any:
        results = function(*[read(values) for read in readers])
        return tuple(_leaves(results)) if isinstance(results, tuple) else results

    return flat


def flat_names(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that the operator of a function with carriers has."""
    names = zip(_names(function), _kinds(function))
    return [flat for name, kind in names for flat in FLAT.get(kind, (name,))]


def _names(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != 'self']


def _kinds(function: Callable[..., Any]) -> list[Any]:
    hints = typing.get_type_hints(function)
    return [hints[name] for name in _names(function)]


def _reader(kind: Any, first: int) -> Callable[[tuple[Any, ...]], Any]:
    """Finds an argument among the flat ones, the first of which is its own."""
    if kind == Rate:
        return lambda values: values[first] if values[first + 1] is None else values[first + 1]
    if kind in FLAT:
        last = first + len(FLAT[kind])
        return lambda values: kind(*values[first:last])
    return lambda values: values[first]


def _leaves(results: tuple[Any, ...]) -> Iterator[Any]:
    for result in results:
        if isinstance(result, tuple):
            yield from result
        else:
            yield result


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))


def _groups(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((x.shape[0], num_groups), dtype=accumulation_dtype(x.dtype))


def _register_fake(name: str, function: Callable[..., Any]) -> None:
    """Says what an operator returns, by shape and dtype: for torch.compile, and the meta device."""
    schema = getattr(torch.ops.wsbcn_mm, name).default._schema

    # torch comes here, and not to the kernel, as soon as any argument is on the meta device. What
    # is returned then has no values: memory as it was, if it is like an x on another device.
    def checked(*arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        device = tensors[0].device
        for value, argument in zip(arguments, schema.arguments):
            # A number, the rate, may be anywhere.
            if isinstance(value, Tensor) and value.dim() > 0 and value.device != device:
                raise ValueError(
                    f'{argument.name} must be on {device}, as {schema.arguments[0].name}\n'
                    f'  got {value.device}: move it; on the meta device it has no values'
                )
        return function(*arguments)

    torch.library.register_fake(f'{NAMESPACE}::{name}', checked, lib=_library)


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a function for the operator of its name."""
    _register_fake(function.__name__.strip('_'), function)
    return function


@_fake
def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return _rows(x), _rows(x)


@_fake
def _normalize_with_estimates(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, ...]:
    groups = (_groups(x, num_groups), _groups(x, num_groups))
    return torch.empty_like(x), _rows(x), _rows(x), _channels(x), _channels(x), *groups


_register_fake('normalize_with_batch', _normalize_with_estimates)


@_fake
def _evaluate(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@_fake
def _update_estimates(m: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return m.new_empty(m.shape[1]), m.new_empty(m.shape[1])


@_fake
def _normalize(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _groups(x, num_groups), _groups(x, num_groups)


def _normalize_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    through_statistics: bool,
) -> tuple[Tensor, AffineGradients]:
    outer = [statistics.m.new_empty(outer_size(affine)) for _ in range(2)]
    return torch.empty_like(x), AffineGradients(_channels(x), _channels(x), *outer)


_register_fake('normalize_backward', flattened(_normalize_backward))


@_fake
def _standardize(
    weight: Tensor, eps: float, formula: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    mean = weight.new_empty(weight.shape[0], dtype=accumulation_dtype(weight.dtype))
    return torch.empty_like(weight, dtype=dtype), mean, torch.empty_like(mean)


@_fake
def _standardize_backward(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


@_fake
def _batch_channel_norm(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@_fake
def _weight_standardize(weight: Tensor, eps: float, formula: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@_fake
def _standardize_all(*_: Any) -> None: ...


@_fake
def _standardize_all_backward(*_: Any) -> None: ...
