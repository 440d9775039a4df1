"""The hook of mmengine under which every forward pass standardizes each weight once.

Every runner of our tools has it; for others it belongs into the config::

    custom_hooks = [dict(type='StandardizationHook')]

Where a config has `EstimatesHook` alone, that does the first half: once per forward pass. The hook
changes the speed, never a result.
"""

import sys
from collections.abc import Callable
from types import FrameType

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm.layers.standardization import (
    standardize_once_per_forward,
    weights_do_not_change_during,
)
from wsbcn_mm.openmmlab.compat import unwrapped


@HOOKS.register_module()
class StandardizationHook(Hook):
    """Standardizes each weight once per forward pass, and once in all in validation and testing.

    In validation and testing the weights are those that other hooks have put in place before the
    first image (an EMAHook its averages), and what was made of them is dropped before any hook puts
    others back.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._close: Callable[[], None] | None = None

    def before_run(self, runner: Runner) -> None:
        """Makes every forward pass of the model standardize once."""
        self._model = unwrapped(runner.model)
        standardize_once_per_forward(self._model)

    # At the first image: not before the last of the hooks that exchange weights.
    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """At the first image: from now on the weights do not change."""
        self._open(runner.val_loop, batch_idx)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """At the first image: from now on the weights do not change."""
        self._open(runner.test_loop, batch_idx)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """From now on they may."""
        self._end()

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """From now on they may."""
        self._end()

    def _open(self, loop: object, batch_idx: int) -> None:
        if batch_idx == 0 and self._model is not None:
            self._end()
            frame = _running(loop)
            if frame is not None:  # it ends with the loop, also where that fails
                self._close = weights_do_not_change_during(frame, self._model)

    def _end(self) -> None:
        if self._close is not None:
            self._close()
            self._close = None


def _running(loop: object) -> FrameType | None:
    """The call of ``loop.run()`` in which this is called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == 'run' and frame.f_locals.get('self') is loop:
            return frame
        frame = frame.f_back
    return None
