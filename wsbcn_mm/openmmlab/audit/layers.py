"""Layers of a model: the line of the config that mends them, WS where it can be, groups."""

from __future__ import annotations

import copy
import dataclasses
import math

from mmengine.config import Config
from torch import nn

from wsbcn_mm.audit import Finding, audit_model
from wsbcn_mm.checks import auto_groups
from wsbcn_mm.layers import BatchChannelNorm
from wsbcn_mm.openmmlab.audit.line import line, owners
from wsbcn_mm.openmmlab.config import type_name
from wsbcn_mm.openmmlab.conversion import probe, recipe
from wsbcn_mm.openmmlab.conversion.probe import Node
from wsbcn_mm.openmmlab.places import value_at
from wsbcn_mm.openmmlab.registry import NORM_NAMED


def with_config_line(finding: Finding, nodes: dict[str, Node]) -> Finding:
    """The finding with the config line that mends it, where there is one."""
    part = finding.where.partition(' (')[0]
    node = nodes.get(part)
    if node is None:
        return finding
    if finding.code in ('batch-statistics', 'sync-bn-without-processes', 'frozen-bn'):
        if node.accepts('norm_cfg') or 'norm_cfg' in node.cfg:
            # What the base's norm_cfg holds would stay beside ours.
            delete = '_delete_=True, ' if 'norm_cfg' in node.cfg else ''
            fix = line(f'{part}.norm_cfg', f"dict({delete}type='BCN', num_groups='auto')")
            fix += '; tools/model_converters/convert_config.py does it everywhere'
            return dataclasses.replace(finding, fix=fix)
        why = f'{finding.why}; {node.kind.__name__} takes no norm_cfg'
        fix = 'wsbcn_mm.convert.convert_model on the built model'
        return dataclasses.replace(finding, level='note', why=why, fix=fix)
    if finding.code == 'frozen-estimates' and (frozen := recipe.frozen_norms(node)):
        fix = '; '.join(line(f'{part}.{key}', 'False') for key in frozen)
        return dataclasses.replace(finding, fix=fix)
    if finding.code == 'ws-without-norm':
        return dataclasses.replace(finding, fix=line(f'{part}.conv_cfg', 'None'))
    if finding.code == 'norm-without-ws' and node.accepts('conv_cfg'):
        fix = line(f'{part}.conv_cfg', "dict(type='WSConv2d')")
        return dataclasses.replace(finding, fix=fix)
    return finding


def where_possible(finding: Finding, cfg: Config, nodes: dict[str, Node]) -> Finding:
    """Norms without WS are a warning where the part could have WS, which only a build tells."""
    node = nodes.get(finding.where.partition(' (')[0])
    if finding.code != 'norm-without-ws' or node is None or not node.accepts('conv_cfg'):
        return finding
    if node.get('conv_cfg') is not None or node.get('dcn') is not None:
        return finding
    trial = copy.deepcopy(cfg)
    value_at(trial, node.path)['conv_cfg'] = dict(type='WSConv2d')
    model = probe.build(trial)
    after = audit_model(model, part_of=owners(model).__getitem__)
    if any(f.code == 'ws-without-norm' and f.where.startswith(node.where) for f in after):
        return finding
    return dataclasses.replace(finding, level='warning')


def wrong_groups(cfg: Config, nodes: list[Node]) -> list[Finding]:
    """Groups that do not divide a width; mends ``cfg`` so that it can be built."""
    grouped = [
        node
        for node in nodes
        if isinstance(node.cfg.get('norm_cfg'), dict)
        and isinstance(node.cfg['norm_cfg'].get('num_groups'), int)
    ]
    places = [node.path for node in grouped]
    trial = copy.deepcopy(cfg)
    for place in places:
        value_at(trial, place)['norm_cfg'] = dict(type='BN')
    model = probe.build(trial)
    owner = probe.owners(model)
    findings = []
    for node in grouped:
        norm_cfg = node.cfg['norm_cfg']
        groups = norm_cfg['num_groups']
        widths = {
            module.num_features: name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and owner[name] == node.path
            and not isinstance(model.get_submodule(name.rpartition('.')[0]), BatchChannelNorm)
        }
        wrong = [width for width in widths if groups < 1 or width % groups]
        if not wrong:
            continue
        ours = type_name(norm_cfg) in NORM_NAMED
        norm_cfg['num_groups'] = 'auto' if ours else auto_groups(math.gcd(*widths))
        why = (
            f'{groups} groups do not divide {wrong[0]} channels of {widths[wrong[0]]} '
            f'(widths {sorted(widths)}, which fit {sorted({auto_groups(w) for w in widths})}): '
            'the model cannot be built'
        )
        fix = line(f'{node.where}.norm_cfg.num_groups', repr(norm_cfg['num_groups']))
        findings.append(Finding('error', 'groups', f'{node.where}.norm_cfg', why, fix))
    return findings
