"""The operators of Weight Standardization: see `launch`."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsbcn_mm.backends.ops import accumulation_dtype
from wsbcn_mm.backends.triton import cuts, device
from wsbcn_mm.backends.triton.arguments import check_tensor
from wsbcn_mm.backends.triton.device import bits
from wsbcn_mm.backends.triton.jit import weights as kernels

AT_ONCE = 32 if hasattr(tl, 'tuple') else 1
"""Weights per launch: a program finds its own by that many comparisons. Triton before 3.3 knows no
tuples of tensors."""

TILE = 1024
"""Values that a program treats at a time where many weights share a launch: most rows are short."""

Sizes = tuple[tuple[int, int], ...]
"""Rows and their length, of every weight."""


def standardize(
    weight: Tensor, eps: float, formula: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`."""
    check_tensor('weight', weight, (weight.shape,), weight.device)
    w_hat = torch.empty_like(weight, dtype=dtype)
    mean, sigma = device.small_results(weight, weight.shape[:1], weight.shape[:1])
    _standardize(weight, w_hat, mean, sigma, eps, formula)
    return w_hat, mean, sigma


def standardize_backward(
    grad: Tensor, weight: Tensor, mean: Tensor, sigma: Tensor, eps: float, formula: str
) -> Tensor:
    """See `wsbcn_mm.backends.ops`."""
    check_tensor('weight', weight, (weight.shape,), weight.device)
    check_tensor('grad', grad, (weight.shape,), weight.device)
    mean, sigma = mean.contiguous(), sigma.contiguous()
    _check_rows(weight.size(0), weight, mean, sigma)
    grad = grad.contiguous(memory_format=cuts.memory_format(weight, 'weight'))
    dw = torch.empty_like(weight)
    _standardize_backward((grad, weight, dw), mean, sigma, eps, formula)
    return dw


def standardize_all(
    weights: list[Tensor],
    eps: float,
    formula: str,
    out: list[Tensor],
    mean: Tensor,
    sigma: Tensor,
) -> None:
    """See `wsbcn_mm.backends.ops`; one launch for up to `AT_ONCE` weights."""
    _check_alike('weights', weights, weights)
    _check_alike('out', out, weights)
    offsets = [0, *itertools.accumulate(weight.size(0) for weight in weights)]
    _check_rows(offsets.pop(), weights[0], mean, sigma)
    for first in range(0, len(weights), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        if len(weights[part]) == 1:
            place = slice(offsets[first], offsets[first] + weights[first].size(0))
            _standardize(weights[first], out[first], mean[place], sigma[place], eps, formula)
        else:
            tensors = tuple(weights[part]), tuple(out[part])
            _launch_many(
                kernels.standardize_many, tensors, tuple(offsets[part]), mean, sigma, eps, formula
            )


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
    """See `wsbcn_mm.backends.ops`; one launch for up to `AT_ONCE` weights."""
    _check_alike('weights', weights, weights)
    _check_alike('out', out, weights)
    _check_rows(mean.numel(), weights[0], mean, sigma)
    for k, (offset, weight) in enumerate(zip(offsets, weights, strict=True)):
        if not 0 <= offset <= mean.numel() - weight.size(0):
            raise ValueError(
                f'offsets[{k}] must leave room for {weight.size(0)} rows of {mean.numel()}\n'
                f'  got {offset}'
            )
    grads = [g.contiguous(memory_format=cuts.memory_format(w)) for g, w in zip(grads, weights)]
    _check_alike('grads', grads, weights)
    for first in range(0, len(weights), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        if len(weights[part]) == 1:
            place = slice(offsets[first], offsets[first] + weights[first].size(0))
            tensors = grads[first], weights[first], out[first]
            _standardize_backward(tensors, mean[place], sigma[place], eps, formula)
        else:
            _launch_many(
                kernels.standardize_many_backward,
                (tuple(grads[part]), tuple(weights[part]), tuple(out[part])),
                tuple(offsets[part]),
                mean,
                sigma,
                eps,
                formula,
            )


def _standardize(
    weight: Tensor, w_hat: Tensor, mean: Tensor, sigma: Tensor, eps: float, formula: str
) -> None:
    rows, length, constants = _one_program_per_row(weight)
    device.start(
        kernels.standardize,
        (rows,),
        weight,
        w_hat,
        mean,
        sigma,
        length,
        bits(eps),
        FORMULA=formula,
        **constants,
    )


def _standardize_backward(
    tensors: tuple[Tensor, Tensor, Tensor], mean: Tensor, sigma: Tensor, eps: float, formula: str
) -> None:
    """tensors: grad, weight and dw, which is written."""
    rows, length, constants = _one_program_per_row(tensors[1])
    device.start(
        kernels.standardize_backward,
        (rows,),
        *tensors,
        mean,
        sigma,
        length,
        bits(eps),
        FORMULA=formula,
        **constants,
    )


def _launch_many(
    kernel: Any,
    tensors: tuple[tuple[Tensor, ...], ...],
    offsets: tuple[int, ...],
    mean: Tensor,
    sigma: Tensor,
    eps: float,
    formula: str,
) -> None:
    """tensors: what each weight has one of, in the order of the kernel's arguments."""
    weights = tensors[-2]
    sizes = tuple((weight.size(0), weight[0].numel()) for weight in weights)
    count = triton.next_power_of_2(len(weights))  # few numbers to compile for
    padding = count - len(weights)
    block = cuts.block(max(length for _, length in sizes), TILE)
    # A view may start anywhere.
    aligned = all(tensor.data_ptr() % 16 == 0 for row in tensors for tensor in row)
    device.start(
        kernel,
        (sum(rows for rows, _ in sizes),),
        *(row + row[-1:] * padding for row in tensors),
        _table(sizes, offsets, padding, mean.device),
        mean,
        sigma,
        bits(eps),
        FORMULA=formula,
        VECTOR=16 // weights[0].element_size() if aligned else 1,
        BLOCK=block,
        COUNT=count,
        num_warps=cuts.warps(2 * block, most=4),
    )


@functools.lru_cache(maxsize=1024)
def _table(sizes: Sizes, offsets: tuple[int, ...], padding: int, place: torch.device) -> Tensor:
    """See `jit.weights.row_of_program`. Kept: a copy to the device would not be captured."""
    first = [0, *itertools.accumulate(rows for rows, _ in sizes)]
    lengths = [length for _, length in sizes]
    rows = [
        first[:-1] + first[-1:] * padding,  # no program is that far
        lengths + [0] * padding,
        [*offsets] + [0] * padding,
    ]
    return torch.tensor(rows, device=place)


def _one_program_per_row(weight: Tensor) -> tuple[int, int, cuts.Constants]:
    cuts.memory_format(weight, 'weight')  # rows are dense, whatever the order inside
    rows = weight.size(0)
    length = weight.numel() // rows
    block = cuts.block(length, 2 * cuts.TILE)
    vector = math.gcd(length, 16 // weight.element_size())
    return rows, length, dict(VECTOR=vector, BLOCK=block, num_warps=cuts.warps(block))


def _check_rows(rows: int, weight: Tensor, mean: Tensor, sigma: Tensor) -> None:
    dtype = accumulation_dtype(weight.dtype)
    for name, value in (('mean', mean), ('sigma', sigma)):
        check_tensor(name, value, ((rows,),), weight.device)
        if value.dtype != dtype or not value.is_contiguous():
            raise TypeError(f'{name} must be contiguous and {dtype}\n  got {value.dtype}')


def _check_alike(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """One tensor like every weight, in its memory format; all of one dtype."""
    if len(tensors) != len(weights) or not weights:
        raise ValueError(f'{name} must have a tensor per weight\n  got {len(tensors)}')
    for k, (tensor, weight) in enumerate(zip(tensors, weights)):
        check_tensor(f'{name}[{k}]', tensor, (weight.shape,), weights[0].device)
        layout = cuts.memory_format(weight, f'weights[{k}]')
        if not tensor.is_contiguous(memory_format=layout):
            raise ValueError(
                f'{name}[{k}] must lie in memory as weights[{k}] does\n'
                f'  got strides {tensor.stride()} and {weight.stride()}'
            )
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(
                f'{name} must have one dtype\n  got {tensors[0].dtype} and {tensor.dtype}'
            )
