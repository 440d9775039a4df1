"""A trained model as checkpoint and config that the stock host loads.

Stock blocks build their convolutions without bias in front of a norm, and no config can change
that. But a ``conv_cfg`` may name any registered layer, mmcv's ConvModule too: one that holds a
convolution and a BatchNorm. In evaluation that BatchNorm is BCN's batch stage exactly, and the
GroupNorm behind it the channel stage:

    conv_cfg=dict(type='ConvModule', norm_cfg=dict(type='BN'), act_cfg=None)
    norm_cfg=dict(type='GN', num_groups=32)

The weights are the standardized ones. ``mmcv.cnn.fuse_conv_bn(model)`` moves the BatchNorm into the
convolution and leaves a convolution with bias and a GroupNorm, as `wsbcn_mm.fold` does.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS, MODELS, Registry
from mmengine.runner import Runner
from torch import Tensor, nn

from wsbcn_mm.folding import Plan
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.networks.layer_kinds import is_conv
from wsbcn_mm.openmmlab.config import PRETRAINED, dicts_in, imports_of, type_name
from wsbcn_mm.openmmlab.registry import CONV_NAMED, KEPT, MICRO_BN_NAMED, NORM_NAMED


class CannotBePlain(ValueError):
    """Something of this package has no equal among stock layers."""


# ----------------------------------------------------------------------------------------------
# Config


def plain_config(cfg: Config, model: nn.Module) -> Config:
    """The config with stock layers, without anything of this package.

    What is of use in training alone (where initial weights come from, hooks of this package) is
    left out: the checkpoint holds every weight.

    Args:
        cfg: The config.
        model: Built from it. It knows what ``num_groups='auto'`` has become.

    Raises:
        CannotBePlain: something of this package is left; the message says where.
    """
    return without_this_package(cfg, lambda part: _replace_layers(part, model))


def without_this_package(cfg: Config, replace_layers: Callable[[dict], None]) -> Config:
    """A copy of a config without anything of this package.

    Args:
        cfg: The config.
        replace_layers: Puts other layers into a model's config, in place.

    Raises:
        CannotBePlain: something of this package is left; the message says where.
    """
    stock = copy.deepcopy(cfg)
    for part in dicts_in(stock.model):
        if type_name(part) == KEPT:  # which is of use in training alone
            part.pop('frozen', None)
            part['type'] = part.pop('kind')
    replace_layers(stock.model)
    drop_pretrained(stock.model)
    stock.load_from, stock.resume = None, False
    for key in ('custom_imports', 'custom_hooks'):
        stock.pop(key, None)
    imports = [name for name in imports_of(cfg) if not _ours(name)]
    if imports:
        stock.custom_imports = dict(cfg.custom_imports, imports=imports)
    hooks = [hook for hook in cfg.get('custom_hooks') or () if not _is_our_type(hook, HOOKS)]
    if hooks:
        stock.custom_hooks = hooks
    for dataset in dicts_in(stock._cfg_dict):
        _replace_dataset(dataset)
    ours = {name for name, kind in MODELS.module_dict.items() if _ours(kind.__module__)}
    read = {*inspect.signature(Runner).parameters, 'tta_model'}
    # Variables of the config file, of use in that file alone.
    for key in [k for k, v in stock.items() if k not in read and any(_places_of_ours(v, ours))]:
        stock.pop(key)
    without_equal = sorted(_places_of_ours(stock._cfg_dict, ours))
    if without_equal:
        raise CannotBePlain(
            'these settings name something of wsbcn_mm that has no equal among stock layers\n  '
            + '\n  '.join(without_equal)
        )
    return stock


def _ours(name: str) -> bool:
    return name.partition('.')[0] == 'wsbcn_mm'


def _is_our_type(value: dict, registry: Registry) -> bool:
    if isinstance(value['type'], str) and _ours(value['type']):
        return True
    kind = registry.get(value['type']) if isinstance(value['type'], str) else value['type']
    return kind is not None and _ours(kind.__module__)


def _places_of_ours(value: Any, ours: set[str], path: str = '') -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places_of_ours(item, ours, f'{path}.{key}'.lstrip('.'))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _places_of_ours(item, ours, f'{path}[{i}]')
    elif isinstance(value, str) and (value in ours or 'wsbcn_mm' in value):
        yield f'{path}={value!r}'


def _replace_layers(part: Any, model: nn.Module, path: str = '') -> None:
    """Sets ``conv_cfg`` and ``norm_cfg`` of this part of a model's config, and of those below."""
    if isinstance(part, (list, tuple)):
        for i, item in enumerate(part):
            _replace_layers(item, model, f'{path}.{i}'.lstrip('.'))
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        _replace_layers(value, model, f'{path}.{key}'.lstrip('.'))
    for key in [k for k in part if k != 'conv_cfg']:  # predictors take a layer under other names
        if isinstance(part[key], dict) and type_name(part[key]) in CONV_NAMED:
            part[key] = plain_conv_cfg(part[key]) or ConfigDict(type='Conv2d')
    norm_cfg, conv_cfg = part.get('norm_cfg'), part.get('conv_cfg')
    conv = None if conv_cfg is None else plain_conv_cfg(conv_cfg)
    if conv_cfg is not None:
        part['conv_cfg'] = conv
    if norm_cfg is None:
        return
    if type_name(norm_cfg) in MICRO_BN_NAMED:  # in evaluation it is one
        part['norm_cfg'] = ConfigDict({**norm_cfg, 'type': 'BN'})
    elif type_name(norm_cfg) in NORM_NAMED:
        shared = {k: norm_cfg[k] for k in ('eps', 'requires_grad') if k in norm_cfg}
        groups = norm_cfg.get('num_groups', 32)
        if groups == 'auto':
            groups = _auto_groups(model, path)
        affine = {} if norm_cfg.get('affine', 'group') is not None else dict(affine=False)
        part['norm_cfg'] = ConfigDict(type='GN', num_groups=groups, **affine, **shared)
        part['conv_cfg'] = ConfigDict(
            type='ConvModule',
            conv_cfg=conv,
            norm_cfg=dict(type=NORM_NAMED[type_name(norm_cfg)].stock, **shared),
            act_cfg=None,
        )


def _auto_groups(model: nn.Module, path: str) -> int:
    """The one number of groups that ``'auto'`` has become in a part of the model."""
    part = _get(model, path) or model
    numbers: set[int] = {m.num_groups for m in part.modules() if isinstance(m, BatchChannelNorm)}
    if len(numbers) != 1:
        raise CannotBePlain(
            f"{path}: num_groups='auto' became {sorted(numbers)} for its widths; one norm_cfg of "
            'stock layers has one number of groups'
        )
    return numbers.pop()


def plain_conv_cfg(conv_cfg: dict) -> dict | None:
    """The ``conv_cfg`` without WS; None where that is mmcv's default."""
    if type_name(conv_cfg) not in CONV_NAMED:
        return conv_cfg
    kind = CONV_NAMED[type_name(conv_cfg)].stock
    rest = {k: v for k, v in conv_cfg.items() if k not in ('type', 'eps', 'formula')}
    return ConfigDict(type=kind, **rest) if rest or kind != 'Conv2d' else None


def drop_pretrained(model: dict) -> None:
    """Removes from a model's config where weights would be loaded from; changes it in place."""
    model.pop('pretrained', None)
    for part in dicts_in(model):
        init = part.get('init_cfg')
        from_init = isinstance(init, dict) and type_name(init) in PRETRAINED
        if from_init:
            part['init_cfg'] = None
        if isinstance(part.get('pretrained'), str):
            part['pretrained'] = None
        elif not from_init:
            continue
        with MODELS.switch_scope_and_registry(None) as registry:
            kind = registry.get(str(part.get('type')))
        if kind is not None and 'pretrained2d' in inspect.signature(kind).parameters:
            part['pretrained2d'] = False  # networks of MMAction2 would look for 2d weights


def _replace_dataset(dataset: dict) -> None:
    """The drawn datasets are in public layouts: stock classes read what was drawn."""
    if dataset.get('type') == 'ShapesCocoDataset':
        from wsbcn_mm.openmmlab.datasets.shapes_coco import ShapesCocoDataset

        meta = ShapesCocoDataset.METAINFO
        dataset.update(type='CocoDataset', metainfo={k: list(v) for k, v in meta.items()})
    elif dataset.get('type') == 'ShapesVOCDataset':
        from wsbcn_mm.openmmlab.datasets.shapes_voc import ShapesVOCDataset

        meta = ShapesVOCDataset.METAINFO
        dataset.update(
            type='BaseSegDataset',
            metainfo={k: list(v) for k, v in meta.items()},
            img_suffix='.jpg',
            seg_map_suffix='.png',
        )
    elif dataset.get('type') == 'ShapesPicturesDataset':
        dataset.update(type='CustomDataset')
    elif dataset.get('type') == 'ShapesClipsDataset':
        from wsbcn_mm.openmmlab.datasets.shapes_clips import ShapesClipsDataset

        classes = list(ShapesClipsDataset.METAINFO['classes'])
        dataset.update(type='VideoDataset', metainfo=dict(classes=classes))


# ----------------------------------------------------------------------------------------------
# Weights


@torch.no_grad()
def load_plain(stock: nn.Module, model: nn.Module, plan: Plan) -> None:
    """Fills a model built from `plain_config` with the weights of the original.

    Args:
        stock: The stock model; changed in place.
        model: The original, with its trained weights.
        plan: What `folding.plan` found in the original: which norm follows which convolution.

    Raises:
        CannotBePlain: a layer has no place in the stock model; the message names it.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchChannelNorm)}
    not_folded = {name: reason for name, reason in plan.left.items() if name in norms}
    if not_folded:
        raise CannotBePlain(
            'stock layers can stand for a BCN behind a convolution only\n  '
            + '\n  '.join(f'{name}: {reason}' for name, reason in not_folded.items())
        )
    shared = [name for fold in plan.folds if fold.shared for name in fold.convs]
    if shared:
        raise CannotBePlain(
            'stock modules that share a convolution share the batch stage behind it, too; these '
            f'have norms of their own\n  {", ".join(shared[:4])}, ...'
        )
    norm_behind = {
        conv: norms[fold.norm] for fold in plan.folds if fold.norm in norms for conv in fold.convs
    }
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        target = _plain_name(name)
        own = {k: v for k, v in module.state_dict().items() if '.' not in k}
        if is_conv(module):
            own = _plain_conv_state(name, module, norm_behind.get(name), _get(stock, target))
        elif isinstance(module, BatchChannelNorm):
            own = {
                key: own[key].repeat_interleave(module.num_channels // own[key].numel())
                for key in ('weight', 'bias')
                if key in own
            }
        elif name.endswith('.bn') and name.removesuffix('.bn') in norms:
            continue
        state |= {f'{target}.{key}'.lstrip('.'): value for key, value in own.items()}
    load_every_tensor(stock, state)


def load_every_tensor(stock: nn.Module, state: dict[str, Tensor]) -> None:
    """Fills a stock model.

    Raises:
        CannotBePlain: a tensor is missing, left over or of another shape; nothing was loaded.
    """
    given = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in stock.state_dict().items()}
    wrong = [key for key in {**given, **wanted} if given.get(key) != wanted.get(key)]
    if wrong:
        raise CannotBePlain(
            'the stock model has other tensors than the weights need\n  first: '
            + '\n  '.join(f'{k}: {given.get(k)} for {wanted.get(k)}' for k in wrong[:4])
        )
    stock.load_state_dict(state)


def _plain_name(name: str) -> str:
    """Attribute names that mmcv makes of the norm's class: `bcn1` of a BCN is `gn1` of a GN."""
    return '.'.join(re.sub(r'^bcn(\d*)$', r'gn\1', part) for part in name.split('.'))


def _get(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _plain_conv_state(
    name: str, conv: nn.Module, norm: BatchChannelNorm | None, target: nn.Module | None
) -> dict[str, Tensor]:
    """State of the stock layer that stands for a convolution and the batch stage behind it."""
    plain = conv.to_plain() if isinstance(conv, WeightStandardized) else conv
    if not isinstance(target, ConvModule):
        if norm is not None:
            raise CannotBePlain(
                f'{name}: this block does not build its convolution by conv_cfg, so there is no '
                'place for the batch stage of the BCN behind it'
            )
        return dict(plain.state_dict())
    state = {f'conv.{key}': value for key, value in plain.state_dict().items()}
    stage = target.norm
    if norm is not None:
        batch = dict(norm.bn.state_dict(), weight=norm.batch_weight, bias=norm.batch_bias)
    else:  # a convolution of this block without a norm: a BatchNorm that changes nothing
        batch = dict(stage.state_dict())
        batch['running_mean'] = torch.zeros_like(batch['running_mean'])
        batch['running_var'] = torch.ones_like(batch['running_var'])
        batch['weight'] = torch.full_like(batch['weight'], math.sqrt(1 + stage.eps))
        batch['bias'] = torch.zeros_like(batch['bias'])
    return state | {f'{target.norm_name}.{key}': value for key, value in batch.items()}
