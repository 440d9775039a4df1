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

    def reset_running_stats(self) -> None:
        """As in torch; an average of a host, with ``momentum=1``, begins anew as well."""
        super().reset_running_stats()
        if '_layer' in self.__dict__:
            self._layer.layer.forget_average()  # type: ignore[operator]

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

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter, unless one of those that belong to the layer is to be taken apart."""
        self._refuse_to_take_apart(name.partition('_')[0])  # weight_orig, weight_g, ...
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        self._refuse_to_take_apart(name)
        super().__delattr__(name)

    def _refuse_to_take_apart(self, name: str) -> None:
        if '_layer' in self.__dict__ and name in _PARAMETERS:
            kind = type(self._layer.layer).__name__
            raise RuntimeError(
                f"{name!r} of a {kind}'s child bn cannot be pruned or parametrized here: it is the "
                f"layer's batch_{name}\n  do it to that parameter of the {kind}"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PARAMETERS and '_layer' in self.__dict__:
            setattr(self._layer.layer, f'batch_{name}', value)
            return
        if name == 'momentum' and value is not None:
            value = checked_rate(value)
        if name == 'momentum' and '_layer' in self.__dict__:
            # A host that averages sets it when it begins; see `averages`.
            old = self.__dict__.get('momentum')
            numbers = isinstance(value, float) and isinstance(old, float)
            if value is not old and not (numbers and value == old):
                self._layer.layer.forget_average()  # type: ignore[operator]
        super().__setattr__(name, value)


# `_BatchNorm` once more, as a direct base: initialisation rules of OpenMMLab look at those alone.
class ChannelStage1d(ChannelStage, nn.BatchNorm1d, _BatchNorm):
    """The channel stage of `BatchChannelNorm1d`, a BatchNorm1d for everybody else."""


class ChannelStage2d(ChannelStage, nn.BatchNorm2d, _BatchNorm):
    """The channel stage of `BatchChannelNorm2d`, a BatchNorm2d for everybody else."""


class ChannelStage3d(ChannelStage, nn.BatchNorm3d, _BatchNorm):
    """The channel stage of `BatchChannelNorm3d`, a BatchNorm3d for everybody else."""
