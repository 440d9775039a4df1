"""What a run needs, looked at before anything expensive starts."""

import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device

from wsbcn_mm.openmmlab.checkpoints import check_checkpoint, is_address
from wsbcn_mm.openmmlab.config import HOSTS, PRETRAINED, type_name
from wsbcn_mm.openmmlab.loaders import (
    dataset_class,
    dataset_of,
    datasets_of,
    makes_versions,
    prefixes_of,
    several_versions,
)
from wsbcn_mm.openmmlab.places import walk
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
        ValueError: a list in the place of a data set.
    """
    for loader in loaders:
        parts = dataset_of(cfg, loader)
        if isinstance(parts, (list, tuple)) and any(
            'type' in p for p in parts if hasattr(p, 'get')
        ):
            raise ValueError(
                f'{loader}.dataset is a list of data sets, which mmengine takes for the samples\n  '
                "write dict(type='ConcatDataset', datasets=[...])"
            )
    for loader, dataset in datasets_of(cfg, *loaders):
        kind = type_name(dataset)
        if not _reads_as_the_host(cfg, dataset):
            continue
        for path in _files_of(dataset):
            if not is_address(path) and not os.path.exists(path):
                where = '' if os.path.isabs(path) else f' in {os.getcwd()}'
                layout = next((text for name, text in LAYOUTS.items() if name in kind), '')
                raise FileNotFoundError(
                    f'{loader}: {kind} needs {path}, which does not exist{where}\n{layout}'
                    f'  or name another place: --cfg-options {_key_of(cfg, dataset)}.data_root=...'
                )


def _key_of(cfg: Config, part: dict) -> str:
    """How the command line names a part of a config."""
    place = next(place for place, value in walk(cfg._cfg_dict, ()) if value is part)
    return '.'.join(map(str, place))


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


def check_train(cfg: Config) -> None:
    """Raises where a config says nothing of training: that of a tracker, or of a model alone.

    Raises:
        ValueError: it has neither ``train_dataloader`` nor ``train_cfg`` nor ``optim_wrapper``.
    """
    keys = ('train_dataloader', 'train_cfg', 'optim_wrapper')
    if all(cfg.get(key) is None for key in keys):
        raise ValueError(
            f'{cfg.filename or "the config"} has no {", ".join(keys)}: nothing to train\n  that of '
            'a tracker tests: the configs of its detector and of its reid model train'
        )


def check_versions(cfg: Config) -> None:
    """Raises where a pipeline makes several versions of an image, and the model takes one.

    Raises:
        ValueError: it is that of test-time augmentation, and the model is not.
    """
    for loader, dataset in datasets_of(cfg, 'test_dataloader'):
        if 'TTA' not in type_name(cfg.model) and makes_versions(dataset):
            raise ValueError(several_versions(loader, dataset))


def _reads_as_the_host(cfg: Config, dataset: dict) -> bool:
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    if backend not in ('local', 'disk'):
        return False
    kind = dataset_class(cfg, dataset)
    return kind is None or kind.__module__.partition('.')[0] in ('mmengine', *HOSTS)


def _files_of(dataset: dict) -> Iterator[str]:
    """What a dataset of the hosts reads: its list of images and the folders."""
    root = dataset.get('data_root') or ''
    file = dataset.get('ann_file')
    if file and isinstance(file, str):  # what the host makes of another kind, it says itself
        yield os.path.join(root, file)
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
