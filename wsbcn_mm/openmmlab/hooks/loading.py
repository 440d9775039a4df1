"""What a checkpoint leaves unfilled of a model is said wherever mmengine loads one.

It loads with ``strict=False`` and only logs. `CheckpointReportHook` speaks for what the Runner
loads, `ReportedPretrainedInit` for ``init_cfg=dict(type='Pretrained', ...)``, whose place in the
registry it takes.
"""

import logging

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmengine.registry import HOOKS, WEIGHT_INITIALIZERS
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm.openmmlab import checkpoints, filling
from wsbcn_mm.openmmlab.checkpoints import CheckpointMismatch
from wsbcn_mm.openmmlab.compat import unwrapped
from wsbcn_mm.openmmlab.hooks import resuming


@HOOKS.register_module()
class CheckpointReportHook(Hook):
    """Reports what a loaded checkpoint leaves unfilled of the model's parameters and buffers.

    Acts whenever the Runner loads a checkpoint: ``load_from``, ``resume`` and testing. What fills
    nothing, and what is resumed from without the state of a training, is `CheckpointMismatch`, a
    ValueError, always. The Runner finds the tensors where the tools find them: under
    ``state_dict`` or ``model``, or bare.

    Args:
        strict: Raise it instead of warning: testing a half-loaded model measures nothing.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares before the Runner copies the tensors; see the class."""
        resumes = runner.cfg.get('resume')
        if resumes:
            wrong = resuming.cannot_go_on(runner, checkpoint)
            if wrong is not None:
                raise CheckpointMismatch(
                    f'the checkpoint {wrong}\n  start from its weights: load_from without resume'
                )
            for line in resuming.goes_on_otherwise(runner, checkpoint):
                print_log(f'the checkpoint {line}', runner.logger, logging.WARNING)
        state = checkpoints.state_dict_of(checkpoint)
        holder = checkpoints.holder_of_tensors(checkpoint)
        if any(str(key).startswith('module.module.') for key in holder):
            holder = state  # the Runner takes one wrapper off
        if holder is not checkpoint:
            checkpoint['state_dict'] = holder  # what the Runner takes
        found = filling.compare(unwrapped(runner.model), state, checkpoint)
        if found.complete:
            return
        if self.strict or not found.filled or (resumes and found.other_shape):
            raise CheckpointMismatch(f'the checkpoint {found}')
        print_log(
            f'the checkpoint {found}\n  what is not filled starts from its initial values',
            runner.logger,
            logging.WARNING,
        )


@WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True)
class ReportedPretrainedInit(PretrainedInit):
    """mmengine's ``init_cfg=dict(type='Pretrained')``, which also says what was not loaded.

    One line where the file fills every parameter and buffer; a warning where it does not, or where
    the WS formula of the file is not that of the layers.

    Its arguments are mmengine's: ``checkpoint``, a file or an address; ``prefix`` of the part of
    the checkpoint's model to load, such as ``'backbone.'``; ``map_location``.
    """

    def __call__(self, module: nn.Module) -> None:
        """Loads into ``module`` and reports."""
        checkpoint = checkpoints.read_checkpoint(self.checkpoint)
        state = checkpoints.state_dict_of(checkpoint, self.checkpoint)
        if self.prefix is not None:
            prefix = self.prefix.rstrip('.') + '.'
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if not state:
                raise ValueError(f'{self.checkpoint} has no key that starts with {prefix!r}')
        found = filling.load(module, state, checkpoint, strict=False)
        level = logging.INFO if found.complete else logging.WARNING
        print_log(f'{self.checkpoint} -> {type(module).__name__}: {found}', 'current', level)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())
