"""Names and colours of the classes that a model finds, in the order of its labels."""

import json
import logging
import os
from typing import Any

from mmengine import fileio
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from wsbcn_mm.openmmlab.checkpoints import BY_LABEL
from wsbcn_mm.openmmlab.config import scope_of
from wsbcn_mm.openmmlab.data.reading import is_there
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.openmmlab.loaders import dataset_class, datasets_of


def classes_of(cfg: Config, model: Any, required: bool = True) -> dict[str, Any]:
    """Names and colours of the classes: the checkpoint's, else those of the config's dataset.

    Where they are not ``required`` and nobody knows them, ``classes`` is None.

    The names are in the order of the labels. In COCO's layout that is the order of the annotation
    file that was trained on, whatever that of the names in the config is: checkpoints of ours hold
    it, and of others the file that is tested on is asked.
    """
    meta = getattr(model, 'dataset_meta', None)
    # The names need no pipeline.
    datasets = datasets_of(cfg, 'test_dataloader') or datasets_of(cfg, 'val_dataloader')
    dataset = datasets[0][1] if datasets else {}
    kind = dataset_class(cfg, dataset)
    if not meta or 'classes' not in meta:
        # Which also reads the names from a file, where a config names one.
        own = BaseDataset._load_metainfo(dataset.get('metainfo'))
        meta = _meta_of(getattr(kind, 'METAINFO', {}), own)
    if not meta.get('classes') and not required:
        return {**meta, 'classes': None}
    if 'classes' not in meta:
        raise ValueError(
            "neither the checkpoint nor the config's dataset knows the names of the classes\n"
            '  set test_dataloader.dataset.metainfo=dict(classes=...)'
        )
    if isinstance(meta['classes'], str):
        raise ValueError(
            f'metainfo.classes is one text, and no file: {meta["classes"]!r}\n  write a tuple of '
            'names, with a comma behind a single one'
        )
    names = list(meta['classes'])
    file = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    arguments = dataset.get('backend_args')
    known = BY_LABEL in meta or os.path.isdir(file) or not file
    if not known and _numbers_labels_by_file(cfg, kind) and is_there(file, arguments):
        names = _names_by_file(file, names, arguments)
    return {**meta, 'classes': names}


def _meta_of(official: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What a dataset's class says, and its config instead; each class keeps its colour."""
    meta = {**official, **own}
    classes, palette = meta.get('classes') or (), meta.get('palette') or ()
    if palette and len(palette) != len(classes):
        colour = dict(zip(official.get('classes', ()), official.get('palette', ())))
        known = all(name in colour for name in classes)
        meta['palette'] = [colour[name] for name in classes] if known else None
    return meta


def _numbers_labels_by_file(cfg: Config, kind: type | None) -> bool:
    if scope_of(cfg) != 'mmdet':
        return False
    from mmdet.datasets import CocoDataset

    return getattr(kind, 'load_data_list', None) is CocoDataset.load_data_list


def _names_by_file(file: str, names: list[str], backend_args: dict[str, Any] | None) -> list[str]:
    try:
        return [c['name'] for c in categories_of(file, names, backend_args)] or names
    except Exception as error:  # of a storage, which may raise anything
        if os.path.exists(file):
            raise
        print_log(
            f'{file}, whose order of categories numbers the labels, cannot be read '
            f'({first_line(error)}): the names are taken in the order of the config',
            'current',
            logging.WARNING,
        )
        return names


def categories_of(
    annotations: str, names: list[str], backend_args: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The categories of a COCO file that have these names, in its order."""
    content = json.loads(fileio.get_text(annotations, backend_args=backend_args))
    return [c for c in content.get('categories', []) if c.get('name') in names]
