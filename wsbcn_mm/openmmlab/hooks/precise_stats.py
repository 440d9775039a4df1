"""The hook of mmengine that measures running statistics anew before they are used and saved."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS

from wsbcn_mm.openmmlab.compat import unwrapped


@HOOKS.register_module()
class PreciseStatsHook(Hook):
    """Measures the running statistics over N training images before they are evaluated and saved.

    See `wsbcn_mm.recalibration`. All ranks take part, each with its share of the images, and go on
    training from the result. With an EMAHook it is the averaged model that is measured, the one
    that is evaluated and saved. Place it in ``custom_hooks``; intervals as those of validation.

    Args:
        num_images: Over all ranks.
        interval: Epochs or iterations between measurements; always at the last one.
        by_epoch: What the interval counts.
        passes: The most passes over the images.
        batch_size: Images per forward call.
        dataset: Config of a dataset; None: that of training, with the pipeline of testing.

    Raises:
        ValueError: an EMAHook without ``update_buffers=True``, which keeps one set of statistics
            for two sets of weights.
    """

    priority = 'BELOW_NORMAL'  # after the EMA of the step, before checkpoints

    def __init__(
        self,
        num_images: int = 200,
        interval: int = 1,
        by_epoch: bool = True,
        passes: int = 2,
        batch_size: int = 1,
        dataset: dict | None = None,
    ) -> None:
        self.num_images, self.interval, self.by_epoch = num_images, interval, by_epoch
        self.passes, self.batch_size, self.dataset = passes, batch_size, dataset
        self._batches: Any = None

    def before_train(self, runner) -> None:
        """Finds the model to measure, and the images."""
        from mmengine.hooks import EMAHook

        from wsbcn_mm.openmmlab.measure import recalibration

        self._model = unwrapped(runner.model)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                if not hook.ema_model.update_buffers:
                    raise ValueError(
                        'PreciseStatsHook with an EMAHook needs EMAHook(update_buffers=True): the '
                        'averaged weights have statistics of their own'
                    )
                self._model = hook.ema_model.module
        dataset = self.dataset or recalibration.training_images_as_tested(runner.cfg)
        self._batches = recalibration.loader(dataset, self.num_images, self.batch_size)

    def after_train_epoch(self, runner) -> None:
        """Measures where epochs are counted."""
        if self.by_epoch and (
            self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)
        ):
            self._measure(runner)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Measures where iterations are counted."""
        if not self.by_epoch and (
            self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner)
        ):
            self._measure(runner)

    def _measure(self, runner) -> None:
        from wsbcn_mm.openmmlab.measure import recalibration

        done = recalibration.recalibrate_model(self._model, self._batches, self.passes)
        drift = '' if done.drift is None else f', last change {done.drift:.3f}'
        print_log(
            f'statistics of {len(done.samples)} layers measured over {self.num_images} images'
            f'{drift}',
            runner.logger,
        )
