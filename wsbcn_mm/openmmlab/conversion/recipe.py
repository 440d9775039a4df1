"""What a training recipe says: images and GPUs, optimizer, decay, frozen parts, estimates.

Each fact is read in one place: the converter sets it, the audit judges it. The functions take the
config, or a node of its model, and change nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmengine.config import Config

from wsbcn_mm.openmmlab.config import PRETRAINED, type_name
from wsbcn_mm.openmmlab.conversion.changes import Setting
from wsbcn_mm.openmmlab.conversion.probe import Node
from wsbcn_mm.openmmlab.loaders import inner_datasets
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


# ---- optimizer ---------------------------------------------------------------------------------


def optimizer_setting(cfg: Config, name: str) -> Any:
    """A setting of the optimizer, such as ``'lr'``; None where there is none, or no optimizer."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    return optimizer.get(name) if isinstance(optimizer, dict) else None


def accumulation(cfg: Config) -> int:
    """Iterations whose gradients make one step of the optimizer."""
    return (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)


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
