"""A step of any optimizer of this process: what was computed of the weights before is old."""

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from wsbcn_mm.backends import states


def _after_step(*_: object) -> None:
    # Compiled optimizers must stay one graph; they write in place, which torch's version counter
    # of each tensor shows.
    if not torch.compiler.is_compiling():
        states.note_change()


register_optimizer_step_post_hook(_after_step)
