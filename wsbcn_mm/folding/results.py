"""Whether a folded model gives what the model gives, where both can be run."""

from collections.abc import Callable
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from wsbcn_mm.folding.evidence import Run, in_one_line
from wsbcn_mm.networks.copies import copied

_EXACT = 1e-6  # in float64, relative: what folding itself changes is far below
_ZERO = 1e-6  # a tensor of smaller values is taken for zeros
_AS_ROUNDING = 30  # times what a change of the weights in their last bits does


def tensors_of(result: object) -> list[Tensor]:
    """Copies of the real tensors in a result."""
    leaves = [v for v in tree_leaves(result) if isinstance(v, Tensor) and v.is_floating_point()]
    return [leaf.detach().clone() for leaf in leaves]


def seeded(run: Run) -> Run:
    """The same run, each time with the same random numbers of torch, and none used up."""

    def run_again(model: nn.Module) -> object:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            return run(model)

    return run_again


@torch.no_grad()
def check(
    again: Callable[[], nn.Module],
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
        again: Makes a copy of the model, in evaluation mode.
        fold: Makes a folded one of such a copy.
        folded: Stays as it is; a copy of it runs.
        run: Runs a model; where the model itself gives something else the next time (it draws from
            an iterator), nothing is compared.
        run_in_double: Runs one whose parameters are float64.
        expected: `tensors_of` what it returned for the model.

    Raises:
        ValueError: the folded model does not run, or computes something else.
    """
    rounding = max((torch.finfo(t.dtype).eps for t in expected), default=0.0) ** 0.5
    try:
        got = tensors_of(run(copied(folded)))  # which may keep something of it
    except Exception as error:
        if not _repeats(again, run, expected, rounding):
            return
        raise ValueError(
            f'the model runs as it is, but not folded: {in_one_line(error)}\n'
            '  does its forward read an attribute of a layer, which the plain one does not have? '
            'keep that elsewhere, on the model; wsbcn_mm.folding.plan tells what is folded'
        ) from error
    largest = _difference(got, expected)
    if (
        largest > rounding
        and _repeats(again, run, expected, rounding)
        and _is_more_than_rounding(again, fold, run, run_in_double, expected, largest)
    ):
        raise ValueError(
            f'the folded model computes something else: its results differ by {largest:.2g} of the '
            'largest value, which is not rounding\n  does its forward ask which class a layer has, '
            'or does something compute with a layer that no run showed? wsbcn_mm.folding.plan '
            'tells what is folded; what an attribute refers to (model.keep = [layer]) stays'
        )


def _repeats(
    again: Callable[[], nn.Module], run: Run, expected: list[Tensor], rounding: float
) -> bool:
    try:
        return _difference(tensors_of(run(again())), expected) <= rounding
    except Exception:  # noqa: BLE001  whatever it is, it is not because of what was folded
        return False


def _is_more_than_rounding(
    again: Callable[[], nn.Module],
    fold: Callable[[nn.Module], nn.Module],
    run: Run,
    run_in_double: Run,
    expected: list[Tensor],
    largest: float,
) -> bool:
    try:
        exact, got, moved = (
            tensors_of(run_in_double(model))
            for model in (again().double(), fold(again().double()), _shaken(again().double()))
        )
    except Exception:  # noqa: BLE001  whatever a model raises that wants its own dtype
        return largest > _AS_ROUNDING * _difference(tensors_of(run(_shaken(again()))), expected)
    return _difference(got, exact) > max(_EXACT, _AS_ROUNDING * _difference(moved, exact))


def _shaken(model: nn.Module) -> nn.Module:
    """The model with parameters that differ in their last bits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5
            factor = 1 + 8 * torch.finfo(parameter.dtype).eps * noise
            parameter.copy_(parameter.double() * factor.to(parameter.device))
    return model


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


def copies(arguments: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of a model's arguments, of floating-point ones in the dtype: it may edit them."""

    def copy_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        of = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.to(of, copy=True)

    return tree_map(copy_of, arguments)
