"""The data set as files, in the layouts of COCO and Pascal VOC, and a sheet to look at."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from wsbcn_mm.shapes.arguments import Stamp, checked_int, checked_size
from wsbcn_mm.shapes.draw import CLASSES, Instances, draw_image
from wsbcn_mm.shapes.folder import draw_once, write_json

PALETTE = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128))
"""RGB colours of the VOC masks, background first: the first colours of Pascal VOC's palette."""

VERSION = 2
"""Raised whenever the same parameters would give other files, so that old data is noticed."""

NUM_TRAIN, NUM_VAL = 360, 80

STAMP = 'shapes.json'

# Train ids count from 1, val ids from 1,000,001. File names must not clash, as VOC keeps both
# splits in one folder, and must not move when the number of training images changes.
FIRST_ID = {'train': 1, 'val': 1_000_001}


# ----------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------
def _annotation(
    annotation_id: int, image_id: int, class_id: int, mask: np.ndarray
) -> dict[str, Any]:
    """Returns one COCO annotation; all its numbers come from the run-length code itself."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': class_id + 1,
        'bbox': [float(value) for value in coco_mask.toBbox(rle)],
        'area': float(coco_mask.area(rle)),
        'iscrowd': 0,
        'segmentation': {
            'size': [int(value) for value in rle['size']],
            'counts': rle['counts'].decode('ascii'),
        },
    }


def _semantic_png(instances: Instances, width: int, height: int) -> Image.Image:
    """Returns the palettised class map: 0 is the background, class id + 1 the rest."""
    labels = np.zeros((height, width), np.uint8)
    for class_id, mask in instances:
        labels[mask] = class_id + 1
    picture = Image.fromarray(labels)
    picture.putpalette([value for colour in PALETTE for value in colour])
    return picture


def jpeg_bytes(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'JPEG', quality=92, subsampling=0)
    return buffer.getvalue()


def _write_split(folder: Path, split: str, stamp: Stamp, report: Callable[[], None]) -> list[str]:
    """Draws one split into both layouts; returns its file names without suffix."""
    coco, voc = folder / 'coco', folder / 'VOCdevkit' / 'VOC2012'
    width, height = stamp.size
    names: list[str] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(stamp.counts[split]):
        image_id = FIRST_ID[split] + index
        name = f'{image_id:012d}'
        image, instances = draw_image(split, index, (width, height), stamp.seed)
        jpeg = jpeg_bytes(image)
        (coco / f'{split}2017' / f'{name}.jpg').write_bytes(jpeg)
        (voc / 'JPEGImages' / f'{name}.jpg').write_bytes(jpeg)
        _semantic_png(instances, width, height).save(voc / 'SegmentationClass' / f'{name}.png')
        names.append(name)
        images.append(
            {
                'id': image_id,
                'file_name': f'{name}.jpg',
                'width': width,
                'height': height,
                'license': 1,
            }
        )
        for class_id, mask in instances:
            annotations.append(_annotation(len(annotations) + 1, image_id, class_id, mask))
        report()
    write_json(
        coco / 'annotations' / f'instances_{split}2017.json',
        {
            'info': {'description': f'wsbcn_mm shapes, {split}', 'version': str(VERSION)},
            'licenses': [{'id': 1, 'name': 'drawn by wsbcn_mm.shapes', 'url': ''}],
            'categories': [
                {'id': i + 1, 'name': name, 'supercategory': 'shape'}
                for i, name in enumerate(CLASSES)
            ],
            'images': images,
            'annotations': annotations,
        },
    )
    return names


def _write(folder: Path, stamp: Stamp, progress: Callable[[int, int], None] | None) -> None:
    """Writes the whole data set into a new folder."""
    voc = folder / 'VOCdevkit' / 'VOC2012'
    lists = voc / 'ImageSets' / 'Segmentation'
    for path in (
        folder / 'coco' / 'train2017',
        folder / 'coco' / 'val2017',
        folder / 'coco' / 'annotations',
        voc / 'JPEGImages',
        voc / 'SegmentationClass',
        lists,
    ):
        path.mkdir(parents=True)
    total = sum(stamp.counts.values())
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    all_names = []
    for split in stamp.counts:
        names = _write_split(folder, split, stamp, report)
        (lists / f'{split}.txt').write_text('\n'.join(names) + '\n', encoding='utf-8')
        all_names += names
    (lists / 'trainval.txt').write_text('\n'.join(all_names) + '\n', encoding='utf-8')


def draw_dataset(
    root: str | os.PathLike[str] = 'data/shapes',
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    size: Sequence[int] = (192, 160),
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draws the data set, unless it is there already.

    Several processes may call this at once, see `wsbcn_mm.shapes.folder.draw_once`.

    Args:
        root: Folder of the data set. The module's docstring shows the layout below it.
        num_train: Number of training images, at least 1.
        num_val: Number of validation images, at least 1.
        size: Width and height of the images in pixels, each at least 48.
        seed: Seed of all images, at least 0.
        progress: Called after each image with the number of images done and their total.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: An argument is out of its range; or `root` holds a data set with other
            parameters or of another version, or files which are not a shapes data set.
        OSError: The folder cannot be written.
    """
    stamp = Stamp.checked(('wsbcn_mm shapes', VERSION), num_train, num_val, size, seed)
    return draw_once(root, STAMP, stamp.json(), lambda folder: _write(folder, stamp, progress))


# ----------------------------------------------------------------------------------------------
# Looking at it
# ----------------------------------------------------------------------------------------------
_OUTLINE_COLOURS = ((255, 60, 60), (60, 230, 60), (255, 220, 40), (80, 160, 255), (255, 90, 255))


def _edges(mask: np.ndarray) -> np.ndarray:
    """Returns the mask's pixels that have a neighbour outside of it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def contact_sheet(count: int = 24, size: Sequence[int] = (192, 160), seed: int = 0) -> Image.Image:
    """Draws the first training images side by side, with outlines and class names.

    Args:
        count: Number of images.
        size: Width and height of one image in pixels, as for `draw_image`.
        seed: Seed of the data set.

    Returns:
        The sheet, RGB.

    Raises:
        ValueError: An argument is out of its range.
    """
    count = checked_int('count', count, 1)
    columns, scale = 6, 2  # enlarged, so that the outlines hide little of the images
    width, height = (scale * side for side in checked_size(size))
    gap = 4
    rows = -(-count // columns)
    sheet = Image.new('RGB', (columns * (width + gap), rows * (height + gap)), (255, 255, 255))
    for index in range(count):
        image, instances = draw_image('train', index, size, seed)
        large = image.repeat(scale, axis=0).repeat(scale, axis=1)
        for class_id, mask in instances:
            large[_edges(mask.repeat(scale, axis=0).repeat(scale, axis=1))] = _OUTLINE_COLOURS[
                class_id
            ]
        picture = Image.fromarray(large)
        pen = ImageDraw.Draw(picture)
        for class_id, mask in instances:
            top, left = (int(indices.min()) for indices in np.nonzero(mask))
            pen.text(
                (left * scale, max(0, top * scale - 10)),
                CLASSES[class_id],
                fill=_OUTLINE_COLOURS[class_id],
                stroke_width=1,
                stroke_fill=(0, 0, 0),
            )
        row, column = divmod(index, columns)
        sheet.paste(picture, (column * (width + gap), row * (height + gap)))
    return sheet
