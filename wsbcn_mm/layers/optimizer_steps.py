"""How many steps all optimizers of this process have taken: what was computed before is old."""

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_count = 0


def count() -> int:
    """Steps of every `torch.optim.Optimizer` so far."""
    return _count


def _after_step(*_: object) -> None:
    global _count
    # Compiled optimizers must stay one graph; they write in place, which torch's version counter
    # of each tensor shows.
    if not torch.compiler.is_compiling():
        _count += 1


register_optimizer_step_post_hook(_after_step)
