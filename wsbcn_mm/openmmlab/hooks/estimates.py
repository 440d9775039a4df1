"""The hook of mmengine that keeps the estimates of Batch-Channel Normalization right in training.

It belongs into every config with BCN (ours have it, `tools/train.py` adds it)::

    custom_hooks = [dict(type='EstimatesHook')]

It does all that training needs: the same estimates on all ranks, the rate by images per step, and a
word where an activation overflowed.
"""

import logging
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch import nn
from torch.utils.data import DataLoader

from wsbcn_mm import distributed
from wsbcn_mm.checks import check_choice
from wsbcn_mm.estimates import layers_of, rate_of_step, skipped_updates, synchronize_estimates
from wsbcn_mm.layers import BatchChannelNorm
from wsbcn_mm.layers.standardization import standardize_once_per_forward
from wsbcn_mm.openmmlab.compat import unwrapped

SCHEDULES = ('constant', 'lr')
SCALES = ('ranks', 'images', None)


@HOOKS.register_module()
class EstimatesHook(Hook):
    """Keeps the estimates the same on all ranks, sets their rate, says what they left out.

    Runs before anything that reads the model after a step: EMA, checkpoints, validation.

    - Once per iteration, `wsbcn_mm.estimates.synchronize_estimates`: one all-reduce for all layers
      with ``sync='step'``. The running counters of their BatchNorms may differ between ranks.
    - Before each iteration, the rate (``momentum``) of every layer in estimate mode:
      `wsbcn_mm.estimates.rate_of_step` of the rate in the config. Logged as ``bcn_rate`` (of the
      first layer). Layers with ``momentum='cumulative'`` keep it until ``freeze_after``.
    - Every ``interval`` iterations, before each checkpoint and at the end: a warning that names the
      layers whose updates were left out because they were not finite; each layer once.

    Args:
        schedule: ``'constant'``, or ``'lr'``: the rate follows the learning rate (of the first
            parameter group, by its initial value).
        warmup: Average over all steps until the rate is reached; see `rate_of_step`. Until then the
            layers have ``momentum='cumulative'``, with the variance around the true mean, so that
            nothing is left of where the estimates began. In a short training of a detector from
            scratch it was worth 4 points of mask mAP on one data set (docs/study.md); on others it
            made no difference (docs/reliability.md), and it is off. A layer counts its steps in the
            checkpoint (``num_batches_tracked``): resuming goes on, and statistics that were loaded
            with their counter stay.
        scale: What the rate in the config is the weight of. ``'images'``: of a single image; a step
            with several, of all ranks where they share their estimates, has a larger rate, so that
            as many images are remembered. Of a video a 2d network takes the frames of a clip as
            samples (its group stage, too, has statistics of each frame): they are the images here,
            clips times frames. A 3d network takes a clip as one sample, its time is an axis as
            height and width are: clips are counted. ``'ranks'``: of a step of one rank. None: of
            the whole step.
        interval: Iterations between looks at what was left out; each waits for the device once.
        freeze_after: Iterations after which the estimates stay as they are, in estimate mode: their
            rate is 0. None: they follow the weights to the end. See docs/which_norm.md for where it
            helped. Evaluate with these estimates: the weights have learned with them, and
            statistics that are measured anew (`PreciseStatsHook`) are others.

    Raises:
        ValueError: an unknown schedule or scale, an interval below 1, a negative freeze_after.
    """

    priority = 'HIGH'

    def __init__(
        self,
        schedule: str = 'constant',
        warmup: bool = False,
        scale: str | None = 'images',
        interval: int = 50,
        freeze_after: int | None = None,
    ) -> None:
        check_choice(schedule, SCHEDULES, 'schedule')
        check_choice(scale, SCALES, 'scale')
        if interval < 1:
            raise ValueError(f'interval must be at least 1\n  got {interval!r}')
        if freeze_after is not None and freeze_after < 0:
            raise ValueError(f'freeze_after must be at least 0, or None\n  got {freeze_after!r}')
        self.schedule, self.warmup, self.scale = schedule, warmup, scale
        self.interval, self.freeze_after = interval, freeze_after
        self._told: set[str] = set()

    def before_run(self, runner) -> None:
        """Makes every forward pass standardize each weight once; see `StandardizationHook`."""
        standardize_once_per_forward(unwrapped(runner.model))

    def before_train(self, runner) -> None:
        """Remembers the rates of the config, and how many steps each layer has seen."""
        self._model = unwrapped(runner.model)
        layers = layers_of(self._model).values()
        self._start = runner.iter
        compiled = bool(runner.cfg.get('compile'))
        batch = self._images_per_rank(runner.train_dataloader) if self.scale == 'images' else 1
        world = get_dist_info()[1]
        self._has_clips = self.scale == 'images' and takes_clips(self._model)
        # The rate of a step is computed once for all layers that have the same.
        self._layers: dict[_Setting, list[BatchChannelNorm]] = {}
        for layer in layers:
            # What a host froze a BatchNorm by has no rate.
            if layer.mode == 'estimate' and hasattr(layer.bn, 'momentum'):
                ranks = 1 if layer.sync is None else world
                images = {'ranks': ranks, 'images': batch * ranks, None: 1}[self.scale]
                seen = int(layer.bn.num_batches_tracked) if self.warmup else None
                self._layers.setdefault(_Setting(layer.momentum, images, seen), []).append(layer)
        # What holds the rate of compiled code: a number that changes would be compiled anew.
        self._tensors = {
            setting: torch.zeros((), dtype=torch.float64) for setting in self._layers if compiled
        }
        if not layers:
            print_log(
                'EstimatesHook: the model has no BatchChannelNorm layer',
                runner.logger,
                logging.WARNING,
            )

    @staticmethod
    def _images_per_rank(loader: DataLoader) -> float:
        """Images of a step; on average where a sampler takes turns between sizes."""
        size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None)
        if size is None:
            print_log(
                f'EstimatesHook: {type(loader.batch_sampler).__name__} does not say how many images'
                ' a batch has; the rate is that of one',
                'current',
                logging.WARNING,
            )
            return 1
        return sum(size) / len(size) if isinstance(size, (list, tuple)) else size

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Sets the rates of this step."""
        done = runner.iter - self._start
        frozen = self.freeze_after is not None and runner.iter >= self.freeze_after
        ratio = 1.0
        if self.schedule == 'lr':
            group = runner.optim_wrapper.param_groups[0]
            ratio = group['lr'] / group.get('initial_lr', group['lr'])
        frames = samples_of_a_clip(data_batch) if self._has_clips else 1
        for place, (setting, layers) in enumerate(self._layers.items()):
            rate, images, seen = setting
            images *= frames
            averages = False
            if frozen:
                now = 0.0
            elif rate == 'cumulative':
                continue
            else:
                now = goal = rate_of_step(rate, images, None, ratio)
                if seen is not None:
                    now = rate_of_step(rate, images, seen + done, ratio)
                    averages = now > goal
            tensor = self._tensors.get(setting)
            held = now if tensor is None else tensor.fill_(now)
            _set_rate(layers, None if averages else held)
            if place == 0:
                runner.message_hub.update_scalar('train/bcn_rate', now)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Synchronises where there are other ranks; looks at what was left out now and then."""
        if distributed.world_size() > 1:
            synchronize_estimates(self._model)
        if self.every_n_train_iters(runner, self.interval):
            self._report(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Says what was left out before the model is saved."""
        self._report(runner)

    def after_train(self, runner) -> None:
        """Gives the layers their rates back; says what was left out."""
        for (rate, *_), layers in self._layers.items():
            _set_rate(layers, None if rate == 'cumulative' else rate)
        if distributed.world_size() == 1:
            # Counted anew from here, should there be other ranks one day.
            synchronize_estimates(self._model)
        self._report(runner)

    def _report(self, runner) -> None:
        new = {
            name: count
            for name, count in skipped_updates(unwrapped(runner.model)).items()
            if name not in self._told
        }
        if not new:
            return
        self._told |= set(new)
        text = ', '.join(f'{name} ({count})' for name, count in new.items())
        print_log(
            f'values that are not finite reached these layers on rank {get_dist_info()[0]}; their '
            f'estimates left the updates out (number of updates): {text}\n  expected now and then '
            'with loss scaling; otherwise look for an overflow in front of the first one',
            runner.logger,
            logging.WARNING,
        )


class _Setting(NamedTuple):
    """What the rate of a step is made of.

    Attributes:
        rate: Of the config.
        images: Per step; of a network for videos, clips.
        seen: Updates that the estimates have seen before the training; None: of no interest.
    """

    rate: Any
    images: float
    seen: int | None


def _set_rate(layers: list[BatchChannelNorm], rate: float | torch.Tensor | None) -> None:
    """Sets it where it is another: somebody else may have set it, or replaced the child."""
    for layer in layers:
        # Attributes of modules, of all layers in every step, would take longer than the rest.
        bn: Any = layer._modules['bn']
        old = vars(bn).get('momentum', '')
        if old is rate or (type(old) is type(rate) is float and old == rate):
            continue
        if hasattr(bn, 'momentum'):  # else a host has frozen it
            bn.momentum = rate


def takes_clips(model: nn.Module) -> bool:
    """Whether a model is a recognizer of MMAction2, whose inputs are clips of frames."""
    return any(
        kind.__name__ == 'BaseRecognizer' and kind.__module__.startswith('mmaction.')
        for kind in type(model).__mro__
    )


def samples_of_a_clip(batch: dict) -> int:
    """How many samples a video of a batch is for the layers of MMAction2's networks.

    They put the first axis of each input to the batch: frames (T, C, H, W) in 2d networks, crops of
    the clip (1, C, T, H, W) in 3d ones.

    Args:
        batch: What the data loader gives; ``inputs`` with a tensor for each video, in a dict where
            there are several modalities.
    """
    inputs = batch['inputs']
    if isinstance(inputs, dict):
        inputs = next(iter(inputs.values()))
    return len(inputs[0])
