"""The range test of the learning rate: what tools/analysis_tools/find_lr.py shows.

A short training in which the rate rises from step to step (Smith, arXiv 1506.01186), on the user's
own data at the user's own batch. Nothing that it makes is kept.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from wsbcn_mm.openmmlab import explain
from wsbcn_mm.openmmlab.command_line import NothingToTrain, build_runner, harden, no_batch
from wsbcn_mm.openmmlab.config import type_name
from wsbcn_mm.openmmlab.places import LR
from wsbcn_mm.openmmlab.registry import DATA_CHECK_HOOK, ESTIMATES_HOOK

DIVERGED = 4.0  # times the lowest mean loss: the test ends
WINDOW = 0.1  # share of the steps over which the loss is averaged
MARGIN = 3.0  # the suggestion lies this factor below the rate of the lowest loss


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw.

    Attributes:
        rates: The learning rate of each step.
        losses: The loss of each step, before its update.
        smooth: The losses averaged over the steps around.
        suggestion: The rate to train with; None where no rate made the loss fall.
    """

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    suggestion: float | None


def range_test(
    cfg: Config,
    lowest: float = 1e-5,
    highest: float = 1.0,
    steps: int = 300,
    report: Callable[[str], None] = lambda _: None,
) -> RangeTest:
    """Trains for a few hundred steps with a rising rate.

    The rate of step i of n is ``lowest * (highest / lowest) ** (i / (n - 1))``; parameters with a
    multiplier (``paramwise_cfg``) keep it. The test ends early where the averaged loss has risen to
    four times its lowest value, or is not finite. Data, batch, accumulation, clipping, precision
    and the weights that training starts from are the config's; its schedulers, evaluation,
    checkpoints and custom hooks are left out.

    Args:
        cfg: A config that trains; not changed.
        lowest: The first rate.
        highest: The last one.
        steps: Steps of the optimizer.
        report: Shows progress.

    Returns:
        Rates, losses and a suggestion, see `suggest`.

    Raises:
        ValueError: an argument out of range, a config without ``optim_wrapper.optimizer.lr``, one
            whose data make no batch, or a first loss that is not finite.
    """
    if not 0 < lowest < highest:
        raise ValueError(f'lowest must be above 0 and below highest\n  got {lowest}, {highest}')
    if steps < 20:
        raise ValueError(f'steps must be at least 20\n  got {steps}')
    wrapper = cfg.get('optim_wrapper') or {}
    if not isinstance(wrapper.get('optimizer'), dict) or 'lr' not in wrapper['optimizer']:
        raise ValueError(f'the config has no {LR}: one optimizer with one rate is needed')
    accumulate = wrapper.get('accumulative_counts', 1)
    hook = RisingRate(lowest, highest, steps, accumulate, report)
    with tempfile.TemporaryDirectory(prefix='find_lr_') as folder:
        short = _short_run(cfg, lowest, steps * accumulate, folder)
        with explain.named(short):
            runner = build_runner(short)
            runner.register_hook(hook)
            runner.train()
    # What the accumulated iterations of a step lost, together.
    count = len(hook.losses) // accumulate
    if not count:
        raise ValueError(
            'the loss of the first step is not finite, before any update\n  the data, the weights '
            'that training starts from, or the precision (AMP) make it so: a training at any rate '
            'begins with it'
        )
    losses = [sum(hook.losses[i * accumulate :][:accumulate]) / accumulate for i in range(count)]
    rates = [hook.rate(i) for i in range(count)]
    smooth = averaged(losses, max(3, round(WINDOW * steps)))
    return RangeTest(rates, losses, smooth, suggest(rates, smooth))


class RisingRate(Hook):
    """Sets the rate of each step and keeps its loss."""

    priority = 'VERY_LOW'  # after schedulers and everything else that sets rates

    def __init__(
        self,
        lowest: float,
        highest: float,
        steps: int,
        accumulate: int,
        report: Callable[[str], None],
    ) -> None:
        self.lowest, self.highest, self.steps = lowest, highest, steps
        self.accumulate, self.report = accumulate, report
        self.losses: list[float] = []
        self._best = math.inf  # lowest mean over a window

    def rate(self, step: int) -> float:
        """The rate of a step."""
        return self.lowest * (self.highest / self.lowest) ** (step / (self.steps - 1))

    def before_train(self, runner: Runner) -> None:
        """Keeps what each group's rate is in terms of the optimizer's; lets the data not wait."""
        loop = runner.train_loop
        loop.dataloader_iterator = _pass_after_pass(
            loop.dataloader, loop.dataloader_iterator._iterator
        )
        groups = runner.optim_wrapper.param_groups
        self._shares = [group['lr'] / self.lowest for group in groups]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the rate."""
        rate = self.rate(runner.iter // self.accumulate)
        for group, share in zip(runner.optim_wrapper.param_groups, self._shares, strict=True):
            group['lr'] = rate * share

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Keeps the loss; ends the test where it has become useless to go on."""
        self.losses.append(float(outputs['loss'].detach()))
        done = len(self.losses) // self.accumulate
        self.report(f'step {done}/{self.steps}, rate {self.rate(max(done - 1, 0)):.2g}')
        window = max(3, round(WINDOW * self.steps)) * self.accumulate
        diverged = not math.isfinite(self.losses[-1])
        if diverged:
            self.losses.pop()
        elif len(self.losses) >= 2 * window:
            self._best = min(self._best, sum(self.losses[-2 * window : -window]) / window)
            diverged = sum(self.losses[-window:]) / window > DIVERGED * self._best
        runner.train_loop.stop_training |= diverged


def _pass_after_pass(loader: DataLoader, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches that mmengine's loop by iterations has, without its pause between two passes.

    It sleeps for two seconds before its data begin anew: with few images that is most of the test.
    Its loop by epochs begins them anew in the same way and does not.

    Args:
        loader: Of the loop.
        batches: The first pass, which the loop has begun.
    """
    samplers = loader.sampler, getattr(loader.batch_sampler, 'sampler', None)
    sampler = next((s for s in samplers if hasattr(s, 'set_epoch')), None)
    for epoch in itertools.count(1):
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise NothingToTrain(no_batch(loader))
        if sampler is not None:
            sampler.set_epoch(epoch)
        batches = iter(loader)


def _short_run(cfg: Config, lowest: float, iterations: int, folder: str) -> Config:
    """The config of the test: what decides about the loss, and nothing that writes."""
    cfg = copy.deepcopy(cfg)
    harden(cfg)  # the estimates' rate by images per step, as tools/train.py has it
    cfg.optim_wrapper.optimizer.lr = lowest
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations + 1
    )
    for key in ('param_scheduler', 'visualizer', 'vis_backends', 'auto_scale_lr'):
        cfg.pop(key, None)
    for split in ('val', 'test'):
        for key in (f'{split}_dataloader', f'{split}_evaluator', f'{split}_cfg'):
            cfg.pop(key, None)
    cfg.custom_hooks = [
        hook for hook in cfg.get('custom_hooks') or [] if type_name(hook) == ESTIMATES_HOOK
    ] + [dict(type=DATA_CHECK_HOOK)]
    cfg.default_hooks = dict(
        runtime_info=dict(type='RuntimeInfoHook'),
        timer=dict(type='IterTimerHook'),
        sampler_seed=dict(type='DistSamplerSeedHook'),
        logger=None,
        param_scheduler=None,
        checkpoint=None,
    )
    cfg.log_processor, cfg.log_level = dict(by_epoch=False), 'ERROR'
    cfg.work_dir, cfg.resume = folder, False
    cfg.setdefault('launcher', 'none')
    cfg.experiment_name = folder.rpartition('/')[2]
    return cfg


def averaged(values: list[float], window: int) -> list[float]:
    """Means over a window around each value, cut off at both ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    found = []
    for i in range(len(values)):
        first, last = max(0, i - window // 2), min(len(values), i + window // 2 + 1)
        found.append((sums[last] - sums[first]) / (last - first))
    return found


def suggest(rates: list[float], smooth: list[float]) -> float | None:
    """The rate to train with: a third of the one at which the averaged loss was lowest.

    Up to there the loss went on falling at every rate; the third is the distance that a training
    keeps which does not stop there but goes on. Rounded to 1, 2, 3 or 5 of a power of ten.

    Args:
        rates: Rising.
        smooth: The averaged loss at each.

    Returns:
        None where the loss fell by less than a twentieth anywhere: no rate was seen to learn.
    """
    best = min(range(len(smooth)), key=lambda i: smooth[i])
    start = sum(smooth[: max(1, len(smooth) // 10)]) / max(1, len(smooth) // 10)
    if smooth[best] > 0.95 * start:
        return None
    return rounded(rates[best] / MARGIN)


def rounded(rate: float) -> float:
    """The nearest of 1, 2, 3, 5 times a power of ten."""
    power = math.floor(math.log10(rate))
    steps = [m * 10.0**p for p in (power, power + 1) for m in (1, 2, 3, 5)]
    return float(f'{min(steps, key=lambda step: abs(math.log(step / rate))):.6g}')
