"""What another batch changes in a config: images, learning rate, iterations, clipped gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.config import Config

from wsbcn_mm.openmmlab.config import find_scope, type_name
from wsbcn_mm.openmmlab.conversion import schedulers
from wsbcn_mm.openmmlab.conversion.changes import Setting
from wsbcn_mm.openmmlab.conversion.options import ConversionOptions
from wsbcn_mm.openmmlab.conversion.rates import rate_at
from wsbcn_mm.openmmlab.conversion.recipe import (
    accumulation,
    batch_size,
    gpus_of_rate,
    images_of_rate,
    images_per_item,
    optimizer_setting,
)


def rescaled(
    cfg: Config, options: ConversionOptions, start: str | None
) -> tuple[list[Setting], list[str]]:
    """What another batch changes: images, learning rate, iterations.

    Rates follow the images per step of the optimizer, see `rate_at`. Where a schedule counts
    iterations, all its counts follow the images per iteration, so that as many images are seen.

    Args:
        cfg: The config.
        options: The batch that is wanted, and what of the recipe stays.
        start: What training starts from, ``'scratch'`` or ``'pretrained'``: the rate does not go
            below what was measured for it, see `least_rate`. None: the linear rule alone.

    Returns:
        What is to be set, and warnings.
    """
    old = batch_size(cfg)
    if old is None:
        return [], ['the config has no train_dataloader.batch_size: nothing was scaled']
    sampler = str((cfg.train_dataloader.get('sampler') or {}).get('type', ''))
    if 'MultiSource' in sampler:
        why = f'{sampler} composes each batch of several sources'
        return [], [f'train_dataloader.batch_size stays {old}: {why}']
    if images_per_item(cfg) > 1:
        why = f'one item of its data is {images_per_item(cfg)} images (triplet_sampler)'
        return [], [f'train_dataloader.batch_size stays {old}: {why}']
    images = options.images_per_gpu
    settings, warnings = [Setting(('train_dataloader', 'batch_size'), images)], []
    old_gpus, old_total = gpus_of_rate(cfg), images_of_rate(cfg)
    gpus = options.gpus or old_gpus
    if gpus is not None and options.gpus and old_total is None:
        warnings.append(
            f'neither auto_scale_lr nor the file name tells for how many GPUs the learning rate '
            f'is: it is taken to be for {options.gpus}'
        )
        old_gpus, old_total = gpus, gpus * old
    if gpus is None or old_total is None:  # the same number, whatever it is
        ratio, rule = images / old, f'{old} -> {images} images per GPU'
    else:
        total = gpus * images
        ratio = total / old_total
        rule = f'{old} -> {images} images per GPU, '
        if (old_gpus or gpus) * old == old_total:
            number = f'{gpus}' if old_gpus in (gpus, None) else f'{old_gpus} -> {gpus}'
            rule += f'{number} GPUs: total {old_total} -> {total}'
        else:
            rule += f'{gpus} GPUs: {total} images per step, and auto_scale_lr says {old_total}'
    old_accumulate = accumulation(cfg)
    accumulate = options.accumulate or old_accumulate
    if accumulate != old_accumulate:
        settings.append(Setting(('optim_wrapper', 'accumulative_counts'), accumulate))
        rule += f', accumulated over {old_accumulate} -> {accumulate} iterations'
    if not options.keep_lr and gpus is not None:
        scale = dict(cfg.get('auto_scale_lr') or dict(enable=False))
        scale['base_batch_size'] = gpus * images
        settings.append(Setting(('auto_scale_lr',), scale, 'what the learning rate is for'))
    per_step = (gpus or 1) * images * accumulate
    lr, factor, times = optimizer_setting(cfg, 'lr'), 1.0, ratio * accumulate / old_accumulate
    if not options.keep_lr and isinstance(lr, (int, float)):
        rate, why = rate_at(cfg, times, start, per_step)
        factor = rate / lr if lr else 1.0
        if factor != 1:
            place = ('optim_wrapper', 'optimizer', 'lr')
            settings.append(Setting(place, float(f'{rate:.6g}'), f'{why}: {rule}'))
    elif not options.keep_lr and times != 1:
        warnings.append('the config has no optim_wrapper.optimizer.lr to scale')
    more, warned = _schedule(cfg, factor, 1 / ratio, options.schedule == 'images')
    return settings + more, warnings + warned


def _schedule(
    cfg: Config, rate: float, iterations: float, stretch: bool
) -> tuple[list[Setting], list[str]]:
    """Schedulers and loop with rates and iterations times these factors."""
    settings, warnings = [], []
    loop = cfg.get('train_cfg') or {}
    if not stretch:
        if iterations != 1 and loop.get('max_iters'):
            warnings.append(
                f'the schedule counts iterations: {loop["max_iters"]} of them now see '
                f'{1 / iterations:g} times the images (--schedule images: as many as before)'
            )
        iterations = 1
    lr = optimizer_setting(cfg, 'lr')
    lr = lr if isinstance(lr, (int, float)) else None
    why: dict[str, None] = {}

    def change(scheduler: dict[str, Any]) -> dict[str, Any]:
        new = scheduler
        try:
            if iterations != 1:
                new = schedulers.over_other_iterations(cfg, new, iterations)
                if new != scheduler:
                    why['iterations for as many images'] = None
            if rate != 1 and lr is not None:
                names = schedulers.rates_of(cfg, scheduler, lr)
                new = schedulers.at_other_rate(new, names, rate)
                why.update({f'{name} by the same rule': None for name in names})
        except schedulers.UnknownScheduler as error:
            warnings.append(f'param_scheduler {type_name(scheduler)} was not scaled: {error}')
        return new

    old = cfg.get('param_scheduler')
    new = _each_scheduler(old, change) if old else old
    if new != old:
        settings.append(Setting(('param_scheduler',), new, ', '.join(why)))
    if iterations != 1 and loop.get('max_iters'):
        settings += _iterations_of_loop(cfg, iterations)
    return settings, warnings


def _each_scheduler(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Schedulers stand alone, in a list, or in a dict by optimizer."""
    if isinstance(value, (list, tuple)):
        return [_each_scheduler(item, change) for item in value]
    if 'type' in value:
        return change(value)
    return {key: _each_scheduler(item, change) for key, item in value.items()}


def _iterations_of_loop(cfg: Config, factor: float) -> list[Setting]:
    """What counts iterations beside the schedulers: the loop, evaluation, checkpoints."""

    def times(count: int) -> int:
        return max(1, round(count * factor))

    why = 'as many images as before'
    loop = dict(cfg.train_cfg)
    for key in ('max_iters', 'val_interval', 'val_begin'):
        if loop.get(key):
            loop[key] = times(loop[key])
    if loop.get('dynamic_intervals'):
        loop['dynamic_intervals'] = [(times(a), times(b)) for a, b in loop['dynamic_intervals']]
    settings = [
        Setting(('train_cfg', key), value, why)
        for key, value in loop.items()
        if value != cfg.train_cfg[key]
    ]
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if not hook.get('by_epoch', True) and hook.get('interval', 0) > 0:
        place = ('default_hooks', 'checkpoint', 'interval')
        settings.append(Setting(place, times(hook['interval']), why))
    return settings


def clipping(cfg: Config, start: str | None) -> list[Setting]:
    """Clipped gradients for a detector from scratch by SGD (docs/study.md, RetinaNet)."""
    wrapper = cfg.get('optim_wrapper') or {}
    ours = start == 'scratch' and find_scope(cfg) == 'mmdet' and optimizer_setting(cfg, 'lr')
    if not ours or wrapper.get('clip_grad') or type_name(wrapper['optimizer']) != 'SGD':
        return []
    why = 'parts without a norm: a detector from scratch diverges'
    return [Setting(('optim_wrapper', 'clip_grad'), dict(max_norm=10), why)]
