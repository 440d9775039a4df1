"""The learning rate at another batch, and the least at which anything is learned."""

from __future__ import annotations

import copy
import math

from mmengine.config import Config

from wsbcn_mm.openmmlab.config import find_scope, type_name
from wsbcn_mm.openmmlab.conversion.recipe import base_batch_size, batch_size, optimizer_setting

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

# These divide a step by the size of the gradients: what the noise of a small batch does to it grows
# with the root of the batch (Malladi et al., arXiv 2205.10287; You et al., arXiv 1904.00962).
BY_THE_ROOT = ('Adam', 'AdamW', 'Adamax', 'NAdam', 'RAdam', 'Lamb', 'LAMB')

# The rate times the steps of the optimizer: what turns a weight without a scale. Every training by
# SGD that learned in docs/study.md had more (the least 2.4: digits, 0.001 over 2,400 steps).
LEAST_ROUTE = 2.0


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


def as_scaled(cfg: Config, processes: int) -> Config:
    """A copy with the rate that mmengine makes of it where ``auto_scale_lr`` is on."""
    cfg = copy.deepcopy(cfg)
    base, images, lr = base_batch_size(cfg), batch_size(cfg), optimizer_setting(cfg, 'lr')
    if (cfg.get('auto_scale_lr') or {}).get('enable') and base and images and lr:
        total = images * processes
        cfg.optim_wrapper.optimizer.lr = float(f'{lr * total / base:.6g}')
        cfg.auto_scale_lr.update(enable=False, base_batch_size=total)
    return cfg
