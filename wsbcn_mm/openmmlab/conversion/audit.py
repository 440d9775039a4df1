"""What is wrong with a config, or with a checkpoint, for training with 1-2 images per GPU.

The model is built (not initialised) and looked at: a config may say what it likes, a key in the
wrong place changes nothing. What only the config shows is added: freezing, learning rate, weight
decay, checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

from mmengine.config import Config
from torch import nn

from wsbcn_mm.audit import LEVELS, Finding, audit_model
from wsbcn_mm.checks import auto_groups
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.checkpoints import code_refused, compare
from wsbcn_mm.openmmlab.config import (
    find_config,
    foreign_config,
    read_config,
    type_name,
    with_names,
)
from wsbcn_mm.openmmlab.conversion import length, probe, rates, recipe, schedulers, weights
from wsbcn_mm.openmmlab.conversion.probe import CannotBuild, Node
from wsbcn_mm.openmmlab.places import dotted, value_at
from wsbcn_mm.openmmlab.registry import ESTIMATES_HOOK, KEPT, NORM_NAMED

CHECKPOINT_SUFFIXES = ('.pth', '.pt', '.tar')
LR = 'optim_wrapper.optimizer.lr'


def audit(
    source: str | Path | Config, images_per_gpu: int | None = None, gpus: int | None = None
) -> list[Finding]:
    """Lists what is wrong with a config or a checkpoint.

    Args:
        source: A config (file, ``mmdet::...`` name or loaded), or a checkpoint (``.pth``, ``.pt``).
        images_per_gpu: As if it were trained with so many; None: what the config says.
        gpus: Number of processes; None: what the file name (``8xb2``) or ``auto_scale_lr`` says,
            else 1.

    Returns:
        Findings, errors first; empty: nothing was found. See `audit_config`, `audit_checkpoint`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a config without a model or with one that cannot be built, a checkpoint that
            cannot be read.
    """
    if not isinstance(source, Config) and Path(source).suffix in CHECKPOINT_SUFFIXES:
        return audit_checkpoint(source)
    return audit_config(source, images_per_gpu, gpus)


def audit_checkpoint(path: str | Path) -> list[Finding]:
    """What is wrong with a checkpoint.

    Looked at are the tensors: layers that are not WS + BCN, statistics that never moved or are not
    finite; and, where the checkpoint holds its config (mmengine's do), that config with the formula
    and the freezing that it trained with. Nothing of the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or holds no tensors.
    """
    state, meta = weights.read(path)
    findings = weights.findings_of(state, path)
    if isinstance(meta.get('cfg'), str):
        findings += _audit_embedded(meta['cfg'], path)
    return _by_level(findings)


def _audit_embedded(text: str, path: str | Path) -> list[Finding]:
    try:
        cfg = foreign_config(text)
        cfg.load_from = None
        with code_refused(path):  # parts that read weights when they are built
            return audit_config(cfg)
    except (ValueError, ImportError) as error:
        why = f'the config inside of it cannot be audited: {" ".join(str(error).split())}'
        fix = 'audit the file of the config'
        return [Finding('note', 'config', str(path), why, fix)]


def audit_config(
    source: str | Path | Config, images_per_gpu: int | None = None, gpus: int | None = None
) -> list[Finding]:
    """What is wrong with a config; arguments as in `audit`.

    Codes, beside those of `wsbcn_mm.audit.audit_model`: ``groups`` (do not divide a width),
    ``frozen-random-weights``, ``learning-rate``, ``rate-too-low``, ``long-warm-up``,
    ``schedule-cut-off``, ``weight-decay``, ``formula`` (a checkpoint of another WS formula),
    ``checkpoint`` (of other layers), ``unsynchronised-estimates``.
    """
    if isinstance(source, Config):
        cfg = with_names(copy.deepcopy(source))
    else:
        cfg = read_config(find_config(str(source))[0])
    nodes = probe.nodes(cfg)
    findings = []
    try:
        model = probe.build(cfg)
    except CannotBuild:
        # Groups that do not divide are mended in this copy: it can be built, the rest be found.
        findings = _groups(cfg, nodes)
        if not findings:
            raise
        model = probe.build(cfg)
    return _by_level(findings + audit_built(cfg, model, images_per_gpu, gpus))


def audit_built(
    cfg: Config, model: nn.Module, images_per_gpu: int | None = None, gpus: int | None = None
) -> list[Finding]:
    """As `audit_config`, for a config whose model `probe.build` has built already."""
    nodes = probe.nodes(cfg)
    images = images_per_gpu or recipe.images_per_gpu(cfg) or 1
    processes = gpus or recipe.gpus_to_train_with(cfg) or 1
    if cfg.get('sync_bn') and processes > 1:  # the Runner converts after building
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    owner = _owners(model)
    by_where = {node.where: node for node in nodes}
    findings = [
        _possible(_with_config_line(finding, by_where), cfg, by_where)
        for finding in audit_model(model, images, processes, part_of=owner.__getitem__)
    ]
    findings += _frozen(cfg, nodes, model, owner)
    start = _start(cfg, nodes, model, owner)
    findings += _learning_rate(cfg, images, gpus, start)
    findings += _short_training(cfg, processes, start)
    findings += _schedule(cfg, processes)
    findings += _weight_decay(cfg, model)
    findings += _checkpoints(cfg, nodes, model, owner)
    findings += _unsynchronised(cfg, model, processes)
    findings += _averaged(cfg, model)
    return _by_level(findings)


def _by_level(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _owners(model: nn.Module) -> dict[str, str]:
    """For each module name: where the config says it."""
    return {name: dotted(place) for name, place in probe.owners(model).items()}


# ---- layers ------------------------------------------------------------------------------------


def _line(where: str, value: str) -> str:
    """What sets one value: a statement of a child config, ``model = dict(backbone=dict(...))``."""
    if '[' in where:  # a child replaces lists as a whole; the command line takes no dicts
        if value.startswith('dict('):
            return f'{where} = {value}  (lists are replaced as a whole)'
        return f'--cfg-options {where.replace("[", ".").replace("]", "")}={value}'
    keys = where.split('.')
    for key in reversed(keys[1:]):
        value = f'dict({key}={value})'
    return f'{keys[0]} = {value}'


def _with_config_line(finding: Finding, nodes: dict[str, Node]) -> Finding:
    """The finding with the config line that mends it, where there is one."""
    part = finding.where.partition(' (')[0]
    node = nodes.get(part)
    if node is None:
        return finding
    if finding.code in ('batch-statistics', 'sync-bn-without-processes', 'frozen-bn'):
        if node.accepts('norm_cfg') or 'norm_cfg' in node.cfg:
            # What the base's norm_cfg holds would stay beside ours.
            delete = '_delete_=True, ' if 'norm_cfg' in node.cfg else ''
            fix = _line(f'{part}.norm_cfg', f"dict({delete}type='BCN', num_groups='auto')")
            fix += '; tools/model_converters/convert_config.py does it everywhere'
            return dataclasses.replace(finding, fix=fix)
        why = f'{finding.why}; {node.kind.__name__} takes no norm_cfg'
        fix = 'wsbcn_mm.convert.convert_model on the built model'
        return dataclasses.replace(finding, level='note', why=why, fix=fix)
    if finding.code == 'frozen-estimates' and (frozen := recipe.frozen_norms(node)):
        fix = '; '.join(_line(f'{part}.{key}', 'False') for key in frozen)
        return dataclasses.replace(finding, fix=fix)
    if finding.code == 'ws-without-norm':
        return dataclasses.replace(finding, fix=_line(f'{part}.conv_cfg', 'None'))
    if finding.code == 'norm-without-ws' and node.accepts('conv_cfg'):
        fix = _line(f'{part}.conv_cfg', "dict(type='WSConv2d')")
        return dataclasses.replace(finding, fix=fix)
    return finding


def _possible(finding: Finding, cfg: Config, nodes: dict[str, Node]) -> Finding:
    """Norms without WS are a warning where the part could have WS, which only a build tells."""
    node = nodes.get(finding.where.partition(' (')[0])
    if finding.code != 'norm-without-ws' or node is None or not node.accepts('conv_cfg'):
        return finding
    if node.get('conv_cfg') is not None or node.get('dcn') is not None:
        return finding
    trial = copy.deepcopy(cfg)
    value_at(trial, node.path)['conv_cfg'] = dict(type='WSConv2d')
    model = probe.build(trial)
    after = audit_model(model, part_of=_owners(model).__getitem__)
    if any(f.code == 'ws-without-norm' and f.where.startswith(node.where) for f in after):
        return finding
    return dataclasses.replace(finding, level='warning')


def _groups(cfg: Config, nodes: list[Node]) -> list[Finding]:
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
        fix = _line(f'{node.where}.norm_cfg.num_groups', repr(norm_cfg['num_groups']))
        findings.append(Finding('error', 'groups', f'{node.where}.norm_cfg', why, fix))
    return findings


# ---- recipe ------------------------------------------------------------------------------------


def _frozen(
    cfg: Config, nodes: list[Node], model: nn.Module, owner: dict[str, str]
) -> list[Finding]:
    """Frozen stages of a part that no checkpoint fills, and whole parts."""
    ours = {owner[n] for n, m in model.named_modules() if isinstance(m, BatchChannelNorm)}
    findings = []
    for node in nodes:
        frozen = recipe.frozen_stages(node)
        if node.where in ours and frozen is not None and recipe.pretrained_init(node) is None:
            why = f'frozen_stages={frozen} freezes random weights: no checkpoint fills them'
            fix = _line(f'{node.where}.frozen_stages', str(recipe.nothing_frozen(node)))
            findings.append(Finding('error', 'frozen-random-weights', node.where, why, fix))
    filled = [named.where for named in _named_checkpoints(cfg, nodes)]
    for node in nodes:
        above = any(where == 'load_from' or node.where.startswith(where) for where in filled)
        if type_name(node.cfg) == KEPT and not above:
            why = f'{KEPT!r} keeps weights and statistics as they are, and no checkpoint fills them'
            fix = _line(f'{node.where}.init_cfg', "dict(type='Pretrained', checkpoint=...)")
            fix += ', or convert_config.py --backbone convert'
            findings.append(Finding('error', 'frozen-random-weights', node.where, why, fix))
    return findings


def _start(cfg: Config, nodes: list[Node], model: nn.Module, owner: dict[str, str]) -> str | None:
    """What a model with our layers starts from; None: it has none, nothing was measured for it."""
    ours = {
        owner[name]
        for name, module in model.named_modules()
        if isinstance(module, (BatchChannelNorm, WeightStandardized))
    }
    if not ours:
        return None
    # A backbone that was kept has no layer of ours, and its weights all the same.
    return 'pretrained' if _named_checkpoints(cfg, nodes) else 'scratch'


def _learning_rate(cfg: Config, images: int, gpus: int | None, start: str | None) -> list[Finding]:
    """The learning rate belongs to another total batch than the config trains with."""
    lr, base = recipe.optimizer_setting(cfg, 'lr'), recipe.base_batch_size(cfg)
    if lr is None or (cfg.get('auto_scale_lr') or {}).get('enable'):
        return []
    named = recipe.named_batch(cfg)
    if gpus is None and named is not None:
        gpus = named[0]
    wanted = base
    why = f'lr = {lr} is for {base} images per step (auto_scale_lr.base_batch_size)'
    if base is None and named is not None:
        wanted = named[0] * named[1]
        why = f'lr = {lr} is for {wanted} images per step, as the name {named[0]}xb{named[1]} says'
    if wanted is None or gpus is None:
        return _unscaled_child(cfg, images, lr, start)
    total = gpus * images
    # A base batch size is counted per step or per micro-step; mmengine itself does the latter.
    if wanted in (total, total * recipe.accumulation(cfg)):
        return []
    per_step = total * recipe.accumulation(cfg)
    rate, rule = rates.rate_at(cfg, total / wanted, start, per_step)
    if total < wanted and rate >= lr:  # the rule would take it too far down
        return []
    fix = _line(LR, f'{rate:.6g}')
    fix += f' with auto_scale_lr = dict(base_batch_size={total})'
    if rule == 'linear rule':  # which mmengine follows, whatever the optimizer is
        fix += ', or train with --auto-scale-lr'
    return [Finding('warning', 'learning-rate', LR, f'{why}, and {total} are trained with', fix)]


def _unscaled_child(cfg: Config, images: int, lr: float, start: str | None) -> list[Finding]:
    """A child that changed its parent's batch size, and nothing else."""
    if not cfg.filename or not Path(cfg.filename).is_file():
        return []
    for parent in Config._get_base_files(cfg.filename):
        old = Config.fromfile(Config._get_cfg_path(parent, cfg.filename)[0])
        size, rate = recipe.images_per_gpu(old), recipe.optimizer_setting(old, 'lr')
        same_base = recipe.base_batch_size(old) == recipe.base_batch_size(cfg)
        if size and size != images and rate == lr and same_base:
            per_step = images * recipe.accumulation(cfg)
            wanted = rates.rate_at(cfg, images / size, start, per_step)[0]
            if images < size and wanted >= lr:
                return []
            why = f'lr = {lr} is that of {parent}, for {size} images per GPU instead of {images}'
            fix = _line(LR, f'{wanted:.6g}')
            return [Finding('warning', 'learning-rate', LR, why, fix)]
    return []


def _short_training(cfg: Config, processes: int, start: str | None) -> list[Finding]:
    """A rate with which so short a training learns nothing."""
    lr, steps = recipe.optimizer_setting(cfg, 'lr'), length.steps(cfg, processes)
    per_step = (recipe.batch_size(cfg) or 1) * processes * recipe.accumulation(cfg)
    least = rates.least_rate(cfg, start, per_step)
    if least is None or steps is None or lr >= least or lr * steps >= rates.LEAST_ROUTE:
        return []
    why = (
        f'lr = {lr} over {steps} steps: rate * steps = {lr * steps:.2g}, and every training of '
        f'docs/study.md that learned had more than {rates.LEAST_ROUTE:g}'
    )
    fix = _line(LR, f'{least:g}') + ', or tools/analysis_tools/find_lr.py'
    return [Finding('warning', 'rate-too-low', LR, why, fix)]


def _schedule(cfg: Config, processes: int) -> list[Finding]:
    """A rate that rises for half of the training, or is lowered after its end."""
    findings, count = [], length.iterations(cfg, processes)
    if (up := schedulers.long_warm_up(cfg, count)) is not None:
        where = dotted(up.place)
        why = (
            f'the rate rises from {up.first:g} of itself until iteration {up.end}, and the '
            f'training has {up.count}: the whole rate holds for less than half of it'
        )
        findings += [Finding('warning', 'long-warm-up', where, why, _line(where, str(up.better)))]
    if (cut := schedulers.cut_off(cfg, count)) is not None:
        why = f'it counts to {cut.unit} {cut.count}, training ends at {cut.total}: no low rates'
        fix = f'begin, end, milestones, T_max that fit {cut.total} {cut.unit}s'
        findings.append(Finding('warning', 'schedule-cut-off', cut.place, why, fix))
    return findings


def _averaged(cfg: Config, model: nn.Module) -> list[Finding]:
    """An average of the weights that is evaluated with the statistics of the start."""
    hooks = [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]
    ours = any(isinstance(module, BatchChannelNorm) for module in model.modules())
    if not ours or not any(
        type_name(hook) == 'EMAHook' and isinstance(hook, dict) and not hook.get('update_buffers')
        for hook in hooks
    ):
        return []
    why = 'EMAHook averages the weights and not the estimates, which then belong to other weights'
    fix = "dict(type='EMAHook', update_buffers=True, ...)"
    return [Finding('warning', 'averaged-estimates', 'custom_hooks', why, fix)]


def _weight_decay(cfg: Config, model: nn.Module) -> list[Finding]:
    decay = recipe.decay_of_norms(cfg)
    if decay is None or not any(isinstance(m, nn.GroupNorm) for m in model.modules()):
        return []
    why = f'weight_decay = {decay} pulls the scales and shifts of the norms to 0 as well'
    fix = _line('optim_wrapper.paramwise_cfg.norm_decay_mult', '0.0')
    return [Finding('note', 'weight-decay', 'optim_wrapper.paramwise_cfg', why, fix)]


def _unsynchronised(cfg: Config, model: nn.Module, processes: int) -> list[Finding]:
    """Estimates that differ from rank to rank: the hosts do not broadcast buffers."""
    by_rank = [
        module
        for module in model.modules()
        if isinstance(module, BatchChannelNorm)
        and module.mode == 'estimate'
        and getattr(module, 'sync', 'step') != 'forward'
    ]
    if not by_rank or processes == 1 or recipe.has_estimates_hook(cfg):
        return []
    why = (
        f'the estimates of {len(by_rank)} layers are never synchronised: each of {processes} '
        'processes evaluates and saves another model'
    )
    fix = _line('custom_hooks', f"[dict(type='{ESTIMATES_HOOK}')]  # beside those that are there")
    return [Finding('warning', 'unsynchronised-estimates', 'custom_hooks', why, fix)]


# ---- checkpoints that a config names -----------------------------------------------------------


def _checkpoints(
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
    for named in _named_checkpoints(cfg, nodes):
        where, source = named.where, named.source
        parts = [p for p in norms if where == 'load_from' or p.startswith(where)]
        if not any(issubclass(norms[p], BatchChannelNorm) or p in formulas for p in parts):
            continue
        layers, formula = weights.kind_of(source)
        part = next((p for p in parts if p in formulas), None)
        if layers == 'BN':
            why = f'{source} was trained with plain convolutions and BatchNorm'
            fix = 'tools/model_converters/convert_checkpoint.py, or a checkpoint of these layers'
            findings.append(Finding('warning', 'checkpoint', where, why, fix))
            continue
        if formula and part and formulas[part] != formula:
            why = (
                f'{source} was trained with the WS formula {formula!r}, the layers compute '
                f'{formulas[part]!r}: up to 6 % apart at usual weights'
            )
            fix = _line(f'{part}.conv_cfg', f"dict(type='WSConv2d', formula={formula!r})")
            findings.append(Finding('error', 'formula', part, why, fix))
        findings += _unfilled(named, model, owner)
    return findings


@dataclasses.dataclass(frozen=True)
class _Named:
    """A checkpoint that a config names: where, which, and what its tensors begin with there."""

    where: str
    source: str
    prefix: str = ''


def _named_checkpoints(cfg: Config, nodes: list[Node]) -> list[_Named]:
    named = []
    for node in nodes:
        init = node.get('init_cfg')
        if isinstance(init, dict) and isinstance(init.get('checkpoint'), str):
            named.append(_Named(node.where, init['checkpoint'], init.get('prefix') or ''))
        pretrained = recipe.pretrained_argument(node)
        if pretrained is not None:
            named.append(_Named(node.where, pretrained))
    if isinstance(cfg.get('load_from'), str):
        named.append(_Named('load_from', cfg.load_from))
    return named


def _unfilled(named: _Named, model: nn.Module, owner: dict[str, str]) -> list[Finding]:
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
    why = f'{named.source} {"; ".join(line.strip() for line in str(found).splitlines())}'
    fix = 'a checkpoint of these layers: depth, norm, affine and classes are those of the config'
    return [Finding(level, 'checkpoint', named.where, why, fix)]


def _module_at(model: nn.Module, owner: dict[str, str], where: str) -> nn.Module:
    """The module that a node of the config was built to: the outermost that belongs to it."""
    return model.get_submodule(next(name for name, place in owner.items() if place == where))
