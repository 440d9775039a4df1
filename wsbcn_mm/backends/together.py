"""Weight Standardization of many weights by one operator call.

A result belongs to autograd's graph from its first use on. A weight whose result is never used is,
for hooks and for DistributedDataParallel, a weight that nobody read: it gets no gradient, and
nobody waits for one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wsbcn_mm import backends
from wsbcn_mm.backends import autograd, cpu
from wsbcn_mm.backends.layouts import CHANNELS_LAST
from wsbcn_mm.backends.ops import accumulation_dtype

_backward_calls = 0  # of the nodes written in Python


class Together:
    """Standardizes weights, all at once.

    One operator call; its gradient is one node, and one call, where the backend brings nodes of its
    own; else a node for each weight that is used.

    Args:
        weights: (O, *), of one dtype, device and ``requires_grad``; dense (contiguous or
            channels_last) and not empty.
        eps: As in `wsbcn_mm.functional.weight_standardize`, and checked there.
        formula: Likewise.
        dtype: Of the results.
        one_pass: Whether a backward pass ends what the results hold for.

    Attributes:
        states: What the results hold for, as the extension says it; None where it does not.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        eps: float,
        formula: str,
        dtype: torch.dtype,
        one_pass: bool,
    ) -> None:
        self._weights, self._eps, self._formula = list(weights), eps, formula
        self._backend = backends.select(self._weights[0])
        self._by_node = autograd.has_nodes(self._backend)
        self._results: list[Tensor]
        self.states: list[object] | None = None
        usual: tuple[list[Tensor], list[object]] | None = None
        if self._by_node and backends.forced() is None:
            assert cpu.entries is not None
            usual = cpu.entries.weight_standardize_all(self._weights, eps, formula, one_pass)
        if usual is not None and usual[0][0].dtype is dtype:
            self._results, self.states = usual
        elif self._by_node:
            self._results = torch.ops.wsbcn_mm.weight_standardize_all.default(
                self._weights, eps, formula, dtype
            )
        else:
            self._results, self._rows = _standardize(self._weights, eps, formula, dtype)
        self._joined = [False] * len(self._weights)
        self._differentiable = torch.is_grad_enabled() and self._weights[0].requires_grad

    def take(self, index: int) -> Tensor:
        """The result for a weight; from the first time on it belongs to the graph."""
        if self._differentiable and not self._joined[index]:
            self._joined[index] = True
            weight, w_hat = self._weights[index], self._results[index]
            if self._by_node:
                assert cpu.entries is not None
                cpu.entries.join(w_hat, weight)
            else:
                with torch.enable_grad():
                    self._results[index] = _Member.apply(  # type: ignore[no-untyped-call]
                        weight, w_hat, *self._rows[index], self._eps, self._formula, self._backend
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


def backward_calls() -> int:
    """How often a weight's gradient was computed in this process so far, by any node."""
    return _backward_calls if _by_nodes is None else _backward_calls + _by_nodes.value


# The counter of the nodes written in C++, read where it is: a call of an operator takes longer.
_by_nodes: ctypes.c_int64 | None = None
if cpu.unavailable() is None:
    _by_nodes = ctypes.c_int64.from_address(torch.ops.wsbcn_mm.backward_calls_address.default())


def is_dense(x: Tensor) -> bool:
    """Whether x lies in one of the layouts that a kernel reads."""
    last = CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


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
        global _backward_calls
        _backward_calls += 1
        weight, mean, sigma = ctx.saved
        autograd.check_version(weight, ctx.version)
        gradient = autograd.standardize_backward(
            grad, weight, mean, sigma, ctx.eps, ctx.formula, ctx.backend
        )
        return gradient, None, None, None, None, None, None
