"""A folded model as a config that needs nothing of this package, whatever the network.

Where settings of stock layers cannot express it (see `settings`), the config keeps the
host's own settings, with GroupNorm and plain convolutions where it named BCN and WS. That model has
the same modules at the same places as the folded one. Where a layer differs (a bias, a number of
groups, a convolution that is no longer shared) the config says which layer of torch stands there;
a copy of `wsbcn_mm.openmmlab.deploy.folded_layers` beside it reads that.
"""

import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from torch import nn

from wsbcn_mm.folding import Plan
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.config import dicts_in, imports_of, type_name
from wsbcn_mm.openmmlab.deploy import folded_layers, inference, settings
from wsbcn_mm.openmmlab.deploy.settings import CannotBePlain
from wsbcn_mm.openmmlab.layers import MicroBatchNorm2d
from wsbcn_mm.openmmlab.registry import CONV_NAMED, CONVERTED, MICRO_BN_NAMED, NORM_NAMED

MODULE = Path(folded_layers.__file__)
HEADER = """import sys

sys.path.append('{{{{ fileDirname }}}}')  # {module}.py lies beside this file

"""


def stock_model(cfg: Config, model: nn.Module, plan: Plan) -> tuple[Config, nn.Module]:
    """A config without this package, and its model with the weights of the original.

    Of stock layers alone where they can express it (see `settings`), else with
    replaced layers.

    Args:
        cfg: The config.
        model: Built from it, with its trained weights.
        plan: What `wsbcn_mm.folding.plan` found in the model.

    Raises:
        CannotBePlain: neither way; the message names what stands against it.
    """
    try:
        new_cfg = settings.plain_config(cfg, model)
        stock = inference.build_model(new_cfg)
        settings.load_plain(stock, model, plan)
    except CannotBePlain:
        return model_with_layers(cfg, model, plan)
    return new_cfg, stock


def lists_layers(cfg: Config) -> bool:
    """Whether a config lists layers, and needs `folded_layers` beside it."""
    return cfg.model.type == folded_layers.FoldedLayers.__name__


def write_config(cfg: Config, file: Path) -> list[Path]:
    """Writes what `stock_model` returned, and beside it what it imports; returns the files."""
    text = cfg.pretty_text
    if not lists_layers(cfg):
        file.write_text(text)
        return [file]
    file.write_text(HEADER.format(module=MODULE.stem) + text)
    return [file, Path(shutil.copy(MODULE, file.parent))]


def model_with_layers(cfg: Config, model: nn.Module, plan: Plan) -> tuple[Config, nn.Module]:
    """Config and model with the layers that `fold` leaves; see `stock_model`."""
    new_cfg = settings.without_this_package(cfg, _replace_layers)
    folded = plan.apply(model, plain=True)
    not_folded = [
        f'{name}: {plan.left.get(name, type(layer).__name__)}'
        for name, layer in folded.named_modules()
        if isinstance(layer, (WeightStandardized, BatchChannelNorm))
    ]
    if not_folded:
        raise CannotBePlain('these layers cannot be folded\n  ' + '\n  '.join(not_folded))
    stock = inference.build_model(new_cfg)
    names = dict(_same_places(folded, stock))
    layers = _other_layers(folded, stock, names)
    imports = imports_of(new_cfg)
    new_cfg.custom_imports = dict(imports=[*imports, MODULE.stem], allow_failed_imports=False)
    kind = new_cfg.model.pop('type')
    new_cfg.model = ConfigDict(type='FoldedLayers', kind=kind, **new_cfg.model, layers=layers)
    stock = inference.build_model(new_cfg)
    state = {
        f'{names[holder]}.{key}'.lstrip('.'): value
        for holder, module in folded.named_modules(remove_duplicate=False)
        for key, value in module.state_dict().items()
        if '.' not in key
    }
    settings.load_every_tensor(stock, state)
    return new_cfg, stock


def _replace_layers(part: Any) -> None:
    """Plain convolutions and GroupNorms wherever a model's config names layers of this package."""
    for value in dicts_in(part):
        kind = type_name(value)
        if kind in CONV_NAMED:
            new = settings.plain_conv_cfg(value) or dict(type='Conv2d')
        elif kind in NORM_NAMED:
            groups = value.get('num_groups', 32)
            new = dict(type='GN', num_groups=1 if groups == 'auto' else groups)
        elif kind in MICRO_BN_NAMED:
            new = {**value, 'type': 'BN'}
        elif kind == CONVERTED:  # its layers are listed
            new = {key: item for key, item in value.items() if key not in ('kind', 'convert')}
            new['type'] = value['kind']
        else:
            continue
        value.clear()
        value.update(new)


def _same_places(folded: nn.Module, stock: nn.Module) -> Iterator[tuple[str, str]]:
    """For every name in the folded model: the one in the stock model.

    They differ where mmcv makes a name of the norm's class: `bcn1` of a BCN is `gn1` of a GN.
    """

    def walk(
        module: nn.Module, other: nn.Module | None, name: str, other_name: str
    ) -> Iterator[tuple[str, str]]:
        yield name, other_name
        for key, child in module._modules.items():
            if child is None:
                continue
            other_key = key
            if other is not None and key not in other._modules:
                other_key = re.sub('^bcn', 'gn', key)
            yield from walk(
                child,
                None if other is None else other._modules.get(other_key),
                f'{name}.{key}'.lstrip('.'),
                f'{other_name}.{other_key}'.lstrip('.'),
            )

    yield from walk(folded, stock, '', '')


def _other_layers(
    folded: nn.Module, stock: nn.Module, names: dict[str, str]
) -> dict[str, dict | str]:
    """The layers of the folded model that the stock model does not have in their place."""
    there = dict(stock.named_modules(remove_duplicate=False))
    first: dict[nn.Module, str] = {}  # where a module of the folded model is for the first time
    taken: dict[nn.Module, nn.Module] = {}  # stock module -> the folded one it stands for
    layers: dict[str, dict | str] = {}
    for name, module in folded.named_modules(remove_duplicate=False):
        place = names[name]
        other = there.get(place)
        origin = first.setdefault(module, place)
        if origin != place:
            if origin in layers or there.get(origin) is not other:
                layers[place] = origin
            continue
        layer = _describe(module)
        same = type(module) is type(other) if layer is None else layer == _describe(other)
        # A convolution of another class that got a bias is another layer, too.
        if other is not None and same and _own_tensors(module) == _own_tensors(other):
            stands_for = taken.setdefault(other, module)
            if stands_for is module:
                continue
        if layer is None:
            there_is = 'nothing' if other is None else f'a {type(other).__name__} as it is'
            raise CannotBePlain(
                f'{name}: {type(module).__name__}, where the stock model has {there_is}; only '
                "convolutions and norms of torch's own kinds can be put into it"
            )
        layers[place] = layer
    return layers


def _own_tensors(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items() if '.' not in key}


CONV = (
    'in_channels',
    'out_channels',
    'kernel_size',
    'stride',
    'padding',
    'dilation',
    'groups',
    'padding_mode',
)
GROUP_NORM = ('num_groups', 'num_channels', 'eps', 'affine')
BATCH_NORM = ('num_features', 'eps', 'momentum', 'affine', 'track_running_stats')
BATCH_NORMS = {kind: kind for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}
BATCH_NORMS[MicroBatchNorm2d] = nn.BatchNorm2d  # in evaluation it is one
# mmcv's wrappers accept empty inputs, which torch does by itself today.
CONV_MODULES = (nn.Conv2d.__module__, 'mmcv.cnn.bricks.wrappers')


def _describe(module: Any) -> dict[str, Any] | None:
    """A layer of torch.nn as ``type`` and arguments; None for any other module."""
    kind = type(module)
    keys: tuple[str, ...]
    if isinstance(module, nn.modules.conv._ConvNd) and kind.__module__ in CONV_MODULES:
        kind = next(base for base in kind.__mro__ if base.__module__ == nn.Conv2d.__module__)
        keys = (*CONV, 'output_padding') if module.transposed else CONV
    elif kind is nn.GroupNorm:
        keys = GROUP_NORM
    elif kind in BATCH_NORMS:
        kind, keys = BATCH_NORMS[kind], BATCH_NORM
    elif kind in (nn.Identity, nn.Sequential):
        keys = ()
    else:
        return None
    layer: dict[str, Any] = dict(type=kind.__name__)
    defaults = inspect.signature(kind).parameters
    for key in keys:
        value = getattr(module, key)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value != defaults[key].default:
            layer[key] = value
    if keys[: len(CONV)] == CONV and module.bias is None:
        layer['bias'] = False
    return layer
