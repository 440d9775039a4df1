"""Checkpoints that a config names: of another formula, of other layers, or of another shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmengine.config import Config
from torch import nn

from wsbcn_mm.audit import Finding
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.audit.line import line
from wsbcn_mm.openmmlab.conversion import recipe, weights
from wsbcn_mm.openmmlab.conversion.probe import Node
from wsbcn_mm.openmmlab.filling import compare


@dataclasses.dataclass(frozen=True)
class Named:
    """A checkpoint that a config names: where, which, and what its tensors begin with there."""

    where: str
    source: str
    prefix: str = ''


def named_checkpoints(cfg: Config, nodes: list[Node]) -> list[Named]:
    named = []
    for node in nodes:
        init = node.get('init_cfg')
        if isinstance(init, dict) and isinstance(init.get('checkpoint'), str):
            named.append(Named(node.where, init['checkpoint'], init.get('prefix') or ''))
        pretrained = recipe.pretrained_argument(node)
        if pretrained is not None:
            named.append(Named(node.where, pretrained))
    if isinstance(cfg.get('load_from'), str):
        named.append(Named('load_from', cfg.load_from))
    return named


def wrong_checkpoints(
    cfg: Config, nodes: list[Node], model: nn.Module, owner: dict[str, str]
) -> list[Finding]:
    """Checkpoints of another WS formula, of other layers, or that do not fill their part."""
    formulas: dict[str, str] = {}  # by part, the first of each
    norms: dict[str, type] = {}
    for name, module in model.named_modules():
        if isinstance(module, WeightStandardized):
            formulas.setdefault(owner[name], module.formula)
        if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
            norms.setdefault(owner[name], type(module))
    findings = []
    for named in named_checkpoints(cfg, nodes):
        where, source = named.where, named.source
        parts = [p for p in norms if where == 'load_from' or p.startswith(where)]
        if not parts:
            continue
        part = next((p for p in parts if p in formulas), None)
        if part is not None or any(issubclass(norms[p], BatchChannelNorm) for p in parts):
            layers, formula = weights.kind_of(source)
            if layers == 'BN':
                why = f'{source} was trained with plain convolutions and BatchNorm'
                fix = (
                    'tools/model_converters/convert_checkpoint.py, or a checkpoint of these layers'
                )
                findings.append(Finding('warning', 'checkpoint', where, why, fix))
                continue
            if formula and part and formulas[part] != formula:
                why = (
                    f'{source} was trained with the WS formula {formula!r}, the layers compute '
                    f'{formulas[part]!r}: up to 6 % apart at usual weights'
                )
                fix = line(f'{part}.conv_cfg', f"dict(type='WSConv2d', formula={formula!r})")
                findings.append(Finding('error', 'formula', part, why, fix))
        findings += _unfilled(named, model, owner)
    return findings


def _unfilled(named: Named, model: nn.Module, owner: dict[str, str]) -> list[Finding]:
    """A file of another depth, of another affine, of other classes."""
    if not Path(named.source).is_file():
        return []
    state, _ = weights.read(named.source)
    if any('.pbn.' in key for key in state):  # the authors' own names: to be converted first
        return []
    prefix = f'{named.prefix.rstrip(".")}.' if named.prefix else ''
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    whole = named.where in ('load_from', 'model')
    part = model if whole else _module_at(model, owner, named.where)
    found = compare(part, state)
    if not (found.missing or found.other_shape):
        return []
    # Heads of other classes are left to be trained anew; a backbone is not.
    unfilled = len(found.missing) + len(found.other_shape)
    level = 'note' if whole and unfilled < len(found.filled) else 'warning'
    why = f'{named.source} {"; ".join(text.strip() for text in str(found).splitlines())}'
    fix = 'a checkpoint of these layers: depth, norm, affine and classes are those of the config'
    return [Finding(level, 'checkpoint', named.where, why, fix)]


def _module_at(model: nn.Module, owner: dict[str, str], where: str) -> nn.Module:
    """The module that a node of the config was built to: the outermost that belongs to it."""
    return model.get_submodule(next(name for name, place in owner.items() if place == where))
