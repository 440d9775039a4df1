"""What a run needs, looked at before anything expensive starts; what was wrong, after it failed."""

import json
import math
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device

from wsbcn_mm.openmmlab.checkpoints import check_checkpoint, is_address
from wsbcn_mm.openmmlab.config import (
    HOSTS,
    PRETRAINED,
    dataset_class,
    datasets_of,
    prefixes_of,
    type_name,
)
from wsbcn_mm.openmmlab.registry import KEPT

# By what the name of the dataset's class holds.
LAYOUTS = {
    'Coco': """\
  expected layout (`ln -s /path/to/coco data/coco` puts it there):
    data/coco/annotations/instances_{train,val}2017.json
    data/coco/{train,val}2017/*.jpg
""",
    'VOC': """\
  expected layout (`ln -s /path/to/VOCdevkit data/VOCdevkit` puts it there):
    data/VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt
    data/VOCdevkit/VOC2012/{JPEGImages/*.jpg,SegmentationClass/*.png}
  configs of VOC aug also need ImageSets/Segmentation/aug.txt and SegmentationClassAug/*.png, which
  mmsegmentation's tools/dataset_converters/voc_aug.py makes from the SBD download
""",
}


def check_data(cfg: Config, *loaders: str) -> None:
    """Raises unless the files that the datasets of these loaders name exist.

    What lies in a storage backend is left to the host, and so is a dataset class of somebody else,
    which may find or make its files in a way of its own (ours draws them).

    Args:
        cfg: The config.
        *loaders: Names such as ``'train_dataloader'``; one that the config lacks is passed over.

    Raises:
        FileNotFoundError: the first annotation file or image folder that is missing, with the
            layout that is expected.
    """
    for loader, dataset in datasets_of(cfg, *loaders):
        kind = type_name(dataset)
        if not _reads_as_the_host(cfg, dataset):
            continue
        for path in _files_of(dataset):
            if not is_address(path) and not os.path.exists(path):
                layout = next((text for name, text in LAYOUTS.items() if name in kind), '')
                raise FileNotFoundError(
                    f'{loader}: {kind} needs {path}, which does not exist\n{layout}'
                    f'  or name another place: --cfg-options {loader}.dataset.data_root=...'
                )


def check_test(cfg: Config) -> None:
    """Raises unless a config says what to test on.

    Raises:
        ValueError: it lacks ``test_dataloader``, ``test_evaluator`` or ``test_cfg``.
    """
    keys = ('test_dataloader', 'test_evaluator', 'test_cfg')
    missing = [key for key in keys if cfg.get(key) is None]
    if missing:
        raise ValueError(
            f'{cfg.filename or "the config"} has no {", ".join(missing)}: nothing to test on\n'
            '  the validation data may serve: test_dataloader = val_dataloader, '
            "test_evaluator = val_evaluator, test_cfg = dict(type='TestLoop')"
        )


def _reads_as_the_host(cfg: Config, dataset: dict) -> bool:
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    if backend not in ('local', 'disk'):
        return False
    kind = dataset_class(cfg, dataset)
    return kind is None or kind.__module__.partition('.')[0] in ('mmengine', *HOSTS)


def _files_of(dataset: dict) -> Iterator[str]:
    """What a dataset of the hosts reads: its list of images and the folders."""
    root = dataset.get('data_root') or ''
    if dataset.get('ann_file'):
        yield os.path.join(root, dataset['ann_file'])
    steps = dataset.get('pipeline') or []
    with_masks = not steps or any('Annotations' in type_name(step) for step in steps)
    for key, folder in prefixes_of(dataset).items():
        # Testing without masks works: nobody reads that folder then.
        if folder and isinstance(folder, str) and (with_masks or 'seg_map' not in key):
            yield os.path.join(root, folder).rstrip('/')


def check_pretrained(cfg: Config) -> None:
    """Raises unless every local file that a part of the model starts from is there and readable.

    Args:
        cfg: The config.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get one, or to do without.
        ValueError: a file cannot be read.
    """
    for place, part, init in _pretrained(cfg.get('model') or {}, 'model'):
        path = init.get('checkpoint')
        if not isinstance(path, str) or is_address(path):
            continue  # what is no path raises where it is used
        if not Path(path).expanduser().is_file():
            raise FileNotFoundError(
                f'{place} starts from {path}, which does not exist\n'
                '  convert a published checkpoint: tools/model_converters/convert_checkpoint.py; '
                'the comments of configs/_base_/backbones hold the commands\n'
                f'  or name another file: --cfg-options {place}.init_cfg.checkpoint=...\n'
                f'  or load none, where all weights come from elsewhere: {place}.init_cfg=None\n'
                '  or train from scratch: ' + _from_scratch(place, part)
            )
        check_checkpoint(path)


def _from_scratch(place: str, part: dict) -> str:
    if type_name(part) == KEPT:  # as the weights of the file are, or not at all
        return 'tools/model_converters/convert_config.py --backbone convert makes the config'
    nothing_frozen = f'{place}.init_cfg=None {place}.frozen_stages=-1'
    return f'{nothing_frozen}, and a longer schedule'


def _pretrained(part: object, place: str) -> Iterator[tuple[str, dict, dict]]:
    """Where a model's config says ``init_cfg=dict(type='Pretrained')``, that part, that dict."""
    if isinstance(part, dict):
        init = part.get('init_cfg')
        for cfg in init if isinstance(init, list) else [init]:
            if isinstance(cfg, dict) and type_name(cfg) in PRETRAINED:
                yield place, part, cfg
        for key, value in part.items():
            if key != 'init_cfg':
                yield from _pretrained(value, f'{place}.{key}')
    elif isinstance(part, (list, tuple)):
        for i, value in enumerate(part):
            yield from _pretrained(value, f'{place}.{i}')


def check_amp(cfg: Config) -> None:
    """Raises where mixed precision is asked for on a machine that mmengine has it not on.

    Raises:
        ValueError: no GPU (or NPU, MLU, MUSA).
    """
    if type_name(cfg.get('optim_wrapper')) == 'AmpOptimWrapper' and get_device() in ('cpu', 'mps'):
        raise ValueError(
            f'automatic mixed precision needs a GPU, and this machine has {get_device()} alone\n'
            "  train without --amp, with optim_wrapper.type='OptimWrapper'"
        )


# What mmdet and pycocotools read of every annotation, and what belongs there.
# By the list of a COCO file that holds them: what every entry has, and what to write there.
ENTRIES = {
    'images': {
        'id': 'a number of its own',
        'file_name': 'its file, below data_prefix',
        'height': 'in pixels',
        'width': 'in pixels',
    },
    'annotations': {
        'id': 'a number of its own',
        'image_id': 'the id of its image',
        'category_id': 'the id of its category',
        'bbox': '[x, y, width, height]',
        'area': 'that of the mask, or width * height of the box',
        'iscrowd': '0',
    },
    'categories': {'id': 'a number of its own', 'name': 'that of the class'},
}


def damaged_annotations(cfg: Config, *loaders: str) -> list[str]:
    """A line for each JSON annotation file of these loaders that is damaged or lacks something.

    Reads them all: for the time after something has failed.
    """
    lines = []
    for loader, dataset in datasets_of(cfg, *loaders):
        path = Path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
        if path.suffix == '.json' and path.is_file():
            try:
                content = json.loads(path.read_text('utf-8'))  # as pycocotools does
            except ValueError as error:
                lines.append(f'{loader}: {path} is damaged: {error}')
                continue
            lines += [f'{loader}: {path} {reason}' for reason in _wrong_with(content)]
    return list(dict.fromkeys(lines))


# Who reads annotation files, and what is in them, by the beginning of the module's name. Transforms
# of images are no part of them.
READERS = (
    'json.decoder',
    'mmdet.datasets.api_wrappers',
    'mmdet.datasets.coco',
    'mmdet.evaluation',
    'pycocotools',
)


def comes_from_annotations(error: BaseException) -> bool:
    """Whether an error, or one that it came from, was raised below code that reads annotations."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        frames = traceback.walk_tb(chain.__traceback__)
        if any(str(f.f_globals.get('__name__')).startswith(READERS) for f, _ in frames):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _wrong_with(content: object) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f'is damaged: a {type(content).__name__} instead of an object'
        return
    for name, keys in ENTRIES.items():
        entries = content.get(name)
        if not isinstance(entries, list):
            if entries is not None or name != 'annotations':  # images of a test may have none
                yield f'has no list {name!r}'
            continue
        for key, value in keys.items():
            yield from _lacking(name, entries, key, value)
    boxes = [(i, a['bbox']) for i, a in enumerate(content.get('annotations') or []) if 'bbox' in a]
    wrong = [(i, box) for i, box in boxes if not _is_box(box)]
    if wrong:
        yield (
            f'has {len(wrong)} annotations whose bbox is not [x, y, width, height] in numbers\n'
            f'  the first, number {wrong[0][0]}: {wrong[0][1]!r}'
        )


def _lacking(name: str, entries: list[Any], key: str, value: str) -> Iterator[str]:
    lacking = [i for i, entry in enumerate(entries) if key not in entry]
    if lacking:
        number = entries[lacking[0]].get('id')
        first = f'number {lacking[0]}' if number is None else f'id {number}'
        yield f'has {len(lacking)} {name} without {key!r} (first {first})\n  add it: {value}'


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(x, (int, float)) and math.isfinite(x) for x in box)
    )
