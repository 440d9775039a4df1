"""Says loudly what a checkpoint does not fill: OpenMMLab loads with strict=False and only logs.

`CheckpointReportHook` speaks for what the Runner loads, `ReportedPretrainedInit` for
``init_cfg=dict(type='Pretrained', ...)``, whose place in the registry it takes.
"""

import logging
import pickle
import zipfile
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, is_model_wrapper, update_init_info
from mmengine.registry import HOOKS, WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import Tensor, nn

from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.compat import refusal
from wsbcn_mm.openmmlab.files import damage
from wsbcn_mm.structure import CONVS, NORMS

# Where a file may hold its tensors: OpenMMLab's and the authors' key, then others'.
HOLDERS = ('state_dict', 'model', 'model_state_dict', 'state_dict_ema')


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


def settings_unlike(model: nn.Module, checkpoint: dict) -> str | None:
    """What is wrong where a checkpoint records other settings than the layers of the model have.

    Args:
        model: The model.
        checkpoint: Its ``meta`` may hold ``formula`` and ``affine``, as our converter writes them.

    Returns:
        A sentence with the config line that mends it; None where all is well or nothing is known.
    """
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict):
        return None
    found = []
    for name, kind, layer, place in (
        ('formula', WeightStandardized, 'WSConv2d', 'conv_cfg'),
        ('affine', BatchChannelNorm, 'BCN', 'norm_cfg'),
    ):
        wanted = meta.get(name)
        others = {getattr(m, name) for m in model.modules() if isinstance(m, kind)} - {wanted}
        if wanted is not None and others:
            found.append(
                f'the checkpoint is for {name} {wanted!r}, layers of this model have '
                f'{", ".join(sorted(map(repr, others)))}\n'
                f'  set {place}=dict(type={layer!r}, {name}={wanted!r})'
            )
    return '\n'.join(found) or None


def read_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint file with torch's safe loader, onto the CPU.

    Args:
        path: A local file.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: no such file; the message lists the checkpoints beside it.
        ValueError: damaged, not a checkpoint, or one that would run code.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent
        there = sorted(file.name for file in folder.glob('*.pth') if file.is_file())
        raise FileNotFoundError(
            f'no checkpoint file {path}\n  in {folder}: {", ".join(there) or "no .pth files"}'
        )
    try:
        # Mapped where the format allows it: looking at the keys then costs next to nothing.
        content = torch.load(
            path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # a damaged pickle can raise anything
        reason = damage(path)
        if reason is not None:
            raise ValueError(f'the checkpoint {path} {reason}') from error
        if isinstance(error, pickle.UnpicklingError):
            raise refusal(path, error) from error
        first = (str(error).strip().splitlines() or [''])[0]
        raise ValueError(f'{path} is damaged or incomplete\n  {first}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}, not a checkpoint')
    return content


def holder_of_tensors(checkpoint: dict) -> dict:
    """The dict inside of a checkpoint that holds the tensors of the model; maybe itself."""
    for key in HOLDERS:
        if isinstance(checkpoint.get(key), dict):
            return holder_of_tensors(checkpoint[key])
    return checkpoint


def state_dict_of(checkpoint: dict, path: str | Path = 'the checkpoint') -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: those of its ``state_dict`` or ``model``, or its own.

    Raises:
        ValueError: there are none.
    """
    holder = holder_of_tensors(checkpoint)
    tensors = {k: v for k, v in holder.items() if isinstance(v, Tensor)}
    if not tensors:
        keys = ', '.join(map(str, list(holder)[:6])) or 'none'
        raise ValueError(f'{path} holds no tensors of a model by name\n  its keys: {keys}')
    return tensors


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
        problems = _problems(model, checkpoint.get('state_dict', checkpoint), checkpoint)
        if problems and self.strict:
            raise CheckpointMismatch('\n'.join(problems))
        for text in problems:
            print_log(
                f'{text}\n  those tensors start from their initial values'
                if 'does not fill' in text
                else text,
                runner.logger,
                logging.WARNING,
            )


def _problems(model: nn.Module, state: dict[str, Tensor], checkpoint: dict) -> list[str]:
    problems = []
    missing, total = missing_tensors(model, state)
    if missing:
        problems.append(
            f'the checkpoint does not fill {len(missing)} of the {total} conv and norm tensors of '
            f'this model ({100 * len(missing) / total:.0f} %)\n  first missing: '
            + ', '.join(missing[:4])
            + '\n  is it the checkpoint of another config (other norm, other layers)?'
        )
    unlike = settings_unlike(model, checkpoint)
    return [*problems, unlike] if unlike else problems


@WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True)
class ReportedPretrainedInit(PretrainedInit):
    """mmengine's ``init_cfg=dict(type='Pretrained')``, which also says what was not loaded.

    A line with the share of conv and norm tensors that the file fills; a warning where it is not
    all of them, and where the WS formula of the file is not that of the layers.

    Args:
        checkpoint: File or address, as in mmengine.
        prefix: Part of the checkpoint's model to load, such as ``'backbone.'``.
        map_location: As in mmengine.
    """

    def __call__(self, module: nn.Module) -> None:
        """Loads into ``module`` and reports."""
        checkpoint = CheckpointLoader.load_checkpoint(self.checkpoint, self.map_location, 'current')
        if not isinstance(checkpoint, dict):
            raise ValueError(f'{self.checkpoint} is not a checkpoint of a model')
        state = state_dict_of(checkpoint, self.checkpoint)
        state = {key.removeprefix('module.'): value for key, value in state.items()}
        if self.prefix is not None:
            prefix = self.prefix.rstrip('.') + '.'
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if not state:
                raise ValueError(f'{self.checkpoint} has no key that starts with {prefix!r}')
        problems = _problems(module, state, checkpoint)
        load_state_dict(module, state, strict=False, logger='current')
        name = type(module).__name__
        if not problems:
            print_log(f'{self.checkpoint} fills every conv and norm tensor of {name}', 'current')
        for text in problems:
            print_log(f'{self.checkpoint} -> {name}: {text}', 'current', logging.WARNING)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())
