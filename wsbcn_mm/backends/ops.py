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
from wsbcn_mm.backends.schemas import SCHEMAS

NAMESPACE = 'wsbcn_mm'

_library = torch.library.Library(NAMESPACE, 'DEF')

for _schema in SCHEMAS:
    _library.define(_schema)

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


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What compiled kernels can load and store."""


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
        named = [
            (value, argument)
            for values, argument in zip(arguments, schema.arguments)
            for value in (values if isinstance(values, (list, tuple)) else [values])
            if isinstance(value, Tensor)
        ]
        device = named[0][0].device
        for value, argument in named:
            # A number, the rate, may be anywhere.
            if value.dim() > 0 and value.device != device:
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
_register_fake('normalize_with_given', _normalize_with_estimates)


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
