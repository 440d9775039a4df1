"""The data of a run are looked at before the first step instead of never; see `data.check`."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from wsbcn_mm.openmmlab.checkpoints import BY_LABEL, meta_of
from wsbcn_mm.openmmlab.compat import unwrapped
from wsbcn_mm.openmmlab.data.arriving import Arriving
from wsbcn_mm.openmmlab.data.check import (
    check_datasets,
    check_ends,
    check_evaluator,
    check_named,
    check_names_of_masks,
    check_order,
    check_parts,
    check_same,
    check_surplus,
    check_topk,
    classes_of,
    note_order,
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
    - a sampler that never ends, in a loop that waits for its end;
    - masks (COCO's) that are none, or not of their image;
    - masks that are pictures (RGB), have another size than their image, hold labels the config has
      no class for, or are 0 and 255 alone: 255 means "ignore" (and so does 0, with
      ``reduce_zero_label``); for training, masks of "ignore" alone;
    - training images that have all lost their objects in the pipeline, and boxes that are none
      where the loss is not finite (`Arriving`).
    """

    _named: tuple[str, ...] = ()  # as the checkpoint's metainfo names the classes
    _learned: tuple[str, ...] = ()  # in the order of its labels
    _numbered: tuple[str, ...] = ()  # the same of what is trained on
    _has_weights = False
    _arriving: Arriving | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps the names of the classes that the weights were trained on."""
        self._has_weights = True
        meta = meta_of(checkpoint)
        self._named = tuple((meta.get('dataset_meta') or {}).get('classes') or ())
        self._learned = tuple(meta.get(BY_LABEL) or ())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Writes the classes in the order of their labels: metainfo may have another."""
        if self._numbered:
            checkpoint.setdefault('meta', {})[BY_LABEL] = list(self._numbered)

    def before_train(self, runner: Runner) -> None:
        """Looks at the data of training and of validation."""
        check_ends(runner.train_loop, 'train')
        check_ends(runner.val_loop, 'val')
        trained = self._check(runner, runner.train_loop, learned=True)
        validated = self._check(runner, runner.val_loop)
        if len(trained) == len(validated) == 1:
            check_same(trained[0], validated[0])
        elif trained:
            check_parts(trained[0], [*trained[1:], *validated])
        if len({classes_of(dataset) for dataset in trained}) == 1:
            self._numbered = classes_of(trained[0])
        if not self._has_weights:
            check_surplus(trained, unwrapped(runner.model))
        self._arriving = Arriving(trained)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Looks at what arrives."""
        if self._arriving is not None:
            self._arriving.before(data_batch)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Looks at the loss where a box is none."""
        if self._arriving is not None:
            self._arriving.after(outputs)

    def after_train(self, runner: Runner) -> None:
        """Tells a training that has learned nothing from one that has."""
        if self._arriving is not None:
            self._arriving.end()

    def before_test(self, runner: Runner) -> None:
        """Looks at the data of testing."""
        check_ends(runner.test_loop, 'test')
        for dataset in self._check(runner, runner.test_loop):
            found, what = classes_of(dataset), f'{type(dataset).__name__} ({place(dataset)})'
            if self._learned or not hasattr(dataset, 'cat_ids'):
                check_order(self._learned or self._named, 'the checkpoint', found, what)
            elif found != self._named and set(found) == set(self._named):
                note_order(self._named, found, what)

    @staticmethod
    def _check(runner: Runner, loop: Any, learned: bool = False) -> list[Any]:
        model = unwrapped(runner.model)
        loader = getattr(loop, 'dataloader', None)
        datasets = check_datasets(getattr(loader, 'dataset', None), model, learned)
        for metric in getattr(getattr(loop, 'evaluator', None), 'metrics', ()):
            check_topk(metric, model)
            check_names_of_masks(metric, datasets)
            if len(datasets) == 1:
                check_named(metric, datasets[0])
                check_evaluator(metric, datasets[0])
        return datasets
