"""Weight Standardization of many weights by one operator call, and of their gradients by another.

A weight whose result has no part in a loss is, for hooks and for DistributedDataParallel, one that
nobody read. So weights that are watched have a node each in autograd's graph; those of a backward
pass hand in their gradients first, and compute all of them together. Others share a node.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from wsbcn_mm import backends, compat
from wsbcn_mm.backends import autograd, cpu
from wsbcn_mm.backends.ops import accumulation_dtype
from wsbcn_mm.backends.states import count_backward_call, state_of
from wsbcn_mm.checks import check_fan_in


class Results(Protocol):
    """Standardized weights, and what they hold for; of the compiled extension, or `Together`."""

    def take(self, index: int, weight: Tensor | None, /) -> Tensor | None:
        """The result for a weight; None where it is not, or no longer, that of it as it is."""

    def use(self, index: int, /) -> bool:
        """Whether this is the first use of a result."""


class FirstUses:
    """`Results.use` for results in Python."""

    def __init__(self) -> None:
        self._used: set[int] = set()

    def use(self, index: int, /) -> bool:
        """See `Results`."""
        if index in self._used:
            return False
        self._used.add(index)
        return True


def standardize_all(
    weights: list[Tensor], eps: float, formula: str, dtype: torch.dtype, one_pass: bool
) -> Results:
    """Standardizes weights by one operator call.

    Args:
        weights: (O, *), of one dtype, device and ``requires_grad``; dense (contiguous or
            channels_last) and not empty.
        eps: As in `wsbcn_mm.functional.weight_standardize`, and checked there.
        formula: Likewise.
        dtype: Of the results.
        one_pass: Whether a backward pass ends what the results hold for.
    """
    usual = backends.forced() is None and not compat.compiles_backward_passes()
    if cpu.entries is not None and usual:
        found: Results | None = cpu.entries.weight_standardize_all(
            weights, eps, formula, dtype, one_pass
        )
        if found is not None:
            return found
    return Together(weights, eps, formula, dtype, one_pass)


class Together(FirstUses):
    """See `standardize_all`; where the compiled extension does not do all of it.

    The gradients are one call where the backend brings nodes of its own; else one for each weight
    that is used.
    """

    def __init__(
        self, weights: list[Tensor], eps: float, formula: str, dtype: torch.dtype, one_pass: bool
    ) -> None:
        super().__init__()
        for weight in weights:
            check_fan_in(weight.numel() // weight.size(0))  # channels may have been pruned
        self._weights, self._eps, self._formula = weights, eps, formula
        self._backend = backends.select(weights[0])
        self._results: list[Tensor]
        # Whether a result is a part of the graph: in Python a node takes long, it is made at the
        # first use.
        self._joined = [not (torch.is_grad_enabled() and weights[0].requires_grad)] * len(weights)
        if autograd.has_nodes(self._backend):
            self._results = torch.ops.wsbcn_mm.weight_standardize_all.default(
                weights, eps, formula, dtype
            )
            self._joined = [True] * len(weights)
        else:
            self._results, self._rows = _standardize(weights, eps, formula, dtype)
        self._one_pass = one_pass
        self._states = [state_of(weight, one_pass) for weight in weights]

    def take(self, index: int, weight: Tensor | None, /) -> Tensor | None:
        """See `Results`."""
        state = self._states[index]
        if weight is not self._weights[index] or state is None:
            return None
        if state_of(weight, self._one_pass) != state:
            return None
        if not self._joined[index]:
            self._joined[index] = True
            w_hat, rows = self._results[index], self._rows[index]
            with torch.enable_grad():
                self._results[index] = _Member.apply(  # type: ignore[no-untyped-call]
                    weight, w_hat, *rows, self._eps, self._formula, self._backend
                )
        return self._results[index]


def _standardize(
    weights: list[Tensor], eps: float, formula: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The results, and the mean and sigma of each weight's rows."""
    with torch.no_grad():
        first, sizes = weights[0], [len(weight) for weight in weights]
        mean = first.new_empty(sum(sizes), dtype=accumulation_dtype(first.dtype))
        sigma = torch.empty_like(mean)
        out = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        kernels = backends.BACKENDS[backends.select(first)].kernels()
        kernels.standardize_all(weights, eps, formula, out, mean, sigma)
        return out, list(zip(mean.split(sizes), sigma.split(sizes)))


class _Member(torch.autograd.Function):
    """The gradient of one of the weights, whose result was computed before."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        w_hat: Tensor,
        mean: Tensor,
        sigma: Tensor,
        eps: float,
        formula: str,
        backend: str,
    ) -> Tensor:
        # See `autograd` for why not save_for_backward.
        ctx.saved = weight, mean, sigma
        ctx.version = weight._version
        ctx.eps, ctx.formula, ctx.backend = eps, formula, backend
        return w_hat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count_backward_call()
        weight, mean, sigma = ctx.saved
        autograd.check_version(weight, ctx.version)
        kernels = backends.kernels(ctx.backend)
        gradient = autograd.standardize_backward(
            grad, weight, mean, sigma, ctx.eps, ctx.formula, kernels
        )
        return gradient, None, None, None, None, None, None
