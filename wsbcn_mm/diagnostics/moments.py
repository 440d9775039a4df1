"""Mean and variance per channel over everything that is shown."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and variance per channel of all values shown, in float64, without cancellation."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Shows x (N, C, L)."""
        count = x.size(0) * x.size(2)
        mean = x.mean((0, 2), dtype=torch.float64)
        squares = (x.double() - mean.view(-1, 1)).square().sum((0, 2))
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        # Chan, Golub, LeVeque: two sets of values become one.
        delta, total = mean - self.mean, self.count + count
        self.squares += squares + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count).sqrt()


def as_rows(x: Tensor) -> Tensor:
    """(N, C, *) as (N, C, L) in float32 or float64, without gradient."""
    x = x.detach()
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
