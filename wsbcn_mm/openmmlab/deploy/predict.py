"""From image files to predictions in files, one image after the other."""

import copy
import json
import os
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, VISUALIZERS
from PIL import Image
from torch import nn

from wsbcn_mm.openmmlab.config import datasets_of_test, scope_of

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')


def find_images(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """Image files below a folder, or one file, each with its path relative to the folder.

    What lies below ``output`` are results of ours.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: two files whose results would have one name.
    """
    if source.is_file():
        return [(source, Path(source.name))]
    if not source.is_dir():
        raise FileNotFoundError(f'no image file or folder {source}')
    files = [
        file
        for file in sorted(source.rglob('*'))
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and output.resolve() not in file.resolve().parents
    ]
    if not files:
        raise FileNotFoundError(f'no image in {source} ({", ".join(SUFFIXES)})')
    seen: dict[Path, Path] = {}
    for file in files:
        other = seen.setdefault(file.with_suffix(''), file)
        if other is not file:
            raise ValueError(f'{other} and {file} would write the same results: rename one')
    return [(file, file.relative_to(source)) for file in files]


def read_image(path: Path) -> np.ndarray | None:
    """A BGR image, decoded as in training; None for what is no readable image."""
    try:
        content = path.read_bytes()
        return mmcv.imfrombytes(content) if content else None
    except (OSError, cv2.error):
        return None


def pipeline_of(cfg: Config) -> Compose:
    """The test pipeline for images that are in memory: without files and annotations."""
    steps = [copy.deepcopy(s) for s in datasets_of_test(cfg)[0]['pipeline']]
    steps = [s for s in steps if 'Annotations' not in str(s['type'])]
    if 'Load' not in str(steps[0]['type']):
        raise ValueError(
            f'the test pipeline must begin with LoadImageFromFile\n  got {steps[0]["type"]}'
        )
    steps[0] = dict(type='LoadImageFromNDArray')
    return Compose([TRANSFORMS.build(step) for step in steps])


def classes_of(cfg: Config, model: nn.Module) -> dict:
    """Names and colours of the classes: the checkpoint's, else those of the config's dataset."""
    meta = getattr(model, 'dataset_meta', None)
    if not meta or 'classes' not in meta:
        dataset = datasets_of_test(cfg)[0]
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            own = getattr(registry.get(dataset['type']), 'METAINFO', {})
        meta = {**own, **(dataset.get('metainfo') or {})}
    if 'classes' not in meta:
        raise ValueError(
            "neither the checkpoint nor the config's dataset knows the names of the classes\n"
            '  set test_dataloader.dataset.metainfo=dict(classes=...)'
        )
    return {**meta, 'classes': list(meta['classes'])}


class Predictor:
    """A model with what is needed before and after it.

    Args:
        cfg: The config.
        model: In evaluation mode, folded or not.
    """

    def __init__(self, cfg: Config, model: nn.Module) -> None:
        self.model = model
        self.meta = classes_of(cfg, model)
        self._pipeline = pipeline_of(cfg)
        kind = 'DetLocalVisualizer' if scope_of(cfg) == 'mmdet' else 'SegLocalVisualizer'
        look = {k: v for k, v in (cfg.get('visualizer') or {}).items() if k == 'alpha'}
        self._visualizer = VISUALIZERS.build(
            dict(type=kind, name='wsbcn_mm_infer', vis_backends=None, **look)
        )
        self._visualizer.dataset_meta = {'palette': 'random', **self.meta}

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> object:
        """The data sample of one BGR image, predictions in its pixels."""
        data = self._pipeline(dict(img=image, img_id=0))
        batch = dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
        return self.model.test_step(batch)[0].cpu()

    def draw(self, image: np.ndarray, sample: object, path: Path, threshold: float) -> None:
        """A picture of the predictions on the image."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = dict(pred_score_thr=threshold) if 'pred_instances' in sample else {}
        self._visualizer.add_datasample(
            path.name,
            np.ascontiguousarray(image[..., ::-1]),
            sample,
            draw_gt=False,
            out_file=str(path),
            **scores,
        )


class CocoWriter:
    """Predictions as a COCO file: images, categories, annotations with scores; masks as RLE.

    Written as it goes: memory does not grow with the number of images. The file appears when all
    is there.

    Args:
        path: The JSON file.
        classes: Names; category ids are 1, 2, ... in this order.
        annotations: A COCO annotation file whose ids of images (by file name) and categories (by
            name) are taken instead, so that the predictions can be evaluated against it.
    """

    def __init__(self, path: Path, classes: list[str], annotations: Path | None = None) -> None:
        self.images: list[dict] = []
        self.categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
        self._image_ids: dict[str, int] | None = None
        if annotations is not None:
            given = json.loads(annotations.read_text())
            self._image_ids = {i['file_name']: i['id'] for i in given['images']}
            ids = {c['name']: c['id'] for c in given['categories']}
            unknown = [name for name in classes if name not in ids]
            if unknown:
                raise ValueError(f'{annotations} has no category {", ".join(unknown)}')
            self.categories = [dict(id=ids[name], name=name) for name in classes]
        self._path = path
        self._part = path.with_name(f'.{path.name}.part')
        self._file = self._part.open('w')
        self._file.write('{"annotations": [')
        self._count = 0

    def add(self, name: str, sample: object, size: tuple[int, int]) -> None:
        """The predictions of one image, of (height, width) in pixels."""
        from pycocotools import mask as rle

        image_id = len(self.images) + 1
        if self._image_ids is not None:
            if name not in self._image_ids:
                raise ValueError(f'{name} is not among the images of the annotation file')
            image_id = self._image_ids[name]
        self.images.append(dict(id=image_id, file_name=name, height=size[0], width=size[1]))
        found = sample.pred_instances
        masks = np.asarray(found.masks, dtype=np.uint8) if 'masks' in found else None
        for i, (box, score, label) in enumerate(
            zip(found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist())
        ):
            x1, y1, x2, y2 = box
            entry = dict(
                id=self._count + 1,
                image_id=image_id,
                category_id=self.categories[label]['id'],
                bbox=[round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                score=round(score, 5),
                area=round((x2 - x1) * (y2 - y1), 2),
                iscrowd=0,
            )
            if masks is not None:
                code = rle.encode(np.asfortranarray(masks[i]))
                entry['area'] = float(rle.area(code))
                size_ = [int(v) for v in code['size']]
                entry['segmentation'] = dict(size=size_, counts=code['counts'].decode())
            self._file.write((',\n' if self._count else '\n') + json.dumps(entry))
            self._count += 1

    def close(self, complete: bool = True) -> None:
        """Finishes the file; removes it where the run was not completed."""
        self._file.write('\n], "images": ' + json.dumps(self.images))
        self._file.write(', "categories": ' + json.dumps(self.categories) + '}\n')
        self._file.close()
        if complete:
            os.replace(self._part, self._path)
        else:
            self._part.unlink()


def write_mask(path: Path, sample: object, palette: list | None) -> None:
    """Class numbers as a PNG with a palette; 16 bit grey where there are more than 256 classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = sample.pred_sem_seg.data.squeeze(0).numpy()
    if classes.max(initial=0) > 255:
        Image.fromarray(classes.astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(classes.astype(np.uint8))
    if isinstance(palette, (list, tuple)) and palette:
        picture.putpalette([int(v) for colour in palette[:256] for v in colour])
    picture.save(path)
