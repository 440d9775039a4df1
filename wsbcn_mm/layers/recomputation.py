"""Lets activation checkpointing update the running statistics once and see the same ones twice.

torch.utils.checkpoint runs a forward pass again during the backward pass. A layer that updates
statistics in its forward pass would update them twice, and in estimate mode, where they are used at
once, the second run would compute something else than the first: gradients of another function.

`StatisticsHistory` remembers which statistics a layer used in runs that may be repeated. In the
repetition the layer asks for them and updates nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from wsbcn_mm import compat
from wsbcn_mm.backends.autograd import channel_means
from wsbcn_mm.layers import optimizer_steps


def is_repeated() -> bool:
    """Whether this forward pass runs inside a backward pass, as checkpointing repeats it."""
    return not torch.compiler.is_compiling() and compat.backward_pass() != -1


def may_be_repeated() -> bool:
    """Whether checkpointing may be recording this forward pass.

    The reentrant kind records without gradients, the other one with hooks on saved tensors. Both
    states have other uses; then something is remembered in vain.
    """
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or compat.saved_tensors_may_be_hooked()


class StatisticsHistory:
    """The statistics that a layer used since the last optimizer step, each with its input's mean.

    Args:
        length: How many runs are remembered: uses of one layer within one step.
    """

    def __init__(self, length: int = 64) -> None:
        self._length = length
        self._runs: deque[tuple[int, Tensor, Tensor, Tensor]] = deque(maxlen=length)

    def remember(self, input: Tensor, mean: Tensor, var: Tensor) -> None:
        """Notes what a run used.

        Args:
            input: (N, C, *).
            mean: (C,), copied.
            var: (C,), copied.
        """
        now = optimizer_steps.count()
        while self._runs and self._runs[0][0] != now:
            self._runs.popleft()
        self._runs.append((now, channel_means(input), mean.clone(), var.clone()))

    def recall(self, input: Tensor) -> tuple[Tensor, Tensor] | None:
        """The mean and variance that the run with this input used; None if none is remembered.

        The nearest of several: a repetition on a GPU may differ in the last digit.
        """
        if not self._runs:
            return None
        runs = list(reversed(self._runs))  # of equal inputs the latest
        best = 0
        if len(runs) > 1:
            wanted = channel_means(input)
            best = int(torch.stack([(run[1] - wanted).abs().sum() for run in runs]).argmin())
        return runs[best][2:]

    def __deepcopy__(self, memo: dict[int, Any]) -> StatisticsHistory:
        return type(self)(self._length)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._length,)
