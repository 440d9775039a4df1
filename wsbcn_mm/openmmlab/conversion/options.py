"""What `convert_config` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from wsbcn_mm.checks import check_choice

NORMS, CONVS = ('BCN', 'GN'), ('WSConv2d', 'none')
SCHEDULES = ('images', 'keep')
BACKBONES = ('auto', 'keep', 'convert')


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Which layers, weights and batch a converted config is to have.

    Attributes:
        norm: ``'BCN'`` or ``'GN'``.
        conv: ``'WSConv2d'``, or ``'none'`` for norms alone.
        keep_dcn: Deformable convolutions stay as they are, with BCN behind them.
        backbone: ``'convert'``: as the rest. ``'keep'``: it stays as it is with its weights,
            frozen, its BatchNorms in evaluation mode (``type='Kept'``). ``'auto'``: kept where its
            weights were trained with BatchNorm and are on this machine, and no ``checkpoint`` is
            given; see `wsbcn_mm.openmmlab.conversion.backbone`.
        checkpoint: File of backbone weights that were trained with these layers; the WS formula and
            the affine that our converter recorded in it are set.
        images_per_gpu: The batch size of one process.
        gpus: Number of processes to train with; None: as many as the learning rate is for, by
            ``auto_scale_lr``, else by the file name (``8xb2``).
        accumulate: Iterations per step of the optimizer; None: as the config says.
        keep_lr: Leave the learning rate as it is.
        schedule: ``'images'``: a schedule by iterations is stretched so that as many images are
            seen; ``'keep'``: as many iterations as before.

    Raises:
        TypeError: a number that is no int, or something else than True and False.
        ValueError: an unknown choice, or a number below 1.
    """

    norm: str = 'BCN'
    conv: str = 'WSConv2d'
    keep_dcn: bool = False
    backbone: str = 'auto'
    checkpoint: str | None = None
    images_per_gpu: int = 1
    gpus: int | None = None
    accumulate: int | None = None
    keep_lr: bool = False
    schedule: str = 'images'

    def __post_init__(self) -> None:
        check_choice(self.norm, NORMS, 'norm')
        check_choice(self.conv, CONVS, 'conv')
        check_choice(self.schedule, SCHEDULES, 'schedule')
        check_choice(self.backbone, BACKBONES, 'backbone')
        for name in ('keep_dcn', 'keep_lr'):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f'{name} must be True or False\n  got {getattr(self, name)!r}')
        _check_count('images_per_gpu', self.images_per_gpu)
        for name in ('gpus', 'accumulate'):
            value = getattr(self, name)
            if value is not None:
                _check_count(name, value)


def checked_options(choices: dict[str, Any]) -> ConversionOptions:
    """The options of a call.

    Args:
        choices: By name.

    Raises:
        TypeError: a name that is none of them, or see `ConversionOptions`.
        ValueError: See `ConversionOptions`.
    """
    names = [field.name for field in fields(ConversionOptions)]
    for name in choices.keys() - set(names):
        raise TypeError(f'there is no choice {name!r}\n  there are {", ".join(names)}')
    return ConversionOptions(**choices)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an int\n  got {value!r}')
    if value < 1:
        raise ValueError(f'{name} must be at least 1\n  got {value}')
