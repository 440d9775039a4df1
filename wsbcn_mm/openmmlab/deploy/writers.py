"""Predictions in files: objects in COCO's format, masks of classes as PNG.

Those of classifiers are written by `labels`.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class CocoWriter:
    """Predictions as a COCO file: images, categories, annotations with scores; masks as RLE.

    Written as it goes: memory does not grow with the number of images. The file appears when all
    is there.

    Args:
        path: The JSON file.
        classes: Names in the order of the labels; category ids are 1, 2, ... in this order.
        annotations: A COCO annotation file whose ids of images (by file name) and categories (by
            name) are taken instead, so that the predictions can be evaluated against it.
    """

    def __init__(self, path: Path, classes: list[str], annotations: Path | None = None) -> None:
        self.images: list[dict[str, Any]] = []
        self.categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
        self._image_ids: dict[str, int] | None = None
        if annotations is not None:
            given = _read_annotations(annotations)
            self._image_ids = {_file_of(image): image['id'] for image in given['images']}
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

    def add(self, name: str, sample: Any, size: tuple[int, int]) -> None:
        """The predictions of one image, of (height, width) in pixels."""
        from pycocotools import mask as rle

        image_id = len(self.images) + 1
        if self._image_ids is not None:
            image_id = _id_of(name, self._image_ids)
        self.images.append(dict(id=image_id, file_name=name, height=size[0], width=size[1]))
        found = sample.pred_instances
        if len(found) and int(found.labels.max()) >= len(self.categories):
            raise ValueError(
                f'the model predicts class number {int(found.labels.max())}, and '
                f'{len(self.categories)} names of classes are known\n'
                '  name all of them: --cfg-options test_dataloader.dataset.metainfo.classes=...'
            )
        masks = np.asarray(found.masks, dtype=np.uint8) if 'masks' in found else None
        for i, (box, score, label) in enumerate(
            zip(found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist())
        ):
            x1, y1, x2, y2 = box
            entry = dict(
                id=self._count + 1,
                image_id=image_id,
                category_id=self.categories[label]['id'],
                bbox=[x1, y1, x2 - x1, y2 - y1],  # not rounded: as test.py evaluates them
                score=score,
                area=(x2 - x1) * (y2 - y1),
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


def _read_annotations(path: Path) -> dict[str, Any]:
    """An annotation file in COCO's format.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is another one.
    """
    if not path.is_file():
        raise FileNotFoundError(f'--annotations: no file {path}')
    try:
        content = json.loads(path.read_bytes())
        if {'images', 'categories'} <= content.keys():
            return content
    except (ValueError, AttributeError):  # no JSON, or a list
        pass
    raise ValueError(
        f"--annotations: {path} is not in COCO's format: JSON of images and categories"
    )


def _file_of(image: dict[str, Any]) -> str:
    """The file of an image of an annotation file; LVIS 1 has addresses alone."""
    address = str(image.get('coco_url') or '').partition('://')[2].partition('/')[2]
    return image.get('file_name') or address


def _id_of(name: str, ids: dict[str, int]) -> int:
    """The id of a file, which the annotations may name with folders, or as LVIS 0.5 does.

    Raises:
        ValueError: there is none, or several.
    """
    if name in ids:
        return ids[name]
    found = [file for file in ids if file.endswith((f'/{name}', f'_{name}'))]
    found = [f for f in found if f[-len(name) - 1] == '/' or f.startswith('COCO_')]
    if len(found) != 1:
        there = ', '.join(found[:3] or list(ids)[:3])
        raise ValueError(
            f'{name} is {"several" if found else "not among the"} images of the annotation file\n'
            f'  it has {there}, ...: give infer.py the folder below which they have these names'
        )
    return ids[found[0]]


def write_mask(path: Path, sample: Any, palette: Any) -> None:
    """Class numbers as a PNG with a palette; 16 bit grey where there are more than 256 classes.

    The numbers are those of the data set: with ``reduce_zero_label`` 0 is "no class" there, and the
    first class is 1, as mmsegmentation's metric writes them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = sample.pred_sem_seg.data.squeeze(0).numpy()
    colours = list(palette) if isinstance(palette, (list, tuple)) else []
    if sample.metainfo.get('reduce_zero_label', False):
        classes, colours = classes + 1, [(0, 0, 0), *colours] if colours else []
    if classes.max(initial=0) > 255:
        Image.fromarray(classes.astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(classes.astype(np.uint8))
    if colours:
        picture.putpalette([int(v) for colour in colours[:256] for v in colour])
    picture.save(path)
