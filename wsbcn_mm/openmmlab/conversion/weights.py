"""What a checkpoint is for, and what is wrong with it, by its name, keys and tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsbcn_mm.audit import Finding
from wsbcn_mm.openmmlab.checkpoints import (
    is_address,
    is_dense,
    meta_of,
    read_checkpoint,
    state_dict_of,
)

CONVERTER = 'tools/model_converters/convert_checkpoint.py'


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, without ``module.``, and the ``meta`` of a checkpoint file."""
    content = read_checkpoint(path)
    state = state_dict_of(content, path)
    return state, meta_of(content)


def kind_of(source: str) -> tuple[str | None, str | None]:
    """Layers and WS formula of a checkpoint, as far as its name or its keys tell.

    Args:
        source: A file, or an address such as ``'torchvision://resnet50'``.

    Returns:
        ``'BN'``, ``'GN + WS'``, ``'BCN + WS'`` or None; the formula or None.
    """
    if is_address(source) or not Path(source).is_file():
        if re.search(r'gn[_-]ws', source):
            return 'GN + WS', 'std_eps'
        if re.match(r'(torchvision|open-mmlab)://', source):
            return 'BN', None
        return None, None
    state, meta = read(source)
    if any('.pbn.' in key for key in state):
        return 'BCN + WS', 'var_eps'
    formula = meta.get('formula')
    if formula is None and isinstance(meta.get('cfg'), str):
        formula = _formula_in(meta['cfg'])
    if any(key.endswith('.batch_weight') for key in state):
        return 'BCN + WS', formula
    return ('BN' if any(key.endswith('running_mean') for key in state) else None), formula


def _formula_in(config: str) -> str | None:
    """The WS formula that the config inside of a checkpoint trained with."""
    if 'WSConv' not in config and 'ConvWS' not in config:
        return None
    match = re.search(r'formula=[\'"](\w+)[\'"]', config)
    if match:
        return match[1]
    return 'paper' if 'WSConv' in config else 'std_eps'


def findings_of(state: dict[str, Tensor], path: str | Path) -> list[Finding]:
    """What the tensors of a checkpoint show to be wrong; ``path`` names it."""
    findings = []
    empty = [key for key, value in state.items() if value.is_meta or not is_dense(value)]
    if empty:
        where = f'{path} ({len(empty)} tensors, first {empty[0]})'
        why = 'has no values that can be copied: saved on the meta device, sparse, quantized'
        fix = 'save it from the trained model: torch.save(model.state_dict(), ...)'
        findings.append(Finding('error', 'no-values', where, why, fix))
        state = {key: value for key, value in state.items() if key not in set(empty)}
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            why = 'holds values that are not finite'
            fix = 'an earlier checkpoint; statistics alone: tools/model_converters/recalibrate.py'
            findings.append(Finding('error', 'not-finite', key, why, fix))
    bcn = [key.removesuffix('batch_weight') for key in state if key.endswith('.batch_weight')]
    in_bcn = {f'{prefix}bn.running_mean' for prefix in bcn}
    bn = [key for key in state if key.endswith('running_mean') and key not in in_bcn]
    if any('.pbn.' in key for key in state):
        why = "is in the layout of the authors' BCN code, trained with the WS formula 'var_eps'"
        fix = f"{CONVERTER} --from authors-bcn, and conv_cfg=dict(formula='var_eps')"
        findings.append(Finding('warning', 'layout', str(path), why, fix))
    elif bn:
        where = f'{path} ({len(bn)} layers, first {bn[0].removesuffix(".running_mean")})'
        why = 'holds BatchNorm statistics: not the layers that train with 1-2 images'
        findings.append(Finding('warning', 'checkpoint', where, why, CONVERTER))
    never_updated = [p for p in bcn if int(state.get(f'{p}bn.num_batches_tracked', 1)) == 0]
    if never_updated:
        first = never_updated[0][:-1]
        where = f'{path} ({len(never_updated)} of {len(bcn)} layers, first {first})'
        why = 'the estimates of BCN were never updated: frozen by norm_eval, or not yet trained'
        fix = 'norm_eval=False in the config, or tools/model_converters/recalibrate.py'
        findings.append(Finding('error', 'frozen-estimates', where, why, fix))
    return findings
