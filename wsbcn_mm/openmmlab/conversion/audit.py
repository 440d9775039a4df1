"""What is wrong with a config, or with a checkpoint, for training with 1-2 images per GPU.

The model is built (not initialised) and looked at: a config may say what it likes, a key in the
wrong place changes nothing. What only the config shows is added: freezing, learning rate, weight
decay, checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from wsbcn_mm.audit import LEVELS, Finding, audit_model
from wsbcn_mm.checks import auto_groups
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab import checkpoints as checkpoint
from wsbcn_mm.openmmlab.config import PRETRAINED, find_config, read_config, type_name, with_names
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.conversion.probe import CannotBuild, Node, dotted
from wsbcn_mm.openmmlab.registry import ESTIMATES_HOOK, NORM_NAMED


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
    if not isinstance(source, Config) and Path(source).suffix in ('.pth', '.pt', '.tar'):
        return audit_checkpoint(source)
    return audit_config(source, images_per_gpu, gpus)


# ---- configs -----------------------------------------------------------------------------------


def audit_config(
    source: str | Path | Config, images_per_gpu: int | None = None, gpus: int | None = None
) -> list[Finding]:
    """What is wrong with a config; arguments as in `audit`.

    Codes, beside those of `wsbcn_mm.audit.audit_model`: ``groups`` (do not divide a width),
    ``frozen-random-weights``, ``learning-rate``, ``weight-decay``, ``formula`` (a checkpoint of
    another WS formula), ``checkpoint`` (of other layers), ``unsynchronised-estimates``.
    """
    if isinstance(source, Config):
        cfg = with_names(copy.deepcopy(source))
    else:
        cfg = read_config(find_config(str(source))[0])
    nodes = probe.nodes(cfg)
    findings = []
    try:
        model = probe.build(cfg)
    except CannotBuild as error:
        if 'num_groups' not in str(error):
            raise
        # Mended in this copy, so that the model can be built and the rest be found.
        findings = _groups(cfg, nodes)
        nodes, model = probe.nodes(cfg), probe.build(cfg)
    findings += audit_built(cfg, model, images_per_gpu, gpus)
    return sorted(findings, key=lambda f: LEVELS.index(f.level))


def audit_built(
    cfg: Config, model: nn.Module, images_per_gpu: int | None = None, gpus: int | None = None
) -> list[Finding]:
    """As `audit_config`, for a config whose model `probe.build` has built already."""
    nodes, findings = probe.nodes(cfg), []
    images = images_per_gpu or _images(cfg) or 1
    processes = gpus or _processes(cfg) or 1
    if cfg.get('sync_bn') and processes > 1:  # the Runner converts after building
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    owner = {name: dotted(path) for name, path in probe.owners(model).items()}
    by_where = {node.where: node for node in nodes}
    for finding in audit_model(model, images, processes, part_of=owner.__getitem__):
        findings.append(_with_config_line(finding, by_where))
    findings = [_possible(f, cfg, by_where) for f in findings]
    findings += _frozen(nodes, model, owner)
    findings += _learning_rate(cfg, images, gpus)
    findings += _weight_decay(cfg, model)
    findings += _checkpoints(cfg, nodes, model, owner)
    findings += _unsynchronised(cfg, model, processes)
    return sorted(findings, key=lambda f: LEVELS.index(f.level))


def _images(cfg: Config) -> int | None:
    loader = cfg.get('train_dataloader')
    size = loader.get('batch_size') if isinstance(loader, dict) else None
    return size if isinstance(size, int) else None


def _named_batch(cfg: Config) -> tuple[int, int] | None:
    """GPUs and images per GPU that a file name such as ``..._8xb2-...`` tells."""
    found = re.search(r'_(\d+)xb(\d+)', Path(cfg.filename or '').stem)
    return (int(found[1]), int(found[2])) if found else None


def _processes(cfg: Config) -> int | None:
    named = _named_batch(cfg)
    if named:
        return named[0]
    base, images = (cfg.get('auto_scale_lr') or {}).get('base_batch_size'), _images(cfg)
    return base // images if base and images and base % images == 0 else None


def _line(path: tuple | str, value: str) -> str:
    """The statement of a child config that sets one value: ``model = dict(backbone=dict(...))``."""
    keys = path.split('.') if isinstance(path, str) else [str(key) for key in path]
    if any('[' in key for key in keys):
        return f'{".".join(keys)} = {value}  (lists are replaced as a whole)'
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
    if finding.code == 'frozen-estimates' and node.accepts('norm_eval'):
        return dataclasses.replace(finding, fix=_line(f'{part}.norm_eval', 'False'))
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
    target = trial._cfg_dict
    for key in node.path:
        target = target[key]
    target['conv_cfg'] = dict(type='WSConv2d')
    model = probe.build(trial)
    owner = {name: dotted(path) for name, path in probe.owners(model).items()}
    after = audit_model(model, part_of=owner.__getitem__)
    bare = any(f.code == 'ws-without-norm' and f.where.startswith(node.where) for f in after)
    return finding if bare else dataclasses.replace(finding, level='warning')


def _groups(cfg: Config, nodes: list[Node]) -> list[Finding]:
    """Groups that do not divide a width; mends ``cfg`` so that it can be built."""
    grouped = [
        n
        for n in nodes
        if isinstance(n.cfg.get('norm_cfg'), dict)
        and isinstance(n.cfg['norm_cfg'].get('num_groups'), int)
    ]
    trial = copy.deepcopy(cfg)
    for node in probe.nodes(trial):
        if any(node.path == other.path for other in grouped):
            node.cfg['norm_cfg'] = dict(type='BN')
    model = probe.build(trial)
    owner = probe.owners(model)
    findings = []
    for node in grouped:
        groups = node.cfg['norm_cfg']['num_groups']
        widths = {
            m.num_features: name
            for name, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
            and owner[name] == node.path
            and not isinstance(model.get_submodule(name.rpartition('.')[0]), BatchChannelNorm)
        }
        wrong = [w for w in widths if groups < 1 or w % groups]
        if not wrong:
            continue
        kind = type_name(node.cfg['norm_cfg'])
        fitted = {auto_groups(width) for width in widths}
        ours = kind in NORM_NAMED
        value = "'auto'" if ours else str(auto_groups(math.gcd(*widths)))
        node.cfg['norm_cfg']['num_groups'] = 'auto' if ours else auto_groups(math.gcd(*widths))
        why = (
            f'{groups} groups do not divide {wrong[0]} channels of {widths[wrong[0]]} '
            f'(widths {sorted(widths)}, which fit {sorted(fitted)}): the model cannot be built'
        )
        findings.append(
            Finding(
                'error',
                'groups',
                f'{node.where}.norm_cfg',
                why,
                _line(f'{node.where}.norm_cfg.num_groups', value),
            )
        )
    return findings


def _frozen(nodes: list[Node], model: nn.Module, owner: dict[str, str]) -> list[Finding]:
    """Frozen stages of a part that no checkpoint fills."""
    ours = {owner[n] for n, m in model.named_modules() if isinstance(m, BatchChannelNorm)}
    findings = []
    for node in nodes:
        frozen = node.get('frozen_stages')
        nothing = 0 if node.defaults.get('frozen_stages') == 0 else -1
        if node.where in ours and isinstance(frozen, int) and frozen > nothing:
            init = node.get('init_cfg')
            if not (isinstance(init, dict) and type_name(init) in PRETRAINED):
                why = f'frozen_stages={frozen} freezes random weights: no checkpoint fills them'
                fix = _line(f'{node.where}.frozen_stages', str(nothing))
                findings.append(Finding('error', 'frozen-random-weights', node.where, why, fix))
    return findings


def _learning_rate(cfg: Config, images: int, gpus: int | None) -> list[Finding]:
    """The learning rate belongs to another total batch than the config trains with."""
    wrapper = cfg.get('optim_wrapper') or {}
    lr = (wrapper.get('optimizer') or {}).get('lr')
    scaling = cfg.get('auto_scale_lr') or {}
    if lr is None or scaling.get('enable'):
        return []
    base, named = scaling.get('base_batch_size'), _named_batch(cfg)
    if gpus is not None:
        total = gpus * images
    elif named is not None:
        total = named[0] * images
    else:
        total = None
    wanted = base
    why = f'lr = {lr} is for {base} images per step (auto_scale_lr.base_batch_size)'
    if base is None and named is not None:
        wanted = named[0] * named[1]
        why = f'lr = {lr} is for {wanted} images per step, as the name {named[0]}xb{named[1]} says'
    if wanted is None or total is None:
        inherited = _unscaled_child(cfg, images, lr, base)
        return [inherited] if inherited else []
    # A base batch size is counted per step or per micro-step; mmengine itself does the latter.
    if wanted in (total, total * wrapper.get('accumulative_counts', 1)):
        return []
    fix = _line('optim_wrapper.optimizer.lr', f'{lr * total / wanted:.6g}')
    fix += f' with auto_scale_lr = dict(base_batch_size={total}), or train with --auto-scale-lr'
    why += f', and {total} are trained with'
    return [Finding('warning', 'learning-rate', 'optim_wrapper.optimizer.lr', why, fix)]


def _unscaled_child(cfg: Config, images: int, lr: float, base: int | None) -> Finding | None:
    """A child that changed its parent's batch size, and nothing else."""
    if not cfg.filename or not Path(cfg.filename).is_file():
        return None
    for parent in Config._get_base_files(cfg.filename):
        path = Config._get_cfg_path(parent, cfg.filename)[0]
        old = Config.fromfile(path)
        size = _images(old)
        rate = ((old.get('optim_wrapper') or {}).get('optimizer') or {}).get('lr')
        same_base = (old.get('auto_scale_lr') or {}).get('base_batch_size') == base
        if size and size != images and rate == lr and same_base:
            why = f'lr = {lr} is that of {parent}, for {size} images per GPU instead of {images}'
            new = f'{lr * images / size:.6g}'
            fix = _line('optim_wrapper.optimizer.lr', new)
            return Finding('warning', 'learning-rate', 'optim_wrapper.optimizer.lr', why, fix)
    return None


def _unsynchronised(cfg: Config, model: nn.Module, processes: int) -> list[Finding]:
    """Estimates that differ from rank to rank: the hosts do not broadcast buffers."""
    step = [
        m
        for m in model.modules()
        if isinstance(m, BatchChannelNorm)
        and m.mode == 'estimate'
        and getattr(m, 'sync', 'step') != 'forward'
    ]
    hooks = cfg.get('custom_hooks') or []
    if not step or processes == 1 or any(type_name(hook) == ESTIMATES_HOOK for hook in hooks):
        return []
    why = (
        f'the estimates of {len(step)} layers are never synchronised: each of {processes} '
        'processes evaluates and saves another model'
    )
    fix = _line('custom_hooks', f"[dict(type='{ESTIMATES_HOOK}')]  # beside those that are there")
    return [Finding('warning', 'unsynchronised-estimates', 'custom_hooks', why, fix)]


def _weight_decay(cfg: Config, model: nn.Module) -> list[Finding]:
    wrapper = cfg.get('optim_wrapper') or {}
    decay = (wrapper.get('optimizer') or {}).get('weight_decay')
    if not decay or 'constructor' in wrapper:
        return []
    if (wrapper.get('paramwise_cfg') or {}).get('norm_decay_mult') is not None:
        return []
    if not any(isinstance(m, nn.GroupNorm) for m in model.modules()):
        return []
    why = f'weight_decay = {decay} pulls the scales and shifts of the norms to 0 as well'
    fix = _line('optim_wrapper.paramwise_cfg.norm_decay_mult', '0.0')
    return [Finding('note', 'weight-decay', 'optim_wrapper.paramwise_cfg', why, fix)]


def _checkpoints(cfg: Config, nodes: list[Node], model, owner: dict[str, str]) -> list[Finding]:
    """Checkpoints of another WS formula, or of other layers."""
    findings = []
    formulas: dict[str, str] = {}
    normed = {}
    for name, module in model.named_modules():
        if isinstance(module, WeightStandardized):
            formulas.setdefault(owner[name], module.formula)
        if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
            normed.setdefault(owner[name], type(module))
    sources = [
        (n.where, (n.get('init_cfg') or {}).get('checkpoint'))
        for n in nodes
        if isinstance(n.get('init_cfg'), dict)
    ]
    sources += [(n.where, n.get('pretrained')) for n in nodes]
    sources.append(('load_from', cfg.get('load_from')))
    for where, source in sources:
        if not isinstance(source, str):
            continue
        parts = [p for p in normed if where == 'load_from' or p.startswith(where)]
        if not any(issubclass(normed[p], BatchChannelNorm) or p in formulas for p in parts):
            continue
        layers, formula = _kind_of_checkpoint(source)
        part = next((p for p in parts if p in formulas), None)
        if layers == 'BN' or (layers == 'none'):
            why = f'{source} was trained with plain convolutions and BatchNorm'
            fix = 'tools/model_converters/convert_checkpoint.py, or a checkpoint of these layers'
            findings.append(Finding('warning', 'checkpoint', where, why, fix))
        elif formula and part and formulas[part] != formula:
            why = (
                f'{source} was trained with the WS formula {formula!r}, the layers compute '
                f'{formulas[part]!r}: up to 6 % apart at usual weights'
            )
            fix = _line(f'{part}.conv_cfg', f"dict(type='WSConv2d', formula={formula!r})")
            findings.append(Finding('error', 'formula', part, why, fix))
    return findings


def _kind_of_checkpoint(source: str) -> tuple[str | None, str | None]:
    """Layers and WS formula of a checkpoint, as far as its name or its keys tell."""
    if '://' in source or not Path(source).is_file():
        if re.search(r'gn[_-]ws', source):
            return 'GN + WS', 'std_eps'
        if re.match(r'(torchvision|open-mmlab)://', source):
            return 'BN', None
        return None, None
    state, meta = _read(source)
    if any('.pbn.' in key for key in state):
        return 'BCN + WS', 'var_eps'
    formula = (meta or {}).get('formula')
    if formula is None and isinstance((meta or {}).get('cfg'), str):
        formula = _formula_in(meta['cfg'])
    if any(key.endswith('.batch_weight') for key in state):
        return 'BCN + WS', formula
    return ('BN' if any(key.endswith('running_mean') for key in state) else None), formula


def _formula_in(text: str) -> str | None:
    """The WS formula that the config inside of a checkpoint trained with."""
    if 'WSConv' not in text and 'ConvWS' not in text:
        return None
    found = re.search(r'formula=[\'"](\w+)[\'"]', text)
    if found:
        return found[1]
    return 'paper' if 'WSConv' in text else 'std_eps'


# ---- checkpoints -------------------------------------------------------------------------------


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    content = checkpoint.read_checkpoint(path)
    state = checkpoint.state_dict_of(content, path)
    tensors = {key.removeprefix('module.'): value for key, value in state.items()}
    meta = content.get('meta')
    return tensors, meta if isinstance(meta, dict) else {}


def audit_checkpoint(path: str | Path) -> list[Finding]:
    """What is wrong with a checkpoint.

    Looked at are the tensors: layers that are not WS + BCN, statistics that never moved or are not
    finite; and, where the checkpoint holds its config (mmengine's do), that config with the formula
    and the freezing that it trained with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or holds no tensors.
    """
    state, meta = _read(path)
    findings = []
    convert = 'tools/model_converters/convert_checkpoint.py'
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            why = 'holds values that are not finite'
            fix = 'an earlier checkpoint; statistics alone: tools/model_converters/recalibrate.py'
            findings.append(Finding('error', 'not-finite', key, why, fix))
    bcn = [k.removesuffix('batch_weight') for k in state if k.endswith('.batch_weight')]
    bn = [
        k
        for k in state
        if k.endswith('running_mean') and not any(k == f'{prefix}bn.running_mean' for prefix in bcn)
    ]
    if any('.pbn.' in key for key in state):
        why = "is in the layout of the authors' BCN code, trained with the WS formula 'var_eps'"
        fix = f"{convert} --from authors-bcn, and conv_cfg=dict(formula='var_eps')"
        findings.append(Finding('warning', 'layout', str(path), why, fix))
    elif bn:
        where = f'{path} ({len(bn)} layers, first {bn[0].removesuffix(".running_mean")})'
        why = 'holds BatchNorm statistics: not the layers that train with 1-2 images'
        findings.append(Finding('warning', 'checkpoint', where, why, convert))
    stuck = [p for p in bcn if int(state.get(f'{p}bn.num_batches_tracked', 1)) == 0]
    if stuck:
        where = f'{path} ({len(stuck)} of {len(bcn)} layers, first {stuck[0][:-1]})'
        why = 'the estimates of BCN were never updated: frozen by norm_eval, or not yet trained'
        fix = 'norm_eval=False in the config, or tools/model_converters/recalibrate.py'
        findings.append(Finding('error', 'frozen-estimates', where, why, fix))
    if isinstance(meta.get('cfg'), str):
        cfg = Config.fromstring(meta['cfg'], '.py')
        if cfg.get('model'):
            cfg.load_from = None
            findings += audit_config(cfg)
    return sorted(findings, key=lambda f: LEVELS.index(f.level))
