"""What a training recipe says: images and GPUs, learning rate, frozen parts, decay, estimates.

Each fact is read in one place: the converter sets it, the audit judges it. The functions take the
config, or a node of its model, and change nothing.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from wsbcn_mm.openmmlab.config import (
    PRETRAINED,
    find_scope,
    inner_datasets,
    prefixes_of,
    type_name,
)
from wsbcn_mm.openmmlab.conversion import schedulers
from wsbcn_mm.openmmlab.conversion.changes import Setting
from wsbcn_mm.openmmlab.conversion.probe import Node
from wsbcn_mm.openmmlab.registry import ESTIMATES_HOOK

# ---- images and GPUs ---------------------------------------------------------------------------


def batch_size(cfg: Config) -> int | None:
    """Items of the data in a batch of one process; None where the config does not say."""
    loader = cfg.get('train_dataloader')
    size = loader.get('batch_size') if isinstance(loader, dict) else None
    return size if isinstance(size, int) else None


def images_per_item(cfg: Config) -> int:
    """Images in one item of the data: several of each of several persons, for a triplet loss."""
    datasets = inner_datasets((cfg.get('train_dataloader') or {}).get('dataset'))
    sampler = (datasets[0].get('triplet_sampler') if datasets else None) or {}
    return sampler.get('num_ids', 1) * sampler.get('ins_per_id', 1)


def images_per_gpu(cfg: Config) -> int | None:
    """Images in a batch of one process; None where the config does not say."""
    size = batch_size(cfg)
    return None if size is None else size * images_per_item(cfg)


def named_batch(cfg: Config) -> tuple[int, int] | None:
    """GPUs and images per GPU that a file name such as ``..._8xb2-...`` tells."""
    match = re.search(r'_(\d+)xb(\d+)', Path(cfg.filename or '').stem)
    return (int(match[1]), int(match[2])) if match else None


def base_batch_size(cfg: Config) -> int | None:
    """Images per step that the learning rate is for, as ``auto_scale_lr`` says."""
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    return base if isinstance(base, int) else None


def batch_of_bases(cfg: Config) -> tuple[int, int] | None:
    """What `named_batch` finds in the nearest file that a config inherits its learning rate from.

    A config of one's own is seldom named like those of the hosts, and MMSegmentation's say in their
    names alone for how many images their rates are.
    """
    if not cfg.filename or not Path(cfg.filename).is_file():
        return None
    for base in Config._get_base_files(cfg.filename):
        path, _ = Config._get_cfg_path(base, cfg.filename)
        parent = Config.fromfile(path)
        if optimizer_setting(parent, 'lr') == optimizer_setting(cfg, 'lr'):
            found = named_batch(parent) or batch_of_bases(parent)
            if found:
                return found
    return None


def gpus_of_rate(cfg: Config) -> int | None:
    """The GPUs that the learning rate is for: by ``auto_scale_lr``, else by the file name."""
    base, images = base_batch_size(cfg), images_per_gpu(cfg)
    if base and images and base % images == 0:
        return base // images
    named = named_batch(cfg) or (None if base else batch_of_bases(cfg))
    return named[0] if named else None


def gpus_to_train_with(cfg: Config) -> int | None:
    """The GPUs that a config is meant for: by its file name, else by ``auto_scale_lr``."""
    named = named_batch(cfg)
    if named is None and base_batch_size(cfg) is None:
        return None
    return named[0] if named else gpus_of_rate(cfg)


def images_of_rate(cfg: Config) -> int | None:
    """Images per iteration that the learning rate is for; None where nothing tells."""
    base = base_batch_size(cfg)
    named = None if base else named_batch(cfg) or batch_of_bases(cfg)
    return base or (named[0] * named[1] if named else None)


# ---- learning rate and schedule ----------------------------------------------------------------


def optimizer_setting(cfg: Config, name: str) -> Any:
    """A setting of the optimizer, such as ``'lr'``; None where there is none, or no optimizer."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    return optimizer.get(name) if isinstance(optimizer, dict) else None


# Measured with WS + BCN at one image per step, see docs/study.md ("The learning rate"). Weights in
# front of a norm have no scale: what a step turns them by does not shrink with the batch as the
# linear rule has it, and a rate that it took far down from a batch of 16 learns nothing in a short
# run. By host (what is learned), start and optimizer.
LEAST_RATES: dict[tuple[str, str, str], float] = {
    ('mmseg', 'scratch', 'SGD'): 0.03,
    ('mmseg', 'pretrained', 'SGD'): 0.01,
    ('mmdet', 'scratch', 'SGD'): 0.02,
    ('mmdet', 'pretrained', 'SGD'): 0.01,
    ('mmseg', 'scratch', 'AdamW'): 0.001,
    ('mmdet', 'scratch', 'AdamW'): 0.001,
    ('mmpretrain', 'scratch', 'SGD'): 0.003,
}
# Upwards from there the linear rule holds: to so many images per step, where that was measured.
LINEAR_UP_TO: dict[tuple[str, str, str], int] = {
    ('mmseg', 'scratch', 'SGD'): 4,
    ('mmpretrain', 'scratch', 'SGD'): 8,
}


def least_rate(cfg: Config, start: str | None, images: int = 1) -> float | None:
    """The rate below which the rule of `rate_at` takes no config; None where none was measured.

    Args:
        cfg: The config, for its optimizer.
        start: ``'scratch'`` or ``'pretrained'``; None: unknown.
        images: Per step of the optimizer.
    """
    wrapper, lr = cfg.get('optim_wrapper') or {}, optimizer_setting(cfg, 'lr')
    if start is None or 'constructor' in wrapper or not isinstance(lr, (int, float)) or lr <= 0:
        return None
    kind = type_name(wrapper['optimizer'])
    key = (str(find_scope(cfg)), start, kind)
    least = LEAST_RATES.get(key)
    if least is None:
        return None
    if kind == 'SGD':
        return least * min(images, LINEAR_UP_TO.get(key, 1))
    # Adam's was measured on convolutions; transformers begin with a tenth of it and stay there.
    return min(least, lr)


# These divide a step by the size of the gradients: what the noise of a small batch does to it grows
# with the root of the batch (Malladi et al., arXiv 2205.10287; You et al., arXiv 1904.00962).
BY_THE_ROOT = ('Adam', 'AdamW', 'Adamax', 'NAdam', 'RAdam', 'Lamb', 'LAMB')


def rate_at(cfg: Config, ratio: float, start: str | None, images: int) -> tuple[float, str]:
    """The learning rate at another number of images per step, and by which rule.

    The linear rule, for Adam and its kind that of the root, down to `least_rate`.

    Args:
        cfg: The config, for its optimizer, which has a rate.
        ratio: Images per step to those that the rate is for.
        start: As in `least_rate`.
        images: Per step of the optimizer.
    """
    lr = optimizer_setting(cfg, 'lr')
    root = type_name(cfg.optim_wrapper.optimizer) in BY_THE_ROOT
    rate, rule = lr * (math.sqrt(ratio) if root else ratio), f'{"root" if root else "linear"} rule'
    least = least_rate(cfg, start, images)
    if least is None or rate >= least:
        return rate, rule
    count = 'one image' if images == 1 else f'{images} images'
    return least, f'what {start} training needs at {count}, where the {rule} says {rate:.3g}'


# The rate times the steps of the optimizer: what turns a weight without a scale. Every training by
# SGD that learned in docs/study.md had more (the least 2.4: digits, 0.001 over 2,400 steps).
LEAST_ROUTE = 2.0
LARGE = 50_000_000  # bytes of an annotation file


def as_scaled(cfg: Config, processes: int) -> Config:
    """A copy with the rate that mmengine makes of it where ``auto_scale_lr`` is on."""
    cfg = copy.deepcopy(cfg)
    base, images, lr = base_batch_size(cfg), batch_size(cfg), optimizer_setting(cfg, 'lr')
    if (cfg.get('auto_scale_lr') or {}).get('enable') and base and images and lr:
        total = images * processes
        cfg.optim_wrapper.optimizer.lr = float(f'{lr * total / base:.6g}')
        cfg.auto_scale_lr.update(enable=False, base_batch_size=total)
    return cfg


def iterations(cfg: Config, processes: int) -> int | None:
    """Iterations of the whole training; None where they cannot be counted."""
    loop = cfg.get('train_cfg') or {}
    count: int | None = loop.get('max_iters')
    if count is None and loop.get('max_epochs'):
        images, batch = training_images(cfg), batch_size(cfg)
        if images and batch:
            count = loop['max_epochs'] * math.ceil(images / (batch * processes))
    return count or None


def steps(cfg: Config, processes: int) -> int | None:
    """Steps of the optimizer in the whole training; None where they cannot be counted."""
    count = iterations(cfg, processes)
    return count // accumulation(cfg) if count else None


def training_images(cfg: Config) -> int | None:
    """How many images a training set lists, of which ``indices`` may take some.

    None where it is wrapped, is no list of the hosts, or is so long that counting takes seconds: a
    training on it is not short.
    """
    dataset = (cfg.get('train_dataloader') or {}).get('dataset')
    if not isinstance(dataset, dict) or dataset not in inner_datasets(dataset):
        return None
    taken = dataset.get('indices')  # the first so many, the last (below 0), or these
    if taken is None:
        return _listed(dataset)
    taken = abs(taken) if isinstance(taken, int) else len(taken)
    return min(taken, _listed(dataset) or taken) or None


def _listed(dataset: dict[str, Any]) -> int | None:
    root, names = dataset.get('data_root') or '', dataset.get('ann_file') or ''
    file = Path(root, names)
    if not names or not file.is_file():
        if isinstance(dataset.get('data_prefix'), str):  # folders of classes may hold millions
            return None
        folder = Path(root, prefixes_of(dataset).get('img_path') or '')
        suffix = dataset.get('img_suffix', '.jpg')  # the default of BaseSegDataset
        found = 0 if names or not folder.is_dir() else sum(1 for _ in folder.rglob(f'*{suffix}'))
        return found or None
    if file.stat().st_size > LARGE:
        return None
    if file.suffix == '.json':
        try:
            content = json.loads(file.read_bytes())
        except ValueError:  # damaged: the one who trains on it says where
            return None
        images = content.get('images') if isinstance(content, dict) else None
        return len(images) if isinstance(images, list) else None
    return sum(1 for line in file.read_text().splitlines() if line.strip())


def accumulation(cfg: Config) -> int:
    """Iterations whose gradients make one step of the optimizer."""
    return (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)


@dataclass(frozen=True)
class Batch:
    """How a config is to be trained.

    Attributes:
        images: Per GPU and iteration.
        gpus: Processes; None: as many as the learning rate is for.
        accumulate: Iterations per step of the optimizer; None: as the config says.
        keep_lr: Whether the learning rate stays.
        stretch: Whether a schedule by iterations follows, so that as many images are seen.
        start: What training starts from, ``'scratch'`` or ``'pretrained'``: the rate does not go
            below what was measured for it, see `least_rate`. None: the linear rule alone.
    """

    images: int = 1
    gpus: int | None = None
    accumulate: int | None = None
    keep_lr: bool = False
    stretch: bool = True
    start: str | None = None


def rescaled(cfg: Config, batch: Batch) -> tuple[list[Setting], list[str]]:
    """What another batch changes: images, learning rate, iterations.

    Rates follow the images per step of the optimizer, see `rate_at`. Where a schedule counts
    iterations, all its counts follow the images per iteration, so that as many images are seen.

    Args:
        cfg: The config.
        batch: What is wanted.

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
    settings, warnings = [Setting(('train_dataloader', 'batch_size'), batch.images)], []
    old_gpus, old_total = gpus_of_rate(cfg), images_of_rate(cfg)
    gpus = batch.gpus or old_gpus
    if gpus is not None and batch.gpus and old_total is None:
        warnings.append(
            f'neither auto_scale_lr nor the file name tells for how many GPUs the learning rate '
            f'is: it is taken to be for {batch.gpus}'
        )
        old_gpus, old_total = gpus, gpus * old
    if gpus is None or old_total is None:  # the same number, whatever it is
        ratio, rule = batch.images / old, f'{old} -> {batch.images} images per GPU'
    else:
        total = gpus * batch.images
        ratio = total / old_total
        rule = f'{old} -> {batch.images} images per GPU, '
        if (old_gpus or gpus) * old == old_total:
            number = f'{gpus}' if old_gpus in (gpus, None) else f'{old_gpus} -> {gpus}'
            rule += f'{number} GPUs: total {old_total} -> {total}'
        else:
            rule += f'{gpus} GPUs: {total} images per step, and auto_scale_lr says {old_total}'
    old_accumulate = accumulation(cfg)
    accumulate = batch.accumulate or old_accumulate
    if accumulate != old_accumulate:
        settings.append(Setting(('optim_wrapper', 'accumulative_counts'), accumulate))
        rule += f', accumulated over {old_accumulate} -> {accumulate} iterations'
    if not batch.keep_lr and gpus is not None:
        scale = dict(cfg.get('auto_scale_lr') or dict(enable=False))
        scale['base_batch_size'] = gpus * batch.images
        settings.append(Setting(('auto_scale_lr',), scale, 'what the learning rate is for'))
    per_step = (gpus or 1) * batch.images * accumulate
    lr, factor, times = optimizer_setting(cfg, 'lr'), 1.0, ratio * accumulate / old_accumulate
    if not batch.keep_lr and isinstance(lr, (int, float)):
        rate, why = rate_at(cfg, times, batch.start, per_step)
        factor = rate / lr if lr else 1.0
        if factor != 1:
            place = ('optim_wrapper', 'optimizer', 'lr')
            settings.append(Setting(place, float(f'{rate:.6g}'), f'{why}: {rule}'))
    elif not batch.keep_lr and times != 1:
        warnings.append('the config has no optim_wrapper.optimizer.lr to scale')
    more, warned = _schedule(cfg, factor, 1 / ratio, batch.stretch)
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


# ---- weight decay ------------------------------------------------------------------------------


def decay_of_norms(cfg: Config) -> float | None:
    """The weight decay that scales and shifts of norms get, if any.

    None, too, where an optimizer wrapper constructor of its own decides.
    """
    wrapper = cfg.get('optim_wrapper')
    decay = optimizer_setting(cfg, 'weight_decay')
    if not decay or 'constructor' in wrapper:
        return None
    spared = (wrapper.get('paramwise_cfg') or {}).get('norm_decay_mult') is not None
    return None if spared else decay


def no_decay_of_norms(cfg: Config) -> list[Setting]:
    """What spares scales and shifts of norms from weight decay."""
    if decay_of_norms(cfg) is None:
        return []
    why = 'scales and shifts need no weight decay'
    place = ('optim_wrapper', 'paramwise_cfg')
    if cfg.optim_wrapper.get('paramwise_cfg'):
        return [Setting((*place, 'norm_decay_mult'), 0.0, why)]
    return [Setting(place, dict(norm_decay_mult=0.0), why)]


# ---- frozen parts and their weights ------------------------------------------------------------


def nothing_frozen(node: Node) -> int:
    """The ``frozen_stages`` that freezes nothing: -1 in most classes, 0 in some."""
    return 0 if node.defaults.get('frozen_stages') == 0 else -1


def frozen_stages(node: Node) -> int | None:
    """The ``frozen_stages`` of a part that freezes some of it; None where nothing is frozen."""
    frozen = node.get('frozen_stages')
    return frozen if isinstance(frozen, int) and frozen > nothing_frozen(node) else None


def frozen_norms(node: Node) -> list[str]:
    """The arguments of a part by which it freezes statistics, where they are set."""
    return [key for key in ('norm_eval', 'partial_bn', 'bn_frozen') if node.get(key)]


def pretrained_init(node: Node) -> str | None:
    """The checkpoint of a part's own ``init_cfg=dict(type='Pretrained')``; None without one."""
    init = node.get('init_cfg')
    pretrained = isinstance(init, dict) and type_name(init) in PRETRAINED
    return init['checkpoint'] if pretrained else None


def pretrained_argument(node: Node) -> str | None:
    """The checkpoint of a part's argument ``pretrained``; None without one."""
    name = node.get('pretrained')
    return name if isinstance(name, str) else None


# ---- estimates ---------------------------------------------------------------------------------


def has_estimates_hook(cfg: Config) -> bool:
    """Whether the estimates of all ranks are kept equal."""
    return any(type_name(hook) == ESTIMATES_HOOK for hook in cfg.get('custom_hooks') or [])
