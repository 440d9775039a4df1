"""What becomes of a backbone that was pretrained with BatchNorm: kept, or converted and retrained.

Weights of BN layers do not fit WS + BCN ones: WS takes the mean out of every filter. A converted
backbone therefore starts from random weights, which a small data set cannot make up for. Kept, it
stays a BN network in evaluation mode, frozen (`wsbcn_mm.openmmlab.layers.Kept`), and WS + BCN go
where training starts anew: neck and heads.
"""

from __future__ import annotations

import copy

from torch import nn

from wsbcn_mm.openmmlab.checkpoints import at_hand
from wsbcn_mm.openmmlab.config import type_name
from wsbcn_mm.openmmlab.conversion import probe, recipe, weights
from wsbcn_mm.openmmlab.conversion.changes import Conversion
from wsbcn_mm.openmmlab.conversion.options import ConversionOptions
from wsbcn_mm.openmmlab.conversion.probe import Node
from wsbcn_mm.openmmlab.places import Place, value_at
from wsbcn_mm.openmmlab.registry import KEPT

BACKBONE: Place = ('model', 'backbone')


def settle(conversion: Conversion, options: ConversionOptions) -> bool:
    """Decides whether the backbone is kept, and sets what keeping needs.

    Args:
        conversion: Its config is changed: ``type='Kept'``, or back where it is to be converted.
        options: Its ``backbone``, and the ``checkpoint`` that was given for a converted one.

    Returns:
        Whether it is kept.

    Raises:
        ValueError: it is to be kept and there is none, or none with BatchNorm, or a checkpoint of
            other layers was given as well.
    """
    node = next((n for n in probe.nodes(conversion.cfg) if n.path == BACKBONE), None)
    source = None if node is None else weights_of(conversion, node)
    if options.backbone == 'keep':
        if options.checkpoint is not None:
            raise ValueError(
                'backbone="keep" keeps the BN backbone with its own weights, and checkpoint has '
                'those of a converted one: give one of the two'
            )
        if node is None or not _batch_norms(conversion):
            raise ValueError(
                'backbone="keep": the config has no model.backbone with BatchNorm\n  use '
                'backbone="convert"'
            )
        if source is None:
            conversion.warnings.append(
                'the backbone is kept, and no checkpoint fills it: set '
                "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...) before training"
            )
        _keep(conversion, node)
        return True
    if options.backbone == 'convert' or options.checkpoint is not None:
        _give_up(conversion, node)
        return False
    if node is None or not _batch_norms(conversion):
        return False
    if not _is_kept(node) and not _fits(conversion, source):
        return False
    _keep(conversion, node)
    return True


def _fits(conversion: Conversion, source: str | None) -> bool:
    """Whether a backbone's weights are BatchNorm's and can be had, so that it is worth keeping."""
    if source is None or weights.kind_of(source)[0] != 'BN':
        return False
    if not at_hand(source):
        conversion.warnings.append(
            f'{source} is not on this machine: the backbone is converted and starts from random '
            'weights; --backbone keep keeps it with these weights, which is better wherever they '
            'can be had (VOC subset, 400 steps: mIoU 20.6 against 10.9, docs/study.md)'
        )
        return False
    return True


def weights_of(conversion: Conversion, node: Node) -> str | None:
    """The checkpoint that fills the backbone: its own, or the segmenter's ``pretrained``."""
    own = recipe.pretrained_init(node) or recipe.pretrained_argument(node)
    whole = conversion.cfg.model.get('pretrained')
    return own or (whole if isinstance(whole, str) else None)


def _batch_norms(conversion: Conversion) -> bool:
    model = probe.build(conversion.cfg)
    owner = probe.owners(model)
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and owner[name][: len(BACKBONE)] == BACKBONE
        for name, module in model.named_modules()
    )


def _is_kept(node: Node | None) -> bool:
    return node is not None and type_name(node.cfg) == KEPT


def _keep(conversion: Conversion, node: Node) -> None:
    if not _is_kept(node):
        why = 'its weights and statistics stay; with frozen=False the statistics alone'
        conversion.build_from_kind(BACKBONE, KEPT, why)
    conversion.left.append(
        f'model.backbone: {node.kind.__name__} with BatchNorm and its pretrained weights'
    )
    add_norms(conversion)


def _give_up(conversion: Conversion, node: Node | None) -> None:
    """A backbone that was kept is one like any other again."""
    if node is not None and _is_kept(node):
        rest = {key: value for key, value in node.cfg.items() if key not in ('kind', 'frozen')}
        conversion.set(BACKBONE, {**rest, 'type': node.cfg['kind']}, 'is not kept any more')


def add_norms(conversion: Conversion) -> None:
    """Gives neck and heads a norm where they take one, have none, and no part beside them has one.

    Detectors have their only norms in the backbone. Where that is kept there would be nothing to
    convert, although necks and heads start anew and profit. Parts in which a norm changes nothing
    (a head of linear layers) or that cannot be built with one stay as they are.

    Args:
        conversion: Its config gets ``norm_cfg=dict(type='BN')``, to be converted.
    """
    if _norm_outside(conversion):
        return
    for node in probe.nodes(conversion.cfg):
        inside = len(node.path) > 1 and node.path[: len(BACKBONE)] != BACKBONE
        if not inside or not node.accepts('norm_cfg') or node.get('norm_cfg') is not None:
            continue
        trial = copy.deepcopy(conversion.cfg)
        value_at(trial, node.path)['norm_cfg'] = dict(type='BN')
        try:
            model = probe.build(trial)
        except probe.CannotBuild:
            continue
        owner = probe.owners(model)
        if any(_is_norm(m) and owner[name] == node.path for name, m in model.named_modules()):
            why = 'the backbone is kept: here training starts anew'
            conversion.set((*node.path, 'norm_cfg'), dict(type='BN'), why)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))


def _norm_outside(conversion: Conversion) -> bool:
    model = probe.build(conversion.cfg)
    owner = probe.owners(model)
    return any(
        _is_norm(module) and owner[name][: len(BACKBONE)] != BACKBONE
        for name, module in model.named_modules()
    )
