"""The child ``bn`` of a BCN layer: its channel stage, as whatever looks for BatchNorms sees it.

Hosts, tools and snippets find the BatchNorms of a model by class and then read, initialise, freeze
or average them. What they find here is a BatchNorm in every respect: running statistics of its own,
and as ``weight`` and ``bias`` the ``batch_weight`` and ``batch_bias`` of its layer, the very same
parameters. They are *registered* with the layer alone, so that parameters, optimizers and state
dicts hold them once, and ``affine`` is False, so that a conversion to SyncBatchNorm does not take
them away. ``eps`` is the layer's; forward hooks are called with what the layer is called with.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm import compat
from wsbcn_mm.backends.ops import accumulation_dtype
from wsbcn_mm.checks import check_eps, checked_rate

_PARAMETERS = ('weight', 'bias')
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Stage = TypeVar('Stage', bound='ChannelStage')


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
        """As in torch; averages and the counts of what they took in begin anew as well."""
        super().reset_running_stats()
        self._begin_anew(loaded=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f'{prefix}running_mean' in state_dict or f'{prefix}running_var' in state_dict:
            self._begin_anew(loaded=True)

    def _begin_anew(self, loaded: bool) -> None:
        if '_layer' in self.__dict__:
            self._layer.layer.begin_anew(loaded)  # type: ignore[operator]

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

    def requires_grad_(self: Stage, requires_grad: bool = True) -> Stage:
        """As in torch, of scale and shift: those of the layer, or what they are computed from."""
        if '_layer' in self.__dict__:
            for name, parameter in self._layer.layer.named_parameters():
                if 'batch_weight' in name or 'batch_bias' in name:
                    parameter.requires_grad_(requires_grad)
        return self

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
        own = getattr(value, '__func__', None) is type(self).forward  # who puts back what was there
        if name == 'forward' and not own and '_layer' in self.__dict__:
            _warn_that_it_is_not_called(self._layer.layer, stacklevel=3)
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
# Loops that initialise or freeze by the name of a class look for 'BatchNorm' or 'BatchNorm2d'.
class ChannelStageBatchNorm1d(ChannelStage, nn.BatchNorm1d, _BatchNorm):
    """The channel stage of `BatchChannelNorm1d`, a BatchNorm1d for everybody else."""


class ChannelStageBatchNorm2d(ChannelStage, nn.BatchNorm2d, _BatchNorm):
    """The channel stage of `BatchChannelNorm2d`, a BatchNorm2d for everybody else."""


class ChannelStageBatchNorm3d(ChannelStage, nn.BatchNorm3d, _BatchNorm):
    """The channel stage of `BatchChannelNorm3d`, a BatchNorm3d for everybody else."""


class ChannelStageSyncBatchNorm(ChannelStage, nn.SyncBatchNorm, _BatchNorm):
    """What conversions to SyncBatchNorm make of those above."""


def adopted(child: Any, layer: Any) -> Any:
    """What becomes the child of a layer where somebody else sets it.

    Conversions to SyncBatchNorm, and back, make a new module of each BatchNorm, in which nothing
    knows the layer any more; snapshots put back a copy. Of BatchNorms, and of the child of another
    layer, this is a channel stage of the layer with their statistics, settings and hooks; their
    scale and shift, where they have them, become the layer's until the child that was there comes
    back. Whatever else it is stays as it is.
    """
    owner = child.__dict__.get('_layer')
    gone = layer._modules.get('bn')
    if getattr(gone, 'running_mean', None) is not getattr(child, 'running_mean', None):
        layer.forget_average()
    if isinstance(child, ChannelStage):
        if owner is None or owner.layer is layer:
            own = child.__dict__.get('_replaced', {})
            for name, parameter in own.items():  # the model may have been moved meanwhile
                parameter.data = parameter.data.to(getattr(layer, f'batch_{name}'))
            _set_scale(layer, own, gone)
            child.__dict__.pop('_replaced', None)
            layer.__dict__['eps'] = child.eps
            return child
        kind = type(child)
    elif type(child) in _PLAIN or type(child).__name__ == '_BatchNormXd':  # mmengine's, of any axes
        kind = layer._stage_class
    elif isinstance(child, nn.SyncBatchNorm) or type(child).__name__ == 'SyncBatchNorm':  # mmcv's
        kind = ChannelStageSyncBatchNorm
    else:
        if isinstance(child, _BatchNorm):
            _warn_that_it_is_not_called(layer, stacklevel=4)
        return child
    own = {n: child._parameters.get(n) if owner is None else getattr(child, n) for n in _PARAMETERS}
    own = {name: parameter for name, parameter in own.items() if parameter is not None}
    check_eps(child.eps)
    stage: Any = copy.copy(child)
    stage.__dict__.pop('_replaced', None)
    stage.__class__ = kind
    stage._parameters = dict.fromkeys(_PARAMETERS)
    stage.affine = False
    if not hasattr(stage, 'process_group'):
        stage.process_group = getattr(child, 'group', None)
    stage.momentum = child.momentum  # is a rate
    stage.belongs_to(layer)
    _set_scale(layer, own, gone)
    layer.__dict__['eps'] = float(stage.eps)  # not that of the child that goes
    return stage


def _warn_that_it_is_not_called(layer: nn.Module, stacklevel: int) -> None:
    kind = type(layer).__name__
    warnings.warn(
        f'the child bn of a {kind} has got a forward of its own, which is not called: the {kind} '
        'reads its statistics, scale and mode\n  set the forward of the layer, or replace the '
        'layer',
        stacklevel=stacklevel,
    )


def _set_scale(layer: Any, own: dict[str, nn.Parameter], gone: nn.Module | None) -> None:
    """Gives the layer those of its new child; the one that goes keeps what it had."""
    for name in own:
        if f'batch_{name}' not in layer._parameters:
            raise ValueError(
                f'the bn of a {type(layer).__name__} cannot be replaced by one with a {name} of '
                f'its own: batch_{name} of the layer is pruned or parametrized\n  make it a plain '
                'parameter first, or give a BatchNorm with affine=False'
            )
    if own and isinstance(gone, ChannelStage):
        gone.__dict__['_replaced'] = {name: getattr(gone, name) for name in own}
    for name, parameter in own.items():
        setattr(layer, f'batch_{name}', parameter)


def call_with_hooks(layer: Any, run: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Calls a layer with the forward hooks of its child around it.

    They are given what they would be of a BatchNorm: the input of the layer, which a pre-hook may
    replace, and the result of the channel stage alone. That is computed for them, without a
    gradient, and cannot be replaced.

    Raises:
        RuntimeError: a hook gives another result; or it asks for one of a batch that lies on
            several processes.
    """
    stage, args = layer.bn, (input,)
    for key, hook in list(stage._forward_pre_hooks.items()):
        if key in stage._forward_pre_hooks_with_kwargs:
            changed = hook(stage, args, {})
            # The input, whichever way it is handed on.
            changed = None if changed is None else (*changed[0], *changed[1].values())
        else:
            changed = hook(stage, args)
        if changed is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    output = run(*args)
    result = _result(layer, args[0]) if stage._forward_hooks else None
    for key, hook in list(stage._forward_hooks.items()):
        with_kwargs = key in stage._forward_hooks_with_kwargs
        replaced = hook(stage, args, *[{}] * with_kwargs, result)
        if replaced is not None and replaced is not result:
            raise RuntimeError(
                f'a forward hook of the child bn of a {type(layer).__name__} cannot replace its '
                'result, which the layer does not read\n  replace that of the layer: '
                'register_forward_hook on it'
            )
    return output


def _result(layer: Any, input: Tensor) -> Tensor:
    """What the channel stage gives for an input, after the update with it."""
    stage = layer.bn
    several = bool(input.numel() > input.size(1))  # traced it is a tensor
    batch = layer.mode == 'batch' and stage.training and several
    if batch and layer.ranks() is not None:
        raise RuntimeError(
            f'forward hooks of the child bn of a {type(layer).__name__} in batch mode are not '
            'called where the batch lies on several processes\n  register them with the layer'
        )
    values = (stage.running_mean, stage.running_var, layer.batch_weight, layer.batch_bias)
    dtype = torch.promote_types(accumulation_dtype(input.dtype), values[0].dtype)
    x, mean, var, scale, shift = (value.detach().to(dtype) for value in (input, *values))
    running = (None, None) if batch else (mean, var)
    with compat.not_traced():  # who traces to count operations counts those of the layer
        y = F.batch_norm(x, running[0], running[1], scale, shift, batch, 0.0, layer.eps)
    return y.to(input.dtype)
