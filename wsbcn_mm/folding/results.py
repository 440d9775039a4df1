"""Whether a folded model gives what the model gives, where both can be run."""

from collections.abc import Callable
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from wsbcn_mm.copies import copied
from wsbcn_mm.folding.evidence import Run, in_one_line

_EXACT = 1e-6  # in float64, relative: what folding itself changes is far below
_ZERO = 1e-6  # a tensor of smaller values is taken for zeros
_AS_ROUNDING = 30  # times what a change of the weights in their last bits does


def tensors_of(result: object) -> list[Tensor]:
    """Copies of the real tensors in a result."""
    leaves = [v for v in tree_leaves(result) if isinstance(v, Tensor) and v.is_floating_point()]
    return [leaf.detach().clone() for leaf in leaves]


@torch.no_grad()
def check(
    in_double: Callable[[], nn.Module],
    fold: Callable[[nn.Module], nn.Module],
    folded: nn.Module,
    run: Run,
    run_in_double: Run,
    expected: list[Tensor],
) -> None:
    """Compares the results of a folded model with those of the model.

    In the model's own dtype only rounding is expected to differ, which some networks enlarge
    without bounds. What differs by more is compared in float64, and with what the model itself
    does when its weights change in their last bits.

    Args:
        in_double: Makes a copy of the model, in float64 and evaluation mode.
        fold: Makes a folded one of such a copy.
        folded: Stays as it is; a copy of it runs.
        run: Runs a model.
        run_in_double: Runs one whose parameters are float64.
        expected: `tensors_of` what it returned for the model.

    Raises:
        ValueError: the folded model does not run, or computes something else.
    """
    try:
        got = tensors_of(run(copied(folded)))  # which may keep something of it
    except Exception as error:
        raise ValueError(
            f'the model runs as it is, but not folded: {in_one_line(error)}\n'
            '  does its forward read an attribute of a layer, which the plain one does not have? '
            'keep that elsewhere, on the model; wsbcn_mm.folding.plan tells what is folded'
        ) from error
    largest = _difference(got, expected)
    expected_rounding = max((torch.finfo(t.dtype).eps for t in expected), default=0.0) ** 0.5
    if largest > expected_rounding and _differs_in_float64(in_double, fold, run_in_double):
        raise ValueError(
            f'the folded model computes something else: its results differ by {largest:.2g} of the '
            'largest value, in float64 as well\n  does its forward ask which class a layer has, or '
            'does something compute with a layer that no run showed? wsbcn_mm.folding.plan tells '
            'what is folded; what an attribute of the model refers to (model.keep = [layer]) stays'
        )


def _differs_in_float64(
    in_double: Callable[[], nn.Module], fold: Callable[[nn.Module], nn.Module], run: Run
) -> bool:
    generator = torch.Generator().manual_seed(0)
    try:
        shaken = in_double()
        for parameter in shaken.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5
            parameter.mul_(1 + 8 * torch.finfo(torch.float64).eps * noise.to(parameter.device))
        exact, got, moved = (tensors_of(run(m)) for m in (in_double(), fold(in_double()), shaken))
    except Exception:  # noqa: BLE001  whatever a model raises that wants its own dtype
        return False
    difference = _difference(got, exact)
    return difference > max(_EXACT, _AS_ROUNDING * _difference(moved, exact))


def _difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of the tensor that has it."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return inf
    largest = 0.0
    for a, b in zip(got, expected):
        different = (a != b) & ~(a.isnan() & b.isnan())
        if different.any():
            error = (a - b)[different].abs().max().item()
            scale = b.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
            largest = max(largest, error / max(scale, _ZERO) if isfinite(error) else inf)
    return largest


def doubled(arguments: Any) -> Any:
    """Copies of a model's arguments in float64."""

    def double(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = torch.float64 if value.is_floating_point() else value.dtype
        return value.to(dtype, copy=True)

    return tree_map(double, arguments)
