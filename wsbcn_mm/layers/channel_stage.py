"""The child ``bn`` of a BCN layer: its channel stage, as whatever looks for BatchNorms sees it.

Hosts, tools and snippets find the BatchNorms of a model by class and then read, initialise, freeze
or average them. What they find here is a BatchNorm in every respect: running statistics of its own,
and as ``weight`` and ``bias`` the ``batch_weight`` and ``batch_bias`` of its layer, the very same
parameters. They are *registered* with the layer alone, so that parameters, optimizers and state
dicts hold them once, and ``affine`` is False, so that a conversion to SyncBatchNorm does not take
them away. ``eps`` is the layer's; forward hooks are called with what the layer is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

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

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Scale and shift, for who freezes or counts those of a BatchNorm.

        With ``recurse=False`` none: so do those who go through all modules ask each, and they have
        them from the layer.
        """
        if recurse and '_layer' in self.__dict__:
            for name in _PARAMETERS:
                parameter = getattr(self._layer.layer, f'batch_{name}')
                if isinstance(parameter, nn.Parameter):
                    yield f'{prefix}.{name}' if prefix else name, parameter

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """As in torch; called before the layer, whose input is that of its channel stage."""

        def of_layer(layer: nn.Module, args: Any, *kwargs: Any) -> Any:
            return hook(layer.bn, args, *kwargs)

        return self._layer.layer.register_forward_pre_hook(
            of_layer, prepend=prepend, with_kwargs=with_kwargs
        )

    def register_forward_hook(
        self,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """As in torch; called after the layer, with the result of the channel stage alone.

        In estimate mode and in evaluation that is what the layer has computed on its way. It is
        computed for the hook, without a gradient; the hook cannot replace it.
        """

        def of_layer(layer: nn.Module, args: Any, *others: Any) -> None:
            *kwargs, output = others
            stage: ChannelStage = layer.bn  # type: ignore[assignment]
            result = None if output is None else stage.result_for(args[0], layer)
            if hook(stage, args, *kwargs, result) is not None:
                raise RuntimeError(
                    f'a forward hook of the child bn of a {type(layer).__name__} cannot replace '
                    'its result, which the layer does not read\n  replace that of the layer: '
                    'register_forward_hook on it'
                )

        return self._layer.layer.register_forward_hook(
            of_layer, prepend=prepend, with_kwargs=with_kwargs, always_call=always_call
        )

    def result_for(self, input: Tensor, layer: Any) -> Tensor:
        """What the channel stage gives for an input, after the update with it; no gradient."""
        batch = layer.mode == 'batch' and self.training and input.numel() > input.size(1)
        statistics = (None, None) if batch else (self.running_mean, self.running_var)
        x, scale, shift = (t.detach() for t in (input, self.weight, self.bias))
        return F.batch_norm(x, *statistics, scale, shift, batch, 0.0, self.eps)

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
        if name == 'eps' and '_layer' in self.__dict__:
            self._layer.layer.eps = value  # which sets it here as well
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


class ChannelStageOverRanks(ChannelStage, nn.SyncBatchNorm, _BatchNorm):
    """What conversions to SyncBatchNorm make of those above."""


def adopted(child: nn.Module, layer: Any) -> nn.Module:
    """The child that a conversion gives a layer, as its channel stage.

    Conversions to SyncBatchNorm, and back, make a new module of each BatchNorm, in which nothing
    knows the layer any more. The scale and shift of one that brings its own become the layer's.
    """
    if not isinstance(child, _BatchNorm) or isinstance(child, ChannelStage):
        return child
    over_ranks = isinstance(child, nn.SyncBatchNorm)
    own = {name: child._parameters.get(name) for name in _PARAMETERS}
    child._parameters.update(dict.fromkeys(_PARAMETERS))
    child.affine = False
    child.__class__ = ChannelStageOverRanks if over_ranks else layer._stage_class
    child.belongs_to(layer)  # type: ignore[operator]
    for name, parameter in own.items():
        if parameter is not None:
            setattr(child, name, parameter)
    return child
