"""Norms and convolutions of a config: which become BCN and WS, and what cannot be said in it.

``norm_cfg`` and ``conv_cfg`` are set where a part takes them. Only a build shows which convolutions
a conv_cfg reaches and which norms no norm_cfg does: a part where they are not the right ones is
built as it is, and its layers are replaced afterwards (`wsbcn_mm.openmmlab.layers.Converted`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from wsbcn_mm.checks import auto_groups
from wsbcn_mm.layers import BatchChannelNorm, BatchChannelNorm1d, WeightStandardized
from wsbcn_mm.networks.layer_kinds import fan_in, is_conv, num_channels
from wsbcn_mm.networks.own_classes import normalises_as_its_kind
from wsbcn_mm.openmmlab.config import type_name
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.conversion.changes import Conversion
from wsbcn_mm.openmmlab.conversion.options import ConversionOptions
from wsbcn_mm.openmmlab.conversion.probe import CannotBuild, Node
from wsbcn_mm.openmmlab.places import Place, dotted, value_at
from wsbcn_mm.openmmlab.registry import CONV_FOR, CONV_NAMED, CONVERTED, NORM_FOR, NORM_NAMED
from wsbcn_mm.structure import followers, norms_of_vectors, standardizable

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
ANY_DIM = ('SyncBN', 'MMSyncBN', 'SyncBatchNorm', 'GN', 'GroupNorm')  # one class for 1d to 3d


class NothingToConvert(ValueError):
    """The config has no convolution with a BatchNorm or GroupNorm behind it."""


@dataclass
class Part:
    """A node whose norms change: what they are for, and what goes there.

    Attributes:
        node: The node.
        norm_place: Where its norm_cfg stands.
        old_norm: What it is.
        widths: Of all norms of the node.
        dims: Over how many axes of a map the convolutions in front of them go.
        old_conv: Its conv_cfg.
        standardize: Whether its conv_cfg becomes WS.
        own_kind: What they are called, where conv_cfg has no name for their WS form.
        why_no_conv_cfg: Why not, where conv_cfg is not the way and something else may be.
    """

    node: Node
    norm_place: Place
    old_norm: dict
    widths: set[int]
    dims: set[int]
    old_conv: dict | None = None
    standardize: bool = False
    own_kind: str = ''
    why_no_conv_cfg: str = ''


def convert_layers(
    conversion: Conversion, options: ConversionOptions, kept: Place | None = None
) -> list[Node]:
    """Sets norm_cfg and conv_cfg.

    Args:
        conversion: Its config is changed.
        options: Which layers.
        kept: A place of the config, ``('model', 'backbone')``: it stays with all below it.

    Returns:
        The nodes that changed.

    Raises:
        NothingToConvert: none did.
        CannotBuild: the config as it is cannot be built.
    """
    nodes = [
        node
        for node in probe.nodes(conversion.cfg)
        if kept is None or node.path[: len(kept)] != kept
    ]
    parts = _parts(conversion, nodes, options)
    for part in parts:
        conversion.set(part.norm_place, _new_norm(part, options.norm))
        if part.standardize:
            kind = 'Conv2d' if part.old_conv is None else type_name(part.old_conv)
            conversion.set((*part.node.path, 'conv_cfg'), dict(type=CONV_FOR[kind]))
    model = _build_converted(conversion)
    _shorten_names(conversion, parts, model)
    without_norm = _standardized_without_norm(model)
    for part in parts:
        if part.standardize and part.node.path in without_norm:
            part.standardize = False
            conversion.restore((*part.node.path, 'conv_cfg'))
            part.why_no_conv_cfg = (
                f'its conv_cfg also reaches {without_norm[part.node.path]}, without a norm'
            )
    if without_norm:
        model = _build_converted(conversion)
    changed = {part.node.path for part in parts}
    reasons = _reasons_to_convert_after_building(model, parts, options)
    for part in parts:
        if part.own_kind and part.node.path not in reasons:
            where = part.node.where
            conversion.left.append(
                f'{where}: its convolutions are {part.own_kind}, which stay: no WS'
            )
    convert = dict(standardize=False) if options.conv == 'none' else {}
    if options.keep_dcn:
        convert['deformable'] = False
    if options.conv != 'none':
        conversion.left += _without_standardization(model)
    for node in nodes:
        if node.path in reasons and _convert_after_building(
            conversion, node, reasons[node.path], options.norm, convert
        ):
            changed.add(node.path)
    if not changed:
        why = '; '.join(conversion.left)
        why = why or 'no part of it holds a BN, SyncBN or GN that BCN replaces'
        raise NothingToConvert(f'nothing to convert: {why}')
    return [node for node in nodes if node.path in changed]


def _build_converted(conversion: Conversion) -> nn.Module:
    try:
        return probe.build(conversion.cfg)
    except CannotBuild as error:  # the original could be built
        raise RuntimeError(f'the conversion broke the config: {error}') from error


# ---- what the config says ----------------------------------------------------------------------


def _parts(conversion: Conversion, nodes: list[Node], options: ConversionOptions) -> list[Part]:
    model = probe.build(conversion.cfg)
    owner = probe.owners(model)
    behind_convs: set[str] = set()
    dims: dict[Place, set[int]] = {}
    for follower in followers(model):
        behind_convs |= set(follower.norms)
        for norm in follower.norms:
            dims.setdefault(owner[norm], set()).add(follower.dim)
    widths: dict[Place, set[int]] = {}
    has_conv: set[Place] = set()  # nodes with a norm behind a convolution
    vectors = norms_of_vectors(model)
    has_vectors = {owner[name] for name in vectors}
    scalars: dict[Place, str] = {}  # convolutions that WS cannot standardize
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NORM_LAYERS):
            width = num_channels(module)
            if width is not None:
                widths.setdefault(owner[name], set()).add(width)
            if name in behind_convs:
                has_conv.add(owner[name])
        elif is_conv(module) and fan_in(module) == 1:
            scalars.setdefault(owner[name], name)
    parts = []
    for node in nodes:
        for place, old in _norm_cfgs(node):
            kind = type_name(old)
            if kind not in NORM_FOR:
                if kind in NORM_NAMED:
                    conversion.left.append(f'{dotted(place)}: is BCN already')
                continue
            if not widths.get(node.path):
                continue  # takes a norm_cfg and makes nothing of it
            of_vectors = kind == 'BN1d' or node.path in has_vectors
            if of_vectors and node.path not in has_conv:
                conversion.left.append(f'{dotted(place)}: {kind} without a convolution in front')
                continue
            part = Part(node, place, old, widths[node.path], dims.get(node.path, set()))
            if options.conv != 'none' and place == (*node.path, 'norm_cfg'):
                _plan_conv(part, scalars.get(node.path))
            parts.append(part)
    return parts


def _norm_cfgs(node: Node) -> list[tuple[Place, dict]]:
    """Every norm config of a node: its own, those inside of dicts without a type, defaults."""
    norm_cfgs: list[tuple[Place, dict]] = []
    for key, default in node.defaults.items():
        shown = not key.endswith('norm_cfg') or key in node.cfg
        if not shown and isinstance(default, dict) and 'type' in default:
            norm_cfgs.append(((*node.path, key), default))

    def walk(value: Any, place: Place) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if isinstance(key, str) and key.endswith('norm_cfg') and isinstance(item, dict):
                    if 'type' in item:
                        norm_cfgs.append(((*place, key), item))
                elif not (isinstance(item, dict) and 'type' in item):  # a node of its own
                    walk(item, (*place, key))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if not (isinstance(item, dict) and 'type' in item):
                    walk(item, (*place, i))

    walk(node.cfg, node.path)
    return norm_cfgs


def _plan_conv(part: Part, scalar: str | None) -> None:
    """Whether conv_cfg becomes WS; ``scalar``: a convolution of the part with a fan-in of 1."""
    node = part.node
    if not node.accepts('conv_cfg'):
        part.why_no_conv_cfg = f'{node.kind.__name__} takes no conv_cfg'
        return
    part.old_conv = node.get('conv_cfg')
    kind = 'Conv2d' if part.old_conv is None else type_name(part.old_conv)
    if kind in CONV_NAMED:
        return
    if kind not in CONV_FOR:  # a class of its own: its WS form is made of the layer that was built
        part.own_kind = kind
        part.why_no_conv_cfg = f'its convolutions are {kind}'
        return
    if node.get('dcn') is not None:
        part.why_no_conv_cfg = 'dcn and conv_cfg exclude each other'
        return
    if scalar is not None:
        part.why_no_conv_cfg = f'its {scalar} has a fan-in of 1, which WS cannot standardize'
        return
    part.standardize = True


def _new_norm(part: Part, norm: str) -> dict[str, Any]:
    if norm == 'GN':
        return dict(type='GN', num_groups=auto_groups(math.gcd(*part.widths)))
    groups = {auto_groups(width) for width in part.widths}
    kind = type_name(part.old_norm)
    new = NORM_FOR[kind]
    if kind in ANY_DIM and len(part.dims) == 1:  # which norm it is the convolutions tell
        new = f'BCN{max(part.dims)}d'
    return dict(
        type=new,
        num_groups=groups.pop() if len(groups) == 1 else 'auto',
    )


# ---- what a build shows ------------------------------------------------------------------------


def _shorten_names(conversion: Conversion, parts: list[Part], model: nn.Module) -> None:
    """``'BCN2d'`` is ``'BCN'``, except where a part makes ``'BCN1d'`` of it (mmseg's EncHead)."""
    owner = probe.owners(model)
    one_dim = {
        owner[name]
        for name, module in model.named_modules()
        if isinstance(module, BatchChannelNorm1d)
    }
    for part in parts:
        cfg = value_at(conversion.cfg, part.norm_place)
        if cfg['type'] == 'BCN2d' and part.node.path not in one_dim:
            cfg['type'] = 'BCN'


def _standardized_without_norm(model: nn.Module) -> dict[Place, str]:
    """For each node: the first WS convolution of it that no norm follows."""
    owner = probe.owners(model)
    first: dict[Place, str] = {}
    for follower in followers(model):
        if isinstance(follower.conv, WeightStandardized) and follower.unnormalised:
            first.setdefault(owner[follower.names[0]], follower.names[0])
    return first


def _reasons_to_convert_after_building(
    model: nn.Module, parts: list[Part], options: ConversionOptions
) -> dict[Place, str]:
    """For each node with layers that norm_cfg and conv_cfg did not reach: why they did not."""
    reasons = {
        place: f'its {name} is a BatchNorm whatever the config says'
        for place, name in _fixed_norms(model).items()
    }
    if options.conv == 'none':
        return reasons
    why_no_conv_cfg = {part.node.path: part.why_no_conv_cfg for part in parts}
    for place, name in _plain_convs(model, options.keep_dcn).items():
        if place in why_no_conv_cfg:
            why = why_no_conv_cfg[place] or f'no conv_cfg reaches its {name}'
            reasons.setdefault(place, why)
    return reasons


def _convert_after_building(
    conversion: Conversion, node: Node, reason: str, norm: str, convert: dict[str, bool]
) -> bool:
    """Has a part built and its layers replaced then; False and a note where that cannot be.

    ``convert``: arguments of `wsbcn_mm.convert.convert_model`.
    """
    if norm != 'BCN' or len(node.path) < 2 or not isinstance(node.cfg['type'], str):
        conversion.left.append(f'{node.where}: {reason}')
        return False
    conversion.build_from_kind(node.path, CONVERTED, f'{reason}; replaced after building')
    if convert:
        conversion.set((*node.path, 'convert'), convert)
    return True


def _plain_convs(model: nn.Module, keep_dcn: bool) -> dict[Place, str]:
    """For each node: a convolution in front of a BCN that is not, and shall be, standardized."""
    owner = probe.owners(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[Place, str] = {}
    for follower in followers(model):
        ours = any(isinstance(modules[n], BatchChannelNorm) for n in follower.norms)
        stays = isinstance(follower.conv, WeightStandardized)
        stays |= keep_dcn and not isinstance(follower.conv, _ConvNd)
        if follower.normalised and ours and not stays and standardizable(follower.conv):
            first.setdefault(owner[follower.names[0]], follower.names[0])
    return first


def _without_standardization(model: nn.Module) -> list[str]:
    """For each node: its convolutions in front of a BCN that have no WS form."""
    owner = probe.owners(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[Place, str], list[str]] = {}
    for follower in followers(model):
        ours = any(isinstance(modules[n], BatchChannelNorm) for n in follower.norms)
        name, kind = follower.names[0], type(follower.conv).__name__
        stays = isinstance(follower.conv, WeightStandardized) or kind == 'ConvWS2d'
        # `standardizable` last: of classes of their own it tries a copy
        if ours and not stays and fan_in(follower.conv) > 1 and not standardizable(follower.conv):
            found.setdefault((owner[name], kind), []).append(name)
    return [
        f'{dotted(place)}: {len(names)} {kind} (first {names[0]}) have no WS form: their output is '
        'not that of their weight, or they take other inputs than a convolution of torch'
        for (place, kind), names in found.items()
    ]


def _fixed_norms(model: nn.Module) -> dict[Place, str]:
    """For each node: a BatchNorm of it that is still there, and that BCN could replace."""
    owner = probe.owners(model)
    modules = dict(model.named_modules())
    behind_convs = {name for follower in followers(model) for name in follower.norms}
    vectors = norms_of_vectors(model)
    first: dict[Place, str] = {}
    for name, module in modules.items():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        part_of_bcn = isinstance(modules[name.rpartition('.')[0]], BatchChannelNorm)
        of_vectors = isinstance(module, nn.BatchNorm1d) or name in vectors
        if part_of_bcn or (of_vectors and name not in behind_convs):
            continue
        if normalises_as_its_kind(module):
            first.setdefault(owner[name], name)
    return first
