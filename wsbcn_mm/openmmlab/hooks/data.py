"""The data of a run are looked at before the first step instead of never; see `data_check`."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from wsbcn_mm.openmmlab.compat import unwrapped
from wsbcn_mm.openmmlab.data_check import (
    check_datasets,
    check_evaluator,
    check_order,
    check_same,
    check_surplus,
    classes_of,
    place,
)


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Compares the data sets of a run with its model before anything is trained or evaluated.

    Raises `DataError` where a setting cannot be meant, and warns where it may be; everything else
    runs as before:

    - no image at all (a wrong ``img_suffix`` or folder), no object that counts;
    - classes of the config that the annotation file does not have, or has twice: the labels of
      those behind them shift;
    - a head with fewer classes than the data, or with more, where no weights are loaded that may
      know them; labels of classes that it does not have;
    - classes that training, validation and the checkpoint number otherwise;
    - images of another size than their annotations say; boxes beyond the image;
    - an evaluator that reads the annotations of other images;
    - masks that are pictures (RGB), have another size than their image, hold labels the config has
      no class for, or are 0 and 255 alone: 255 means "ignore" (and so does 0, with
      ``reduce_zero_label``); for training, masks of "ignore" alone.
    """

    _learned: tuple[str, ...] = ()
    _has_weights = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps the names of the classes that the weights were trained on."""
        self._has_weights = True
        meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
        self._learned = tuple(meta.get('classes') or ())

    def before_train(self, runner: Runner) -> None:
        """Looks at the data of training and of validation."""
        trained = self._check(runner, runner.train_loop, learned=True)
        validated = self._check(runner, runner.val_loop)
        if len(trained) == len(validated) == 1:
            check_same(trained[0], validated[0])
        if not self._has_weights:
            check_surplus(trained, unwrapped(runner.model))

    def before_test(self, runner: Runner) -> None:
        """Looks at the data of testing."""
        for dataset in self._check(runner, runner.test_loop):
            if not hasattr(dataset, 'cat_ids'):  # numbered by the file, whatever the names' order
                what = f'{type(dataset).__name__} ({place(dataset)})'
                check_order(self._learned, 'the checkpoint', classes_of(dataset), what)

    @staticmethod
    def _check(runner: Runner, loop: Any, learned: bool = False) -> list[Any]:
        model = unwrapped(runner.model)
        loader = getattr(loop, 'dataloader', None)
        datasets = check_datasets(getattr(loader, 'dataset', None), model, learned)
        if len(datasets) == 1:
            for metric in getattr(getattr(loop, 'evaluator', None), 'metrics', ()):
                check_evaluator(metric, datasets[0])
        return datasets
