"""Draws "shapes", a small detection and segmentation data set made of code only.

It exists so that every claim of this project can be tried without a download: 440 images of
192 x 160 pixels with ellipses, rectangles, triangles, stars and crosses, drawn in seconds.
The images differ strongly from one another in brightness, contrast and colour cast. That is on
purpose: it makes the statistics of one image a poor guess of those of the data set, which is
what normalisation layers suffer from with one or two images a GPU.

Layout below the root, the same as that of the two public data sets, so that ordinary configs
can be pointed at it::

    ROOT/shapes.json                                    stamp: format version and parameters
    ROOT/coco/{train2017,val2017}/%012d.jpg
    ROOT/coco/annotations/instances_{train,val}2017.json
    ROOT/VOCdevkit/VOC2012/JPEGImages/%012d.jpg         the same files as below coco/
    ROOT/VOCdevkit/VOC2012/SegmentationClass/%012d.png  palettised; 0 is the background
    ROOT/VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt

From the shell::

    python -m wsbcn_mm.shapes data/shapes --preview shapes.png

Every image depends on (seed, split, index, size) only. Shapes are rasterised with numpy alone, so
no drawing library's version changes the masks. The JPEG bytes do depend on the JPEG library.
"""

from wsbcn_mm.shapes.arguments import SPLITS
from wsbcn_mm.shapes.draw import (
    CLASSES,
    MIN_VISIBLE_PIXELS,
    MIN_VISIBLE_SHARE,
    draw_image,
)
from wsbcn_mm.shapes.files import (
    NUM_TRAIN,
    NUM_VAL,
    PALETTE,
    STAMP,
    VERSION,
    contact_sheet,
    draw_dataset,
)

__all__ = [
    'CLASSES',
    'MIN_VISIBLE_PIXELS',
    'MIN_VISIBLE_SHARE',
    'NUM_TRAIN',
    'NUM_VAL',
    'PALETTE',
    'SPLITS',
    'STAMP',
    'VERSION',
    'contact_sheet',
    'draw_dataset',
    'draw_image',
]
