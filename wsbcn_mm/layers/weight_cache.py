"""Standardizes every weight once, not once per use.

A shared head runs its convolutions on every level, micro-steps run them several times per optimizer
step, and in evaluation the weights do not change at all. `StandardizedWeightCache` keeps the last
standardized weight of a layer, with its place in the autograd graph, and computes it anew as soon
as anything it depends on is not what it was:

- the parameter itself (load_state_dict with assign=True), its storage (a move to another device or
  dtype, ``weight.data = ...``) or torch's version counter of it (every in-place edit autograd can
  see: optimizers, load_state_dict, ``with torch.no_grad(): weight.mul_(...)``);
- a step of any `torch.optim.Optimizer`, also one that writes through ``.data``;
- ``train()`` or ``eval()`` of the layer (so that OpenMMLab's EMAHook, which swaps weights through
  ``.data`` and then switches the mode, is seen);
- eps, formula, the dtype asked for, the backend, the CUDA stream, whether gradients are recorded.

What torch itself cannot see is not seen here: a write through an alias made by ``weight.data``
between two uses, without any of the above. Call ``train()`` or ``eval()`` after it.

Not cached: under torch.compile and while a CUDA graph is captured (the graph must contain the
computation), weights that are not parameters (torch.nn.utils.parametrize, functional_call) and
inference tensors, whose edits are not counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wsbcn_mm import backends
from wsbcn_mm.layers import optimizer_steps


class StandardizedWeightCache:
    """The last standardized weight of one layer; see the module."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets the weight."""
        # One object, replaced as a whole: threads that share a layer never see half of a change.
        self._entry: tuple[tuple, nn.Parameter, torch.UntypedStorage, Tensor] | None = None

    def get(
        self,
        weight: Tensor,
        eps: float,
        formula: str,
        dtype: torch.dtype,
        standardize: Callable[[Tensor, float, str, torch.dtype], Tensor],
    ) -> Tensor:
        """``standardize(weight, eps, formula, dtype)``, or what it returned last time.

        Args:
            weight: The raw weight.
            eps: As in `wsbcn_mm.functional.weight_standardize`.
            formula: Likewise.
            dtype: Of the result.
            standardize: The computation.
        """
        if not _cacheable(weight):
            return standardize(weight, eps, formula, dtype)
        key = (
            eps,
            formula,
            dtype,
            weight._version,
            weight.data_ptr(),
            weight.requires_grad,
            optimizer_steps.count(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            backends.forced(),
            torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None,
        )
        entry = self._entry
        if entry is None or entry[1] is not weight or entry[0] != key:
            value = standardize(weight, eps, formula, dtype)
            # Weight and storage are kept alive: nothing else can come to lie at their addresses.
            self._entry = entry = (key, weight, weight.untyped_storage(), value)
        return entry[3]

    # A copy of the layer has weights of its own, and a graph cannot be copied.
    def __deepcopy__(self, memo: dict) -> StandardizedWeightCache:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


def _cacheable(weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or weight.is_inference():
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
