"""The child ``bn`` of a BCN layer: its channel stage, as whatever looks for BatchNorms sees it.

Hosts, tools and snippets find the BatchNorms of a model by class and then read, initialise, freeze
or average them. What they find here is a BatchNorm in every respect: running statistics of its own,
and as ``weight`` and ``bias`` the ``batch_weight`` and ``batch_bias`` of its layer, the very same
parameters. They are *registered* with the layer alone, so that parameters, optimizers and state
dicts hold them once, and ``affine`` is False, so that a conversion to SyncBatchNorm does not take
them away.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm.checks import checked_rate

_PARAMETERS = ('weight', 'bias')


class _Layer:
    """Refers to a module without making it a child."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class ChannelStage(_BatchNorm):
    """What the classes below share; see the module.

    Calling it normalises with the running statistics, scale and shift as any BatchNorm would; the
    layer does not.
    """

    # Properties that TorchScript must not compile.
    __jit_unused_properties__: ClassVar[list[str]] = ['weight', 'bias']

    def belongs_to(self, layer: nn.Module) -> None:
        """Says whose ``batch_weight`` and ``batch_bias`` are its scale and shift."""
        self._layer = _Layer(layer)

    # Until it belongs to a layer, None: what nn.BatchNorm registers without an affine.
    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The scale of the channel stage, (C,)."""
        parameter: nn.Parameter = self._layer.layer.batch_weight  # type: ignore[assignment]
        return parameter

    @property
    def bias(self) -> nn.Parameter:  # type: ignore[override]
        """The shift of the channel stage, (C,)."""
        parameter: nn.Parameter = self._layer.layer.batch_bias  # type: ignore[assignment]
        return parameter

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PARAMETERS and '_layer' in self.__dict__:
            setattr(self._layer.layer, f'batch_{name}', value)
            return
        if name == 'momentum' and value is not None:
            value = checked_rate(value)
        super().__setattr__(name, value)


# `_BatchNorm` once more, as a direct base: initialisation rules of OpenMMLab look at those alone.
class ChannelStage1d(ChannelStage, nn.BatchNorm1d, _BatchNorm):
    """The channel stage of `BatchChannelNorm1d`, a BatchNorm1d for everybody else."""


class ChannelStage2d(ChannelStage, nn.BatchNorm2d, _BatchNorm):
    """The channel stage of `BatchChannelNorm2d`, a BatchNorm2d for everybody else."""


class ChannelStage3d(ChannelStage, nn.BatchNorm3d, _BatchNorm):
    """The channel stage of `BatchChannelNorm3d`, a BatchNorm3d for everybody else."""
