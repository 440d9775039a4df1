"""What everybody gets wrong once in a data set, said before the first step instead of never.

None of these raises in the hosts: labels shift, the metrics look fine or are all zero.
"""

import difflib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from wsbcn_mm.openmmlab.compat import DataError, no_image_in, unwrapped

IGNORED = 255  # what a mask says where it says nothing, in mmsegmentation
FEW, MANY = 8, 200  # masks that are looked at
ENOUGH = 20  # so many images, and one class alone: that is not how they were drawn


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Compares the data sets of a run with its model before anything is trained or evaluated.

    Raises `DataError` where a setting cannot be meant; everything else runs as before:

    - no image at all (a wrong ``img_suffix`` or folder);
    - classes of the config that the annotation file does not have: the labels of those behind them
      shift;
    - a head with fewer classes than the data;
    - masks that are pictures (RGB), that hold labels the config has no class for, or that are 0
      and 255 alone: 255 means "ignore" (and so does 0, with ``reduce_zero_label``); for training,
      masks of "ignore" alone.
    """

    def before_train(self, runner: Runner) -> None:
        """Looks at the data of training and of validation."""
        self._check(runner, runner.train_loop, learned=True)
        self._check(runner, runner.val_loop)

    def before_test(self, runner: Runner) -> None:
        """Looks at the data of testing."""
        self._check(runner, runner.test_loop)

    @staticmethod
    def _check(runner: Runner, loop: Any, learned: bool = False) -> None:
        model = unwrapped(runner.model)
        loader = getattr(loop, 'dataloader', None)
        for dataset in _inner(getattr(loader, 'dataset', None)):
            check_dataset(dataset, model, learned)


def _inner(dataset: Any) -> Iterator[Any]:
    """The data sets that read files, below the wrappers."""
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _inner(part)
    elif isinstance(getattr(dataset, 'dataset', None), Dataset):
        yield from _inner(dataset.dataset)
    elif getattr(dataset, 'metainfo', None) is not None:
        yield dataset


def check_dataset(dataset: Any, model: nn.Module, learned: bool = False) -> None:
    """See `DataCheckHook`.

    Args:
        dataset: Of mmengine's BaseDataset, or anything else with ``metainfo``.
        model: The model that shall take it.
        learned: It is trained on: there must be something to learn.

    Raises:
        DataError: one sentence with the place and the mend.
    """
    kind = type(dataset).__name__
    if len(dataset) == 0:
        raise DataError(no_image_in(dataset))
    classes = dataset.metainfo.get('classes')
    if not classes:
        return
    if isinstance(classes, str):
        raise DataError(f'{kind}: classes is one text\n  add a comma: classes=({classes!r},)')
    twice = [name for i, name in enumerate(classes) if name in classes[:i]]
    known = getattr(type(dataset), 'METAINFO', {}).get('classes', ())
    if twice and list(classes) != list(known):  # ImageNet has two cranes, a bird and a machine
        raise DataError(f'{kind}: classes names {twice[0]!r} twice\n  name each class once')
    _check_names(dataset, list(classes))
    # Boxes are of things alone, where data have stuff as well.
    boxes = len(dataset.metainfo.get('thing_classes') or classes)
    for name, module in _heads(model):
        wanted = boxes if 'bbox' in name or 'mask' in name else len(classes)
        one_logit = getattr(module, 'out_channels', None) == 1 and wanted <= 2
        if module.num_classes < wanted and not one_logit:
            shown = ', '.join(map(str, classes[:4])) + (', ...' if len(classes) > 4 else '')
            raise DataError(
                f'{name} has num_classes={module.num_classes}, {kind} has {wanted} classes '
                f'({shown})\n  set num_classes={wanted} there'
            )
    _check_masks(dataset, len(classes), {IGNORED, *_ignored(model)}, learned)


def _check_names(dataset: Any, classes: list[str]) -> None:
    """The hosts number the categories that they find by name: one that is not found shifts others.

    The last ones may be missing, unless they are misspelt: the numbers of the others are the same.
    """
    found = getattr(dataset, 'cat_ids', None)
    if found is None or len(found) >= len(classes):
        return
    arguments = getattr(dataset, 'backend_args', None)
    content = json.loads(fileio.get_text(dataset.ann_file, backend_args=arguments))
    there = [category['name'] for category in content['categories']]
    missing = [name for name in classes if name not in there]
    others = [name for name in there if name not in classes]
    near = [difflib.get_close_matches(name, others, n=1) for name in missing[:4]]
    meant = ', '.join(f'{a!r} for {b[0]!r}' for a, b in zip(missing, near) if b)
    shift = missing != classes[len(found) :] or not found
    if not shift and not meant:
        return
    what = 'the labels of the classes behind it shift' if shift else 'its objects are left out'
    raise DataError(
        f'{type(dataset).__name__}: {dataset.ann_file} has no category {", ".join(missing[:4])}'
        f'{", ..." if len(missing) > 4 else ""}, and {what}\n'
        f'  its categories: {", ".join(there[:8])}{", ..." if len(there) > 8 else ""}'
        + (f'\n  is it {meant}?' if meant else '')
        + '\n  write the names of metainfo.classes as the file does'
    )


def _heads(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The heads that tell the classes of the data apart."""
    if hasattr(model, 'language_model'):
        return  # its heads tell words of a text apart
    for name, module in model.named_modules():
        # A region proposal tells objects from background; a backbone's classes are ImageNet's.
        other = 'rpn' in name or 'backbone' in name or 'semantic' in name
        number = getattr(module, 'num_classes', None)
        if other or 'head' not in name or getattr(module, 'class_agnostic', False):
            continue
        if isinstance(number, int):
            yield name, module


def _ignored(model: nn.Module) -> Iterator[int]:
    """The labels that the model's losses leave out."""
    for module in model.modules():
        number = getattr(module, 'ignore_index', None)
        if isinstance(number, int):
            yield number


def _check_masks(dataset: Any, num_classes: int, ignored: set[int], learned: bool) -> None:
    read = _mask_reader(dataset)
    if read is None:
        return
    seen: set[int] = set()
    order = np.random.default_rng(0).permutation(len(dataset))[:MANY].tolist()
    for i in itertools.islice(order, FEW):
        seen |= _labels(*read(i), num_classes, ignored)
    reduced, more = dataset.reduce_zero_label, iter(order[FEW:])
    while learned and seen <= ignored and (i := next(more, None)) is not None:
        seen |= _labels(*read(i), num_classes, ignored)
    if learned and seen <= ignored:
        raise DataError(
            f'the masks of {type(dataset).__name__} ({read(order[0])[0]}, ...) hold '
            f'{", ".join(map(str, sorted(seen)))} alone, which means "ignore": there is nothing to '
            'learn\n  write them as class numbers: 0 for the first class, 1 for the second'
        )
    if reduced and len(order) < ENOUGH:  # 0 and 255 are 1 and 0 in the file: one class of several
        return
    while seen == {0, IGNORED} and (i := next(more, None)) is not None:
        seen |= _labels(*read(i), num_classes, ignored)
    if seen == {0, IGNORED} and num_classes > 1 and reduced:
        raise DataError(
            f'with reduce_zero_label=True the masks of {type(dataset).__name__} '
            f'({read(order[0])[0]}, ...) are class 0 and "ignore" alone: the label 0 of the files '
            'is no class then\n  set reduce_zero_label=False where it is one (the background)'
        )
    if seen == {0, IGNORED} and num_classes > 1:
        raise DataError(
            f'the masks of {type(dataset).__name__} ({read(order[0])[0]}, ...) are 0 and 255 '
            'alone, and 255 means "ignore": nothing of the object would count\n'
            '  write them as class numbers: 0 for the background, 1 for the object'
        )


def _labels(path: str, mask: np.ndarray, num_classes: int, ignored: set[int]) -> set[int]:
    if mask.ndim != 2:
        raise DataError(
            f'{path} is a picture of shape {mask.shape}, not a mask with one class number per '
            'pixel\n  convert colours to class numbers (a PNG with a palette holds them, too)'
        )
    labels = set(np.unique(mask).tolist())
    wrong = sorted(label for label in labels - ignored if label >= num_classes)
    if wrong:
        raise DataError(
            f'{path} holds the label {wrong[0]}, and the config has {num_classes} classes '
            f'(labels 0 to {num_classes - 1}, {IGNORED} to ignore)\n  name all classes in '
            'metainfo, or write the masks anew'
        )
    return labels


def _mask_reader(dataset: Any) -> Callable[[int], tuple[str, np.ndarray]] | None:
    """Reads a mask as the data set's pipeline does; None where it reads none."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    load = next((s for s in steps if type(s).__name__ == 'LoadAnnotations'), None)
    if load is None or not hasattr(dataset, 'seg_map_suffix') or not hasattr(dataset, 'label_map'):
        return None  # not a segmentation of mmsegmentation

    def read(index: int) -> tuple[str, np.ndarray]:
        info = dataset.get_data_info(index)
        path = info.get('seg_map_path')
        if not path or not os.path.exists(path):
            raise DataError(f'{type(dataset).__name__}: no mask {path} for {info.get("img_path")}')
        return path, load(info)['gt_seg_map']

    return read
