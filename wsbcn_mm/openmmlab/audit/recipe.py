"""What a recipe has wrong: freezing, learning rate, schedule, decay, estimates."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from torch import nn

from wsbcn_mm.audit import Finding
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.audit.checkpoints import named_checkpoints
from wsbcn_mm.openmmlab.audit.line import line
from wsbcn_mm.openmmlab.config import type_name
from wsbcn_mm.openmmlab.conversion import length, rates, recipe, schedulers
from wsbcn_mm.openmmlab.conversion.probe import Node
from wsbcn_mm.openmmlab.places import LR, dotted
from wsbcn_mm.openmmlab.registry import ESTIMATES_HOOK, KEPT


def frozen(
    cfg: Config, nodes: list[Node], model: nn.Module, owner: dict[str, str]
) -> list[Finding]:
    """Frozen stages of a part that no checkpoint fills, and whole parts."""
    ours = {owner[n] for n, m in model.named_modules() if isinstance(m, BatchChannelNorm)}
    findings = []
    for node in nodes:
        frozen = recipe.frozen_stages(node)
        if node.where in ours and frozen is not None and recipe.pretrained_init(node) is None:
            why = f'frozen_stages={frozen} freezes random weights: no checkpoint fills them'
            fix = line(f'{node.where}.frozen_stages', str(recipe.nothing_frozen(node)))
            findings.append(Finding('error', 'frozen-random-weights', node.where, why, fix))
    filled = [named.where for named in named_checkpoints(cfg, nodes)]
    for node in nodes:
        above = any(where == 'load_from' or node.where.startswith(where) for where in filled)
        if type_name(node.cfg) == KEPT and not above:
            why = f'{KEPT!r} keeps weights and statistics as they are, and no checkpoint fills them'
            fix = line(f'{node.where}.init_cfg', "dict(type='Pretrained', checkpoint=...)")
            fix += ', or convert_config.py --backbone convert'
            findings.append(Finding('error', 'frozen-random-weights', node.where, why, fix))
    return findings


def start_of(cfg: Config, nodes: list[Node], model: nn.Module, owner: dict[str, str]) -> str | None:
    """What a model with our layers starts from; None: it has none, nothing was measured for it."""
    ours = {
        owner[name]
        for name, module in model.named_modules()
        if isinstance(module, (BatchChannelNorm, WeightStandardized))
    }
    if not ours:
        return None
    # A backbone that was kept has no layer of ours, and its weights all the same.
    return 'pretrained' if named_checkpoints(cfg, nodes) else 'scratch'


def learning_rate(cfg: Config, images: int, gpus: int | None, start: str | None) -> list[Finding]:
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
    fix = line(LR, f'{rate:.6g}')
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
            fix = line(LR, f'{wanted:.6g}')
            return [Finding('warning', 'learning-rate', LR, why, fix)]
    return []


def short_training(cfg: Config, processes: int, start: str | None) -> list[Finding]:
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
    fix = line(LR, f'{least:g}') + ', or tools/analysis_tools/find_lr.py'
    return [Finding('warning', 'rate-too-low', LR, why, fix)]


def schedule(cfg: Config, processes: int) -> list[Finding]:
    """A rate that rises for half of the training, or is lowered after its end."""
    findings, count = [], length.iterations(cfg, processes)
    if (up := schedulers.long_warm_up(cfg, count)) is not None:
        where = dotted(up.place)
        why = (
            f'the rate rises from {up.first:g} of itself until iteration {up.end}, and the '
            f'training has {up.count}: the whole rate holds for less than half of it'
        )
        findings += [Finding('warning', 'long-warm-up', where, why, line(where, str(up.better)))]
    if (cut := schedulers.cut_off(cfg, count)) is not None:
        why = f'it counts to {cut.unit} {cut.count}, training ends at {cut.total}: no low rates'
        fix = f'begin, end, milestones, T_max that fit {cut.total} {cut.unit}s'
        findings.append(Finding('warning', 'schedule-cut-off', cut.place, why, fix))
    return findings


def averaged(cfg: Config, model: nn.Module) -> list[Finding]:
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


def weight_decay(cfg: Config, model: nn.Module) -> list[Finding]:
    """Norms that decay as weights do."""
    decay = recipe.decay_of_norms(cfg)
    if decay is None or not any(isinstance(m, nn.GroupNorm) for m in model.modules()):
        return []
    why = f'weight_decay = {decay} pulls the scales and shifts of the norms to 0 as well'
    fix = line('optim_wrapper.paramwise_cfg.norm_decay_mult', '0.0')
    return [Finding('note', 'weight-decay', 'optim_wrapper.paramwise_cfg', why, fix)]


def unsynchronised(cfg: Config, model: nn.Module, processes: int) -> list[Finding]:
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
    fix = line('custom_hooks', f"[dict(type='{ESTIMATES_HOOK}')]  # beside those that are there")
    return [Finding('warning', 'unsynchronised-estimates', 'custom_hooks', why, fix)]
