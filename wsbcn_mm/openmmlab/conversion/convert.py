"""Turns a config of MMDetection or MMSegmentation into one that trains with WS + BCN.

The architecture stays: BN, SyncBN and GN become BCN where they stand, and the convolutions in front
of them become WSConv2d. What has no norm (RPN, FPN and towers of many detectors) stays plain. The
result is checked by building it: a part whose constructor would also standardize convolutions
without a norm behind them keeps plain ones.
"""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config, ConfigDict
from torch import nn

from wsbcn_mm import layers
from wsbcn_mm.checks import auto_groups
from wsbcn_mm.openmmlab.checkpoints import read_checkpoint
from wsbcn_mm.openmmlab.config import PRETRAINED, find_config, read_config, type_name, with_names
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.conversion.probe import CannotBuild, Node, dotted
from wsbcn_mm.openmmlab.registry import (
    CONV_FOR,
    CONV_NAMED,
    CONVERTED,
    ESTIMATES_HOOK,
    NORM_FOR,
    NORM_NAMED,
)
from wsbcn_mm.structure import followers, standardizable

TARGET_NORMS, TARGET_CONVS = ('BCN', 'GN'), ('WSConv2d', 'none')
# What mmengine raises where a config cannot inherit from another: one in pure Python, a key in two
# bases, a dict merged into something else.
MERGE_ERRORS = (RuntimeError, KeyError, TypeError)


class NothingToConvert(ValueError):
    """The config has no convolution with a BatchNorm or GroupNorm behind it."""


class UnsupportedConfig(ValueError):
    """A part of the config cannot take the layers."""


@dataclass(frozen=True)
class Change:
    """One value that the conversion sets: where, what it was, what it is, and why."""

    where: str
    before: object
    after: object
    why: str = ''

    def __str__(self) -> str:
        why = f'  # {self.why}' if self.why else ''
        return f'{self.where}: {_one_line(self.before)} -> {_one_line(self.after)}{why}'


@dataclass
class Conversion:
    """What `convert_config` returns.

    Attributes:
        cfg: The converted config, complete.
        source: The file that was read; None when a Config was given that has none.
        base: How a child names it, such as ``'mmdet::...'``; None when it cannot be named.
        original: The config as it was.
        changes: Every value that was set.
        left: Parts that stay as they are, with the reason.
        warnings: What the user should know before training.
    """

    cfg: Config
    source: str | None
    base: str | None
    original: Config
    changes: list[Change] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(change) for change in self.changes]
        lines += [f'left as it is: {text}' for text in self.left]
        return '\n'.join([*lines, *(f'warning: {text}' for text in self.warnings)])


def convert_config(
    source: str | Path | Config,
    norm: str = 'BCN',
    conv: str = 'WSConv2d',
    images_per_gpu: int = 1,
    keep_lr: bool = False,
    checkpoint: str | None = None,
    keep_dcn: bool = False,
) -> Conversion:
    """The WS + BCN version of a config.

    - ``norm_cfg``: BN, SyncBN and GN become BCN, also where the norm is a default that the config
      does not show; 32 groups where they fit every width of the part, ``'auto'`` elsewhere.
    - ``conv_cfg``: WSConv2d where all convolutions that it reaches have a norm behind them.
    - ``norm_eval=False``, and ``frozen_stages=-1`` unless a checkpoint is given: frozen random
      weights and frozen estimates cannot learn.
    - ``batch_size`` is set, the learning rate follows by the linear rule, ``auto_scale_lr`` with
      it. Norms get no weight decay.
    - `EstimatesHook` joins the custom hooks.
    - Checkpoints of the parts that changed are dropped: they hold weights of other layers.

    Args:
        source: A file, a name such as ``'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'``, or
            a loaded config (not changed).
        norm: ``'BCN'`` or ``'GN'``.
        conv: ``'WSConv2d'``, or ``'none'`` for norms alone.
        images_per_gpu: The batch size of one process.
        keep_lr: Leave the learning rate as it is.
        checkpoint: File of backbone weights that were trained with these layers; the WS formula and
            the affine that our converter recorded in it are set.
        keep_dcn: Convert parts with deformable convolutions as well: these stay as they are, with
            BCN behind them, and the others of the part get WS. Otherwise such a part is refused.

    Raises:
        FileNotFoundError: no such config; names similar ones.
        CannotBuild: a ValueError; the config needs something that is missing here.
        NothingToConvert: a ValueError; nothing in the config has a norm that BCN could replace.
        UnsupportedConfig: a ValueError; DCN in a part that would get WS, without ``keep_dcn``.
        ValueError: an argument out of range, a config without a model.
    """
    _check_arguments(norm, conv, images_per_gpu)
    if isinstance(source, Config):
        original, file, base = with_names(copy.deepcopy(source)), source.filename, None
    else:
        file, base = find_config(str(source))
        original = read_config(file)
    result = Conversion(copy.deepcopy(original), file and str(file), base, original)
    converted = _convert_layers(result, norm, conv, keep_dcn)
    _unfreeze(result, converted, checkpoint)
    _replace_checkpoints(result, converted, checkpoint)
    _set_batch_size(result, images_per_gpu, keep_lr)
    _spare_norms_from_decay(result)
    hooks = list(result.cfg.get('custom_hooks') or [])
    if norm == 'BCN' and not any(type_name(hook) == ESTIMATES_HOOK for hook in hooks):
        why = 'the same estimates on all ranks; their rate by images per step'
        _set(result, ('custom_hooks',), [*hooks, ConfigDict(type=ESTIMATES_HOOK)], why)
    imports = (result.cfg.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'wsbcn_mm' not in imports:
        _set(
            result,
            ('custom_imports',),
            dict(imports=[*imports, 'wsbcn_mm'], allow_failed_imports=False),
        )
    return result


def _check_arguments(norm: str, conv: str, images_per_gpu: int) -> None:
    for name, value, known in (('norm', norm, TARGET_NORMS), ('conv', conv, TARGET_CONVS)):
        if value not in known:
            raise ValueError(f'{name} must be one of {", ".join(known)}\n  got {value!r}')
    if isinstance(images_per_gpu, bool) or not isinstance(images_per_gpu, int):
        raise TypeError(f'images_per_gpu must be an int\n  got {images_per_gpu!r}')
    if images_per_gpu < 1:
        raise ValueError(f'images_per_gpu must be at least 1\n  got {images_per_gpu}')


# ---- norms and convolutions --------------------------------------------------------------------


@dataclass
class _Part:
    """A node whose norms change: what they are for, and what goes there."""

    node: Node
    norm_path: tuple
    old_norm: dict
    widths: set[int]
    old_conv: dict | None = None
    standardize: bool = False
    why_not: str = ''  # no conv_cfg


def _convert_layers(result: Conversion, norm: str, conv: str, keep_dcn: bool) -> list[Node]:
    """Sets norm_cfg and conv_cfg; returns the nodes that changed."""
    nodes = probe.nodes(result.cfg)
    parts = _parts(result, nodes, conv, keep_dcn)
    for part in parts:
        _set(result, part.norm_path, _new_norm(part, norm))
        if part.standardize:
            _set_conv(result, part)
    # Only a build shows which convolutions a conv_cfg reaches, and which norms no norm_cfg does.
    model = _build_converted(result)
    _shorten_names(result, parts, model)
    bare = _bare_convs(model)
    for part in parts:
        if part.standardize and part.node.path in bare:
            part.standardize = False
            _unset_conv(result, part)
            part.why_not = f'its conv_cfg also reaches {bare[part.node.path]}, without a norm'
    if bare:
        model = _build_converted(result)
    rest = _convert_after_building(result, parts, nodes, model, norm, conv)
    changed = [node for node in nodes if node.path in rest | {part.node.path for part in parts}]
    if not changed:
        why = '; '.join(result.left) or 'no part of it holds a BN, SyncBN or GN that BCN replaces'
        raise NothingToConvert(f'nothing to convert: {why}')
    return changed


def _shorten_names(result: Conversion, parts: list[_Part], model: nn.Module) -> None:
    """``'BCN2d'`` is ``'BCN'``, except where a part makes ``'BCN1d'`` of it (mmseg's EncHead)."""
    owner = probe.owners(model)
    one_axis = {
        owner[name]
        for name, module in model.named_modules()
        if isinstance(module, layers.BatchChannelNorm1d)
    }
    for part in parts:
        cfg = _at(result.cfg, part.norm_path)
        if cfg['type'] == 'BCN2d' and part.node.path not in one_axis:
            cfg['type'] = 'BCN'


def _build_converted(result: Conversion) -> nn.Module:
    try:
        return probe.build(result.cfg)
    except CannotBuild as error:  # the original could be built
        raise RuntimeError(f'the conversion broke the config: {error}') from error


def _convert_after_building(
    result: Conversion,
    parts: list[_Part],
    nodes: list[Node],
    model: nn.Module,
    norm: str,
    conv: str,
) -> set[tuple]:
    """What norm_cfg and conv_cfg cannot say: the part is built, then its layers are replaced.

    Returns the paths of the nodes where this was done.
    """
    why_not = {part.node.path: part.why_not for part in parts}
    fixed, plain = _fixed_norms(model), _plain_convs(model) if conv != 'none' else {}
    done = set()
    for node in nodes:
        path = node.path
        if path in fixed:
            reason = f'its {fixed[path]} is a BatchNorm whatever the config says'
        elif path in plain and path in why_not:
            reason = why_not[path] or f'no conv_cfg reaches its {plain[path]}'
        else:
            continue
        if norm != 'BCN' or len(path) < 2 or not isinstance(node.cfg['type'], str):
            result.left.append(f'{node.where}: {reason}')
            continue
        done.add(path)
        kind = node.cfg['type']
        _set(result, (*path, 'type'), CONVERTED, f'{reason}; replaced after building')
        _set(result, (*path, 'kind'), kind)
        if conv == 'none':
            _set(result, (*path, 'convert'), dict(standardize=False))
    return done


def _plain_convs(model: nn.Module) -> dict[tuple, str]:
    """For each node: a convolution in front of a BCN that is not, and could be, standardized."""
    owner = probe.owners(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple, str] = {}
    for follower in followers(model):
        ours = any(isinstance(modules[n], layers.BatchChannelNorm) for n in follower.norms)
        standardized = isinstance(follower.conv, layers.WeightStandardized)
        if follower.normalised and ours and not standardized and standardizable(follower.conv):
            found.setdefault(owner[follower.names[0]], follower.names[0])
    return found


def _fixed_norms(model: nn.Module) -> dict[tuple, str]:
    """For each node: a BatchNorm of it that is still there, and that BCN could replace."""
    owner = probe.owners(model)
    modules = dict(model.named_modules())
    behind = {name for follower in followers(model) for name in follower.norms}
    found: dict[tuple, str] = {}
    for name, module in modules.items():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        inside = isinstance(modules[name.rpartition('.')[0]], layers.BatchChannelNorm)
        if not inside and (name in behind or not isinstance(module, nn.BatchNorm1d)):
            found.setdefault(owner[name], name)
    return found


def _parts(result: Conversion, nodes: list[Node], conv: str, keep_dcn: bool) -> list[_Part]:
    model = probe.build(result.cfg)
    owner = probe.owners(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    widths: dict[tuple, set[int]] = {}
    behind: dict[tuple, int] = {}
    paired = {name for f in followers(model) for name in f.norms}
    for name, module in modules.items():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            width = getattr(module, 'num_channels', None) or getattr(module, 'num_features', None)
            widths.setdefault(owner[name], set()).add(width)
            behind[owner[name]] = behind.get(owner[name], 0) + (name in paired)
    parts = []
    for node in nodes:
        for path, old in _norm_cfgs(node):
            kind = type_name(old)
            if kind not in NORM_FOR:
                if kind in NORM_NAMED:
                    result.left.append(f'{dotted(path)}: is BCN already')
                continue
            if not widths.get(node.path):
                continue  # takes a norm_cfg and makes nothing of it
            if kind == 'BN1d' and not behind[node.path]:
                result.left.append(f'{dotted(path)}: BN1d without a convolution in front')
                continue
            part = _Part(node, path, old, widths[node.path])
            if conv != 'none' and path == (*node.path, 'norm_cfg'):
                _plan_conv(result, part, keep_dcn)
            parts.append(part)
    return parts


def _norm_cfgs(node: Node) -> list[tuple[tuple, dict]]:
    """Every norm config of a node: its own, those inside of dicts without a type, defaults."""
    found = []
    for key in node.defaults:
        if key.endswith('norm_cfg') and key not in node.cfg:
            default = node.defaults[key]
            if isinstance(default, dict) and 'type' in default:
                found.append(((*node.path, key), default))

    def walk(value: object, path: tuple) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if isinstance(key, str) and key.endswith('norm_cfg') and isinstance(item, dict):
                    if 'type' in item:
                        found.append(((*path, key), item))
                elif not (isinstance(item, dict) and 'type' in item):  # a node of its own
                    walk(item, (*path, key))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if not (isinstance(item, dict) and 'type' in item):
                    walk(item, (*path, i))

    walk(node.cfg, node.path)
    return found


def _plan_conv(result: Conversion, part: _Part, keep_dcn: bool) -> None:
    node = part.node
    if not node.accepts('conv_cfg'):
        part.why_not = f'{node.kind.__name__} takes no conv_cfg'
        return
    part.old_conv = node.get('conv_cfg')
    kind = 'Conv2d' if part.old_conv is None else type_name(part.old_conv)
    if kind in CONV_NAMED:
        return
    if kind not in CONV_FOR:
        result.left.append(f'{node.where}: its convolutions are {kind}, which stay: no WS')
        return
    if node.get('dcn') is not None:
        if keep_dcn:
            part.why_not = 'dcn and conv_cfg exclude each other'
            return
        raise UnsupportedConfig(
            f'{node.where} uses deformable convolutions (dcn), and {node.kind.__name__} refuses '
            'dcn together with conv_cfg\n  convert all but the deformable ones (--keep-dcn), '
            f'nothing to WS (--conv none), or set {node.where}.dcn=None in the source first'
        )
    part.standardize = True


def _new_norm(part: _Part, norm: str) -> dict:
    groups = {auto_groups(width) for width in part.widths}
    if norm == 'GN':
        return dict(type='GN', num_groups=auto_groups(math.gcd(*part.widths)))
    new = dict(type=NORM_FOR[type_name(part.old_norm)])
    new['num_groups'] = groups.pop() if len(groups) == 1 else 'auto'
    return new


def _set_conv(result: Conversion, part: _Part) -> None:
    kind = 'Conv2d' if part.old_conv is None else type_name(part.old_conv)
    _set(result, (*part.node.path, 'conv_cfg'), dict(type=CONV_FOR[kind]))


def _unset_conv(result: Conversion, part: _Part) -> None:
    path = (*part.node.path, 'conv_cfg')
    result.changes = [c for c in result.changes if c.where != dotted(path)]
    node = _at(result.cfg, part.node.path)
    old = _at(result.original, part.node.path)
    if 'conv_cfg' in old:
        node['conv_cfg'] = copy.deepcopy(old['conv_cfg'])
    else:
        del node['conv_cfg']


def _bare_convs(model: nn.Module) -> dict[tuple, str]:
    """For each node: a WS convolution of it that no norm follows."""
    owner = probe.owners(model)
    found: dict[tuple, str] = {}
    for follower in followers(model):
        if isinstance(follower.conv, layers.WeightStandardized) and follower.bare:
            found.setdefault(owner[follower.names[0]], follower.names[0])
    return found


# ---- freezing and checkpoints ------------------------------------------------------------------


def _unfreeze(result: Conversion, converted: list[Node], checkpoint: str | None) -> None:
    for node in converted:
        if node.get('norm_eval'):
            _set(result, (*node.path, 'norm_eval'), False, 'True freezes the estimates')
        frozen = node.get('frozen_stages')
        # "Nothing" is -1 in most classes and 0 in some; their default says which.
        nothing = node.defaults.get('frozen_stages')
        nothing = nothing if nothing in (-1, 0) else -1
        if isinstance(frozen, int) and frozen > nothing and checkpoint is None:
            why = 'random weights must not be frozen'
            _set(result, (*node.path, 'frozen_stages'), nothing, why)


def _replace_checkpoints(result: Conversion, converted: list[Node], checkpoint: str | None) -> None:
    cfg, dropped = result.cfg, []
    paths = [node.path for node in converted]
    given = checkpoint
    for node in probe.nodes(cfg):
        # The part itself changed, or a part of it did (a Pretrained init_cfg of a whole model).
        if not any(path[: len(node.path)] == node.path for path in paths):
            continue
        init = node.get('init_cfg')
        if isinstance(init, dict) and type_name(init) in PRETRAINED:
            dropped.append(init['checkpoint'])
            new = None
            if given is not None and node.path in paths:
                new, given, target = dict(type='Pretrained', checkpoint=given), None, node.path
            _set(result, (*node.path, 'init_cfg'), new, f'was for {_layers_of(init)}')
        if node.get('pretrained') is not None and isinstance(node.get('pretrained'), str):
            dropped.append(node.get('pretrained'))
            _set(result, (*node.path, 'pretrained'), None, 'weights of other layers')
    if given is not None:
        backbone = next((p for p in paths if p[-1] == 'backbone'), None)
        if backbone is None:
            raise ValueError('checkpoint: the config has no converted backbone to load it into')
        target = backbone
        _set(result, (*target, 'init_cfg'), dict(type='Pretrained', checkpoint=given))
    if checkpoint is not None:
        _fit_checkpoint(result, target, checkpoint)
    if cfg.get('load_from'):
        dropped.append(cfg.load_from)
        _set(result, ('load_from',), None, 'weights of other layers')
    for name in dict.fromkeys(dropped):
        instead = (
            f'{checkpoint} takes its place'
            if checkpoint
            else 'training starts from random weights, which needs a longer schedule (6x on COCO); '
            'give --checkpoint with weights of WS + BCN layers '
            '(tools/model_converters/convert_checkpoint.py makes them)'
        )
        result.warnings.append(f'checkpoint {name} dropped: {instead}')


def _fit_checkpoint(result: Conversion, path: tuple, checkpoint: str) -> None:
    """Formula and affine of the part that a checkpoint is for, as the checkpoint records them."""
    if not Path(checkpoint).is_file():
        result.warnings.append(
            f'{checkpoint} is not here: the WS formula and the affine of its layers are not known '
            'and were not set; tools/analysis_tools/audit.py tells where they differ'
        )
        return
    meta = read_checkpoint(checkpoint).get('meta')
    part = _at(result.cfg, path)
    for key, place, default in (('formula', 'conv_cfg', 'paper'), ('affine', 'norm_cfg', 'group')):
        value = (meta if isinstance(meta, dict) else {}).get(key) or default
        if isinstance(part.get(place), dict):
            if part[place].get(key, default) != value:
                _set(result, (*path, place, key), value, f'that of {checkpoint}')
        elif value != default:
            result.warnings.append(
                f'{checkpoint} is for {key}={value!r}, and {dotted(path)} has no {place} to say so'
            )


def _layers_of(init: dict) -> str:
    return 'GN + WS' if 'gn_ws' in init['checkpoint'] else 'other layers'


# ---- batch size, learning rate, weight decay ---------------------------------------------------


def _set_batch_size(result: Conversion, images: int, keep_lr: bool) -> None:
    cfg = result.cfg
    loader = cfg.get('train_dataloader')
    if not isinstance(loader, dict) or not isinstance(loader.get('batch_size'), int):
        result.warnings.append('the config has no train_dataloader.batch_size: nothing was scaled')
        return
    sampler = (loader.get('sampler') or {}).get('type', '')
    if 'MultiSource' in str(sampler):
        result.warnings.append(
            f'train_dataloader.batch_size stays {loader["batch_size"]}: {sampler} composes each '
            'batch of several sources'
        )
        return
    old = loader['batch_size']
    _set(result, ('train_dataloader', 'batch_size'), images)
    gpus = _number_of_gpus(result, old)
    total = f', {gpus} GPUs: total {gpus * old} -> {gpus * images}' if gpus else ''
    rule = f'linear rule: {old} -> {images} images per GPU{total}'
    if not keep_lr and images != old:
        _scale_rates(result, images / old, rule)
    if gpus is not None and not keep_lr:
        scale = dict(cfg.get('auto_scale_lr') or dict(enable=False))
        scale['base_batch_size'] = gpus * images
        _set(result, ('auto_scale_lr',), scale, 'what the learning rate is for')
    loop = cfg.get('train_cfg') or {}
    if images != old and loop.get('max_iters'):
        result.warnings.append(
            f'the schedule counts iterations: {loop["max_iters"]} of them now see '
            f'{images / old:g} times the images; for the same number of images multiply '
            f'train_cfg.max_iters and the param_scheduler by {old / images:g}'
        )


def _number_of_gpus(result: Conversion, batch_size: int) -> int | None:
    """From a file name such as ``..._4xb2-...``, else from auto_scale_lr."""
    named = re.search(r'_(\d+)xb\d+', Path(result.source or '').stem)
    if named:
        return int(named[1])
    base = (result.cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    return base // batch_size if isinstance(base, int) and base % batch_size == 0 else None


def _scale_rates(result: Conversion, factor: float, rule: str) -> None:
    cfg = result.cfg
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get('lr'), (int, float)):
        result.warnings.append('the config has no optim_wrapper.optimizer.lr to scale')
        return
    _set(result, ('optim_wrapper', 'optimizer', 'lr'), _rounded(optimizer['lr'] * factor), rule)
    schedulers = cfg.get('param_scheduler') or []
    new = copy.deepcopy(schedulers)
    for scheduler in new if isinstance(new, list) else [new]:
        if scheduler.get('eta_min'):  # an absolute rate, unlike factors
            scheduler['eta_min'] = _rounded(scheduler['eta_min'] * factor)
    if new != schedulers:
        _set(result, ('param_scheduler',), new, 'eta_min by the same rule')


def _rounded(value: float) -> float:
    return float(f'{value:.6g}')


def _spare_norms_from_decay(result: Conversion) -> None:
    wrapper = result.cfg.get('optim_wrapper')
    if not isinstance(wrapper, dict) or 'constructor' in wrapper:
        return
    if not (wrapper.get('optimizer') or {}).get('weight_decay'):
        return
    paramwise = wrapper.get('paramwise_cfg') or {}
    if 'norm_decay_mult' not in paramwise:
        why = 'scales and shifts need no weight decay'
        if not paramwise:
            path = ('optim_wrapper', 'paramwise_cfg')
            _set(result, path, dict(norm_decay_mult=0.0), why)
        else:
            _set(result, ('optim_wrapper', 'paramwise_cfg', 'norm_decay_mult'), 0.0, why)


# ---- editing -----------------------------------------------------------------------------------


def _at(cfg: Config, path: tuple) -> object:
    value = cfg._cfg_dict  # Config itself has no `in`
    for key in path:
        value = value[key]
    return value


def _set(result: Conversion, path: tuple, value: object, why: str = '') -> None:
    """Sets a value of the converted config and notes the change; equal values are no change."""
    parent = _at(result.cfg, path[:-1])
    missing = isinstance(parent, dict) and path[-1] not in parent
    before = None if missing else parent[path[-1]]
    if not missing and before == value:
        return
    if isinstance(value, dict):
        value = ConfigDict(value)
    parent[path[-1]] = value
    result.changes.append(Change(dotted(path), '(default)' if missing else before, value, why))


def _one_line(value: object) -> str:
    if isinstance(value, dict):
        items = ', '.join(f'{k}={_one_line(v)}' for k, v in value.items() if k != '_scope_')
        return f'dict({items})'
    if isinstance(value, (list, tuple)):
        return '[' + ', '.join(_one_line(item) for item in value) + ']'
    return value if value == '(default)' else repr(value)


# ---- writing -----------------------------------------------------------------------------------


def write_config(conversion: Conversion, path: str | Path) -> str:
    """Writes a converted config and reads it back.

    A child of the source with the differences alone, where the source has a name or a path that a
    config can inherit from; otherwise the complete config, and a warning says why.

    Args:
        conversion: From `convert_config`.
        path: The file to write, ``.py``.

    Returns:
        The text of the file.

    Raises:
        ValueError: ``path`` does not end in ``.py``, or is the source itself.
        RuntimeError: the file that was written does not give the converted config (a defect).
    """
    path = Path(path)
    if path.suffix != '.py' or path.is_dir():
        raise ValueError(f'a config is a .py file\n  got {path}')
    if conversion.source and path.resolve() == Path(conversion.source).resolve():
        raise ValueError(f'{path} is the source itself: name another file')
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.stem}_{os.getpid()}_part.py')
    wanted = _plain(conversion.cfg)
    text, why = _child(conversion, path.parent)
    try:
        if text is not None:
            part.write_text(text)
            try:
                if _plain(Config.fromfile(str(part))) != wanted:
                    why = 'merging the source and the differences does not give it'
            except MERGE_ERRORS as error:
                why = str(error).partition('. ')[0].partition('\n')[0]
        if why:
            warning = f'{path.name} is written as a complete config, not as a child: {why}'
            if warning not in conversion.warnings:
                conversion.warnings.append(warning)
            text = _complete(conversion)
            part.write_text(text)
            if _plain(Config.fromfile(str(part))) != wanted:
                raise RuntimeError(
                    f'the config written to {path} does not read back as it was converted'
                )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return text


def _plain(cfg: Config) -> object:
    """For comparison: without what depends on the way a config was read."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != '_scope_'}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(cfg.to_dict())


def _header(conversion: Conversion) -> str:
    name = conversion.base or (Path(conversion.source).name if conversion.source else 'a config')
    lines = [f'# {name} with WS + BCN, by tools/model_converters/convert_config.py.']
    lines += [f'# Left as it is: {text}' for text in conversion.left]
    lines += [f'# Warning: {text}' for text in conversion.warnings]
    return '\n'.join(line.replace('\n', ' ') for line in lines) + '\n'


def _child(conversion: Conversion, folder: Path) -> tuple[str | None, str]:
    """The text of a config that inherits from the source; None and why, where none can."""
    base = conversion.base
    if base is None:
        if not conversion.source:
            return None, 'it was given without a file'
        if 'site-packages' in Path(conversion.source).parts:
            return None, f'mmengine cannot inherit from {Path(conversion.source).name} by name'
        base = os.path.relpath(Path(conversion.source).resolve(), folder.resolve())
    overrides = _difference(conversion.original.to_dict(), conversion.cfg.to_dict())
    return f'{_header(conversion)}_base_ = {base!r}\n{Config(overrides).pretty_text}', ''


def _complete(conversion: Conversion) -> str:
    return _header(conversion) + conversion.cfg.pretty_text


def _difference(old: dict, new: dict) -> dict:
    """What a child config says to get from ``old`` to ``new``; mmengine merges key by key."""
    result = {}
    for key, value in new.items():
        if key in old and old[key] == value:
            continue
        if not isinstance(value, dict) or key not in old:
            result[key] = value
        elif isinstance(old[key], dict) and old[key].keys() <= value.keys():
            result[key] = _difference(old[key], value)
        else:
            result[key] = dict(_delete_=True, **value)
    return result
