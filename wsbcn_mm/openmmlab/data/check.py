"""What everybody gets wrong once in a data set, in a sentence; see `hooks.data.DataCheckHook`.

None of these raises in the hosts: labels shift, the metrics look fine or are all zero.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mmengine import fileio
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from wsbcn_mm.openmmlab.data import annotations, segments
from wsbcn_mm.openmmlab.data.reading import DataError, no_image_in, warn
from wsbcn_mm.openmmlab.data.samples import (
    IGNORED,
    alike,
    check_boxes,
    check_images,
    check_labels,
    check_left_behind,
    check_masks,
    check_names_of_xml,
    check_objects,
    check_segments,
)

# Samplers that go on for ever, and loops that wait for their end.
ENDLESS = ('InfiniteSampler', 'MultiSourceSampler')
WAITING = ('EpochBasedTrainLoop', 'ValLoop', 'TestLoop')
# What is written for the key of the names of classes; MMDetection 2 had capitals.
KEYS_OF_CLASSES = ('classes', 'class', 'class_names')


def _inner(dataset: Any) -> Iterator[Any]:
    """The data sets that read files, below the wrappers."""
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _inner(part)
    elif isinstance(getattr(dataset, 'dataset', None), Dataset):
        yield from _inner(dataset.dataset)
    elif getattr(dataset, 'metainfo', None) is not None:
        yield dataset


def check_datasets(dataset: Any, model: nn.Module, learned: bool = False) -> list[Any]:
    """`check_dataset` for all that read files below the wrappers; returns these."""
    datasets = list(_inner(dataset))
    for inner in datasets:
        check_dataset(inner, model, learned)
    return datasets


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
    _check_key_of_classes(dataset)
    classes = dataset.metainfo.get('classes') or ()
    if isinstance(classes, str):
        raise DataError(f'{kind}: classes is one text\n  add a comma: classes=({classes!r},)')
    classes = list(classes)  # somebody gives a dict of names and numbers
    if classes:
        _check_classes(dataset, classes, model)
    if not hasattr(dataset, 'get_data_info'):  # none of mmengine's
        return
    check_left_behind(dataset)
    numbers = {module.num_classes for _, module in _heads(model)}
    if len(numbers) == 1:
        check_labels(dataset, numbers.pop(), learned)
    check_segments(dataset)
    if learned:
        check_names_of_xml(dataset, list(classes))
    check_objects(dataset, learned)
    if learned:
        check_boxes(dataset)
    check_images(dataset)
    if classes:
        check_masks(dataset, classes, {IGNORED, *_ignored(model)}, learned)


def _check_key_of_classes(dataset: Any) -> None:
    """Names under another key than ``classes``: the hosts go on with the data set's own."""
    meta, own = dataset.metainfo, getattr(type(dataset), 'METAINFO', {}).get('classes')
    for key, names in meta.items():
        if key == 'classes' or key.lower() not in KEYS_OF_CLASSES or meta.get('classes') != own:
            continue
        has = f'its classes are {_shown(own)}' if own else 'it has no names of classes'
        text = (
            f'{type(dataset).__name__}: metainfo has {key}, which nobody reads, and {has}\n'
            f'  write it as classes: metainfo=dict(classes={names!r})'
        )
        if own and names != own:
            raise DataError(text)
        if not own:  # which trains, and cannot be evaluated
            warn(text)


def _check_classes(dataset: Any, classes: Any, model: nn.Module) -> None:
    """The data have each class once, and every head has them all."""
    kind = type(dataset).__name__
    twice = [name for i, name in enumerate(classes) if name in classes[:i]]
    known = getattr(type(dataset), 'METAINFO', {}).get('classes', ())
    if twice and list(classes) != list(known):  # ImageNet has two cranes, a bird and a machine
        raise DataError(f'{kind}: classes names {twice[0]!r} twice\n  name each class once')
    _check_names(dataset, list(classes))
    numbered = classes_of(dataset)
    if numbered and numbered != tuple(classes) and set(numbered) == set(classes):
        warn(
            f'{kind}: labels are numbered as {dataset.ann_file} lists its categories '
            f'({_shown(numbered)}), not as metainfo.classes does ({_shown(classes)}): pictures of '
            'the hosts show other names\n  write metainfo.classes in the order of the file'
        )
    for name, module in _heads(model):
        wanted = _classes_for(name, dataset)
        found = getattr(dataset, 'cat_ids', None)
        if found:  # the last ones that the file lacks need no logit: MOT's other kinds of objects
            wanted = min(wanted, len(found))
        one_logit = getattr(module, 'out_channels', None) == 1 and wanted <= 2
        if module.num_classes < wanted and not one_logit:
            raise DataError(
                f'{name} has num_classes={module.num_classes}, {kind} has {wanted} classes '
                f'({_shown(classes)})\n  set num_classes={wanted} there'
            )


def _classes_for(head: str, dataset: Any) -> int:
    """How many classes of the data are a head's: boxes are of things alone, where there is
    stuff as well.
    """
    classes = dataset.metainfo.get('classes') or ()
    things = dataset.metainfo.get('thing_classes') or classes
    return len(things if 'bbox' in head or 'mask' in head else classes)


def _shown(classes: Any) -> str:
    return ', '.join(map(str, list(classes)[:4])) + (', ...' if len(classes) > 4 else '')


def check_surplus(datasets: list[Any], model: nn.Module) -> None:
    """Warns of a head that was left as it was made for other data."""
    if not datasets or not all(dataset.metainfo.get('classes') for dataset in datasets):
        return
    for name, module in _heads(model):
        wanted = max(_classes_for(name, dataset) for dataset in datasets)
        if module.num_classes > max(wanted, 2):  # one class and its background may be two
            classes = datasets[0].metainfo['classes']
            warn(
                f'{name} has num_classes={module.num_classes}, and {type(datasets[0]).__name__} '
                f'{wanted} ({_shown(classes)}): the others have nothing to learn\n  set '
                f'num_classes={wanted}, unless weights that know them are loaded later'
            )
            return


def _check_names(dataset: Any, classes: list[str]) -> None:
    """The hosts number the categories that they find by name: one that is not found shifts others.

    The last ones may be missing, unless they are misspelt: the numbers of the others are the same.
    """
    found = getattr(dataset, 'cat_ids', None)
    if found is None or len(found) == len(set(found)) == len(classes):
        return
    arguments = getattr(dataset, 'backend_args', None)
    content = json.loads(fileio.get_text(dataset.ann_file, backend_args=arguments))
    there = [category['name'] for category in content['categories']]
    numbers = [category['id'] for category in content['categories']]
    for what, values in (('names', there), ('ids', numbers)):
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice and (what == 'ids' or twice[0] in classes):
            raise DataError(
                f'{type(dataset).__name__}: {dataset.ann_file} has two categories of the '
                f'{what[:-1]} {twice[0]!r}, and the labels of the classes behind it shift\n'
                '  make one of them, and give its id to the annotations of both'
            )
    if len(found) >= len(classes):
        return
    missing = [name for name in classes if name not in there]
    others = [name for name in there if name not in classes]
    meant = alike(missing, others)
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
        kind = type(module).__name__
        other = 'rpn' in name or 'RPN' in kind or 'backbone' in name or 'semantic' in name
        number = getattr(module, 'num_classes', None)
        if other or 'head' not in name or getattr(module, 'class_agnostic', False):
            continue
        if isinstance(number, int) and not (name.startswith('aux') and _makes_targets(module)):
            yield name, module


def _makes_targets(head: nn.Module) -> bool:
    """A loss of its own, beside the classes: that of STDC for the edges has two."""
    loss = getattr(head, 'loss_by_feat', None)
    return loss is not None and not loss.__qualname__.startswith('BaseDecodeHead.')


def _ignored(model: nn.Module) -> Iterator[int]:
    """The labels that the model's losses leave out."""
    for module in model.modules():
        number = getattr(module, 'ignore_index', None)
        if isinstance(number, int):
            yield number


# ---- two data sets, a data set and what else is there --------------------------------------------


def place(dataset: Any) -> str:
    """Where a data set lies, in short."""
    prefixes = getattr(dataset, 'data_prefix', None) or {}
    return str(getattr(dataset, 'ann_file', '') or next(iter(prefixes.values()), ''))


def classes_of(dataset: Any) -> tuple[str, ...]:
    """The names of the classes in the order of their labels."""
    classes = tuple(dataset.metainfo.get('classes') or ())
    if hasattr(dataset, 'cat_ids'):  # in the order of the file, unless a class sorts (Objects365)
        reads = (k.__name__ for k in type(dataset).__mro__ if 'load_data_list' in vars(k))
        read = annotations.files_read.get(str(dataset.ann_file))
        names = read.names if read else []
        by_file = next(reads, None) == 'CocoDataset'
        return tuple(name for name in names if name in classes) if by_file else ()
    return classes


def check_same(trained: Any, validated: Any) -> None:
    """The labels of training and of validation mean the same."""
    names = [f'{type(d).__name__} ({place(d)})' for d in (trained, validated)]
    check_order(classes_of(trained), names[0], classes_of(validated), names[1])
    reduced = [getattr(d, 'reduce_zero_label', None) for d in (trained, validated)]
    if None not in reduced and reduced[0] != reduced[1]:
        raise DataError(
            f'reduce_zero_label is {reduced[0]} for {names[0]} and {reduced[1]} for {names[1]}: '
            'every label means another class there\n  set the same for training and validation'
        )


def check_parts(first: Any, others: list[Any]) -> None:
    """COCO files that are trained on together list their categories alike: labels go by them."""
    for other in others:
        steps = getattr(getattr(other, 'pipeline', None), 'transforms', [])
        has_labels = any('LoadAnnotations' in type(step).__name__ for step in steps)
        if has_labels and hasattr(first, 'cat_ids') and hasattr(other, 'cat_ids'):
            names = [f'{type(d).__name__} ({place(d)})' for d in (first, other)]
            check_order(classes_of(first), names[0], classes_of(other), names[1])


def check_order(one: tuple[str, ...], of_one: str, other: tuple[str, ...], of_other: str) -> None:
    """Classes of one name have one number; other names are other words for what may be the same."""
    numbers = {name: i for i, name in enumerate(other)}
    for i, name in enumerate(one):
        if numbers.get(name, i) != i and one.count(name) == other.count(name) == 1:
            raise DataError(
                f'{name!r} is class {i} of {of_one}, and class {numbers[name]} of {of_other}\n'
                f'  {", ".join(one[:6])} there, {", ".join(other[:6])} here: give both the same '
                'classes in the same order (a folder of a class may be empty, but must be there)'
            )


def note_order(named: tuple[str, ...], numbered: tuple[str, ...], what: str) -> None:
    """The names in a checkpoint are those of a config, and the labels are numbered by a file."""
    warn(
        f'{what} lists its categories as {_shown(numbered)}, and the checkpoint names its '
        f'classes as {_shown(named)}: labels go by the files, and the one that was trained on must '
        'have listed them as this one does'
    )


def check_ends(loop: Any, name: str) -> None:
    """A loop over epochs, or over all images, needs a sampler that comes to an end.

    Raises:
        DataError: it has one that never does.
    """
    loader = getattr(loop, 'dataloader', None)
    outer = getattr(loader, 'batch_sampler', None)
    sampler = getattr(outer, 'sampler', None) or getattr(loader, 'sampler', None)
    endless = next((k.__name__ for k in type(sampler).__mro__ if k.__name__ in ENDLESS), None)
    if endless is not None and type(loop).__name__ in WAITING:
        mend = 'a DefaultSampler ends'
        if name == 'train':
            mend += ", or count steps: train_cfg=dict(type='IterBasedTrainLoop', max_iters=...)"
        raise DataError(
            f'{name}_dataloader.sampler, {endless}, never comes to an end, and '
            f'{type(loop).__name__} waits for it\n  {mend}'
        )


def check_evaluator(metric: Any, dataset: Any) -> None:
    """COCO's metric reads a file of its own: that must be of these images."""
    read_by_it = getattr(metric, '_coco_api', None)
    known = getattr(read_by_it, 'imgs', None)
    if not known or not hasattr(dataset, 'cat_ids'):
        return
    if 0 in (getattr(read_by_it, 'anns', None) or ()):
        warn(
            f'{dataset.ann_file} has an annotation of id 0: pycocotools takes 0 for "not '
            'found", and counts that object as missed\n  number the annotations from 1'
        )
    if getattr(read_by_it, 'anns', None) == {} and not getattr(metric, 'format_only', False):
        lacks = f'{dataset.ann_file} has no annotations: what {type(metric).__name__} says is '
        mend = 'test_evaluator.format_only=True with outfile_prefix=... writes the predictions'
        warn(f'{lacks}-1\n  {mend}')
    same: list[bool | None] = []
    for index in range(0, len(dataset), max(1, len(dataset) // 8)):
        info = dataset.get_data_info(index)
        number, path = info.get('img_id'), info.get('img_path')
        if number is None or not isinstance(path, str):
            return
        other = known.get(number, {}).get('file_name')
        if other is None or _stem(other) != _stem(path):
            what = f'calls {other}' if other else 'does not list'
            raise DataError(
                f'{type(metric).__name__} reads the annotations of other images: its ann_file '
                f'{what} image {number}, which is {path} in {dataset.ann_file}\n  name the same '
                'file as ann_file of the evaluator and of the data set'
            )
        same.append(_same_boxes(info, getattr(read_by_it, 'imgToAnns', {}).get(number)))
    if False in same and True not in same:
        text = f'{type(metric).__name__} has other boxes than {dataset.ann_file} for images of '
        mend = 'the same names: name the same file as ann_file of the evaluator and of the data set'
        warn(f'{text}{mend}')
    read = annotations.files_read.get(str(dataset.ann_file))
    if read is None or 'segm' not in getattr(metric, 'metrics', ()):
        return
    for found in (read.segments.wrong, read.segments.ends):
        if wrong := segments.said(found, dataset.cat_ids):
            raise DataError(
                f'{type(metric).__name__} does not evaluate segm with {dataset.ann_file}: {wrong}\n'
                f'  write {segments.EXPECTED}'
            )


def check_topk(metric: Any, model: nn.Module) -> None:
    """MMPretrain's accuracy among the first k needs k classes, and says so after an epoch.

    Raises:
        DataError: there are fewer.
    """
    topk, numbers = getattr(metric, 'topk', None), {m.num_classes for _, m in _heads(model)}
    if type(metric).__module__.partition('.')[0] != 'mmpretrain' or len(numbers) != 1 or not topk:
        return
    if max(topk) > (number := numbers.pop()):
        raise DataError(
            f'{type(metric).__name__} has topk={tuple(topk)}, and the model {number} classes\n  '
            'set val_evaluator.topk=(1,), and the same of test_evaluator'
        )


def check_named(metric: Any, dataset: Any) -> None:
    """MMSegmentation's metric counts by class, and asks for their names after the first images.

    Raises:
        DataError: nobody has said them.
    """
    if type(metric).__name__ == 'IoUMetric' and not dataset.metainfo.get('classes'):
        raise DataError(
            f'{type(dataset).__name__} ({place(dataset)}) has no names of classes, which IoUMetric '
            "needs\n  set metainfo=dict(classes=('background', ...)) of the data sets"
        )


def check_names_of_masks(metric: Any, datasets: list[Any]) -> None:
    """MMSegmentation's metric writes masks by the names of images, whatever their folders are."""
    if not getattr(metric, 'output_dir', None):
        return
    listed = [d for d in datasets if hasattr(d, 'get_data_info')]
    infos = (dataset.get_data_info(i) for dataset in listed for i in range(len(dataset)))
    names = Counter(_stem(str(info.get('img_path'))) for info in infos)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        warn(
            f'{sum(names.values()) - len(names)} of {sum(names.values())} masks are written '
            f'over others, of images of the same name in other folders ({twice[0]}, ...)\n  test '
            'one folder at a time, or rename the images; what is measured is of all'
        )


def _same_boxes(info: dict[str, Any], entries: list[dict] | None) -> bool | None:
    """Whether two files know an object of an image alike; None where one of them knows none."""
    items = [item.get('bbox') for item in info.get('instances') or []]
    own = {tuple(box) for box in items if annotations.is_box(box)}
    boxes = [entry['bbox'] for entry in entries or [] if annotations.is_box(entry.get('bbox'))]
    other = {(x, y, x + width, y + height) for x, y, width, height in boxes}
    return bool(own & other) if own and other else None


def _stem(path: str) -> str:
    return path.replace('\\', '/').rpartition('/')[2].rpartition('.')[0] or path
