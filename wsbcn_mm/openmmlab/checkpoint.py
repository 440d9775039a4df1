"""Says loudly what a checkpoint does not fill: OpenMMLab loads with strict=False and only logs."""

import logging

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

CONVS = (nn.modules.conv._ConvNd,)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def missing_tensors(model: nn.Module, state_dict: dict[str, Tensor]) -> tuple[list[str], int]:
    """The conv and norm tensors of a model that a state dict does not fill, and how many it has.

    A tensor counts as filled when the name is there with the same shape. The counters of
    BatchNorm (``num_batches_tracked``) do not count.

    Args:
        model: The model.
        state_dict: Tensors by name; a leading ``module.`` is passed over.

    Returns:
        The names that stay unfilled, and the number of all conv and norm tensors.
    """
    shapes = {key.removeprefix('module.'): value.shape for key, value in state_dict.items()}
    wanted = {}
    for prefix, module in model.named_modules():
        if isinstance(module, (*CONVS, *NORMS)):
            for name, value in module.state_dict().items():
                if not name.endswith('num_batches_tracked'):
                    wanted[f'{prefix}.{name}' if prefix else name] = value.shape
    return [name for name, shape in wanted.items() if shapes.get(name) != shape], len(wanted)


class CheckpointMismatch(ValueError):
    """A checkpoint leaves conv or norm tensors of the model unfilled."""


@HOOKS.register_module()
class CheckpointReportHook(Hook):
    """Reports what share of the conv and norm tensors a loaded checkpoint leaves unfilled.

    Acts whenever the Runner loads a checkpoint: ``load_from``, ``resume`` and testing.

    Args:
        strict: Raise `CheckpointMismatch`, a ValueError, instead of warning: testing a half-loaded
            model measures nothing.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compares before the Runner copies the tensors; see the class."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        missing, total = missing_tensors(model, checkpoint.get('state_dict', checkpoint))
        if not missing:
            return
        text = (
            f'the checkpoint does not fill {len(missing)} of the {total} conv and norm tensors of '
            f'this model ({100 * len(missing) / total:.0f} %)\n  first missing: '
            + ', '.join(missing[:4])
            + '\n  is it the checkpoint of another config (other norm, other layers)?'
        )
        if self.strict:
            raise CheckpointMismatch(text)
        text += '\n  those tensors start from their initial values'
        print_log(text, runner.logger, logging.WARNING)
