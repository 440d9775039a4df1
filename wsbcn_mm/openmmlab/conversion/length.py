"""How long a training is: iterations, steps of the optimizer, images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mmengine.config import Config

from wsbcn_mm.openmmlab.conversion.recipe import accumulation, batch_size
from wsbcn_mm.openmmlab.loaders import inner_datasets, prefixes_of

LARGE = 50_000_000  # bytes of an annotation file


def iterations(cfg: Config, processes: int) -> int | None:
    """Iterations of the whole training; None where they cannot be counted."""
    loop = cfg.get('train_cfg') or {}
    count: int | None = loop.get('max_iters')
    if count is None and loop.get('max_epochs'):
        images, batch = training_images(cfg), batch_size(cfg)
        if images and batch:
            count = loop['max_epochs'] * math.ceil(images / (batch * processes))
    return count or None


def steps(cfg: Config, processes: int) -> int | None:
    """Steps of the optimizer in the whole training; None where they cannot be counted."""
    count = iterations(cfg, processes)
    return count // accumulation(cfg) if count else None


def training_images(cfg: Config) -> int | None:
    """How many images a training set lists, of which ``indices`` may take some.

    None where it is wrapped, is no list of the hosts, or is so long that counting takes seconds: a
    training on it is not short.
    """
    dataset = (cfg.get('train_dataloader') or {}).get('dataset')
    if not isinstance(dataset, dict) or dataset not in inner_datasets(dataset):
        return None
    taken = dataset.get('indices')  # the first so many, the last (below 0), or these
    if taken is None:
        return _listed(dataset)
    taken = abs(taken) if isinstance(taken, int) else len(taken)
    return min(taken, _listed(dataset) or taken) or None


def _listed(dataset: dict[str, Any]) -> int | None:
    root, names = dataset.get('data_root') or '', dataset.get('ann_file') or ''
    file = Path(root, names)
    if not names or not file.is_file():
        if isinstance(dataset.get('data_prefix'), str):  # folders of classes may hold millions
            return None
        folder = Path(root, prefixes_of(dataset).get('img_path') or '')
        suffix = dataset.get('img_suffix', '.jpg')  # the default of BaseSegDataset
        found = 0 if names or not folder.is_dir() else sum(1 for _ in folder.rglob(f'*{suffix}'))
        return found or None
    if file.stat().st_size > LARGE:
        return None
    if file.suffix == '.json':
        try:
            content = json.loads(file.read_bytes())
        except ValueError:  # damaged: the one who trains on it says where
            return None
        images = content.get('images') if isinstance(content, dict) else None
        return len(images) if isinstance(images, list) else None
    return sum(1 for line in file.read_text().splitlines() if line.strip())
