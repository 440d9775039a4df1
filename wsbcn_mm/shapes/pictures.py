"""Pictures of one shape each, in a folder for each class: ImageNet's layout.

As on the images for detection, colour and texture tell something about the class, but not all: most
shapes wear those of their class, some any. The outline always tells.

Layout below the root::

    ROOT/pictures.json                 stamp: format version and parameters
    ROOT/{train,val}/CLASS/%06d.jpg

From the shell::

    python -m wsbcn_mm.shapes --pictures data/pictures
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wsbcn_mm.shapes.arguments import Sample, Stamp
from wsbcn_mm.shapes.draw import (
    CLASSES,
    background,
    clip_window,
    log_uniform,
    paint_clutter,
    paint_object,
    photograph,
    rasterise,
    rotate,
    unit_outline,
)
from wsbcn_mm.shapes.files import jpeg_bytes
from wsbcn_mm.shapes.folder import draw_once

VERSION = 2
NUM_TRAIN, NUM_VAL = 2000, 500
SIZE = (64, 64)
STAMP = 'pictures.json'


def draw_picture(
    split: str, index: int, size: Sequence[int] = SIZE, seed: int = 0
) -> tuple[np.ndarray, int]:
    """Draws one picture.

    The same arguments always give the same picture, however many the data set has.

    Args:
        split: 'train' or 'val'.
        index: Number of the picture in its split, from 0.
        size: Width and height in pixels, each at least 48.
        seed: Seed of the data set, at least 0.

    Returns:
        uint8 RGB of shape (height, width, 3), before compression, and the class id, an index into
        `wsbcn_mm.shapes.CLASSES`.

    Raises:
        ValueError: An argument is out of its range.
    """
    sample = Sample.checked(split, index, size, seed)
    width, height = sample.size
    rng = sample.random(1)
    class_id = sample.index % len(CLASSES)
    canvas = background(width, height, rng)
    paint_clutter(canvas, rng)
    short = min(width, height)
    outline = unit_outline(CLASSES[class_id], rng) * log_uniform(rng, 0.2, 0.4) * short
    x, y = outline.T
    turned = np.stack(rotate(x, y, rng.uniform(0, 2 * np.pi)), axis=1)
    middle = np.array((width, height)) / 2 + rng.uniform(-0.15, 0.15, 2) * short
    window, coverage = clip_window(*rasterise(turned + middle), width, height)
    paint_object(canvas, window, coverage, class_id, rng)
    return photograph(canvas, rng), class_id


def draw_pictures(
    root: str | os.PathLike[str] = 'data/pictures',
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    size: Sequence[int] = SIZE,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draws the pictures, unless they are there already.

    Several processes may call this at once, see `wsbcn_mm.shapes.folder.draw_once`.

    Args:
        root: Folder of the data set. The module's docstring shows the layout below it.
        num_train: Number of pictures for training, at least 5: the classes take turns.
        num_val: Number of pictures for validation, at least 5.
        size: Width and height in pixels, each at least 48.
        seed: Seed of all pictures, at least 0.
        progress: Called after each picture with the number of pictures done and their total.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: An argument is out of its range; or `root` holds a data set with other
            parameters or of another version, or files which are none.
        OSError: The folder cannot be written.
    """
    stamp = Stamp.checked(
        ('wsbcn_mm pictures', VERSION), num_train, num_val, size, seed, len(CLASSES)
    )
    return draw_once(root, STAMP, stamp.json(), lambda folder: _write(folder, stamp, progress))


def _write(folder: Path, stamp: Stamp, progress: Callable[[int, int], None] | None) -> None:
    done = 0
    for split, count in stamp.counts.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index in range(count):
            picture, label = draw_picture(split, index, stamp.size, stamp.seed)
            file = folder / split / CLASSES[label] / f'{index:06d}.jpg'
            file.write_bytes(jpeg_bytes(picture))
            done += 1
            if progress is not None:
                progress(done, sum(stamp.counts.values()))
