"""Boxes in an ONNX graph: priors, decoding, selection, non-maximum suppression, RoIs, masks.

Each function writes what one of MMDetection computes, with its settings, in standard operators.
Boxes are corners (x1, y1, x2, y2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from wsbcn_mm.openmmlab.deploy.graph import BOOL, FLOAT, INT, Graph, Operand

LAST = np.iinfo(np.int64).max
MOST_GROWTH = abs(math.log(16 / 1000))  # of a side, as a logarithm: DeltaXYWHBBoxCoder.decode


def part(g: Graph, value: str, start: int, stop: int | None, axis: int) -> str:
    """``value[..., start:stop, ...]`` along an axis."""
    return g.add('Slice', value, [start], [LAST if stop is None else stop], [axis])


def size_along(g: Graph, value: str, axis: int) -> str:
    """The size of an axis, (1,)."""
    return g.add('Shape', value, start=axis, end=axis + 1)


def where(g: Graph, condition: str) -> str:
    """The positions (K,) at which a condition (N,) holds."""
    return g.add('Reshape', g.add('NonZero', condition), [-1])


def rows(g: Graph, maps: str, columns: int) -> str:
    """Maps (1, A * columns, H, W) of a dense head as rows (H * W * A, columns)."""
    return g.add('Reshape', g.add('Transpose', maps, perm=[0, 2, 3, 1]), [-1, columns])


# ---- priors and decoding -----------------------------------------------------------------------


def grid(g: Graph, maps: str, stride: tuple[float, float], offset: float) -> str:
    """The position (x, y) of every cell of maps (1, C, H, W), (H, W, 2)."""
    height, width = (size_along(g, maps, axis) for axis in (2, 3))
    shape = g.add('Concat', height, width, [1], axis=0)
    axes = []
    for size, step, view in ((width, stride[0], [1, -1, 1]), (height, stride[1], [-1, 1, 1])):
        count = g.add('Range', 0, g.add('Squeeze', size), 1)
        place = g.add('Mul', g.add('Add', g.add('Cast', count, to=FLOAT), offset), float(step))
        axes.append(g.add('Expand', g.add('Reshape', place, view), shape))
    return g.add('Concat', *axes, axis=-1)


def anchors(g: Graph, maps: str, stride: tuple[float, float], base: np.ndarray) -> str:
    """Anchors (H * W * A, 4): ``base`` (A, 4) moved to every cell."""
    cells = g.add('Unsqueeze', grid(g, maps, stride, 0.0), [2])
    moved = g.add('Add', g.add('Concat', cells, cells, axis=-1), base.astype(np.float32))
    return g.add('Reshape', moved, [-1, 4])


def points(g: Graph, maps: str, stride: tuple[float, float], offset: float) -> str:
    """Points (H * W, 2), one for every cell."""
    return g.add('Reshape', grid(g, maps, stride, offset), [-1, 2])


def from_deltas(g: Graph, coder: Any, boxes: str, deltas: str, limits: str) -> str:
    """Boxes moved and scaled by deltas (..., 4): ``DeltaXYWHBBoxCoder.decode``.

    Args:
        g: The graph.
        coder: Its settings.
        boxes: (..., 4).
        deltas: (..., 4).
        limits: (4,): width, height, width, height of the image.
    """
    deltas = g.add('Mul', deltas, np.array(coder.stds))
    deltas = g.add('Add', deltas, np.array(coder.means))
    low, high = (part(g, boxes, *ends, axis=-1) for ends in ((0, 2), (2, 4)))
    size = g.add('Sub', high, low)
    centre = g.add('Mul', g.add('Add', low, high), 0.5)
    shift = g.add('Mul', size, part(g, deltas, 0, 2, axis=-1))
    growth = g.add('Clip', part(g, deltas, 2, 4, axis=-1), -MOST_GROWTH, MOST_GROWTH)
    centre = g.add('Add', centre, shift)
    half = g.add('Mul', g.add('Mul', size, g.add('Exp', growth)), 0.5)
    found = g.add('Concat', g.add('Sub', centre, half), g.add('Add', centre, half), axis=-1)
    return clipped(g, found, limits) if coder.clip_border else found


def from_distances(g: Graph, coder: Any, centres: str, distances: str, limits: str) -> str:
    """Boxes with their sides at distances from points: ``DistancePointBBoxCoder.decode``."""
    low = g.add('Sub', centres, part(g, distances, 0, 2, axis=-1))
    high = g.add('Add', centres, part(g, distances, 2, 4, axis=-1))
    found = g.add('Concat', low, high, axis=-1)
    return clipped(g, found, limits) if coder.clip_border else found


def clipped(g: Graph, boxes: str, limits: str) -> str:
    """Boxes within the image."""
    return g.add('Min', g.add('Max', boxes, 0.0), limits)


# ---- selection ---------------------------------------------------------------------------------


def best(g: Graph, scores: str, count: int) -> tuple[str, str]:
    """The highest ``count`` scores of (N,), or all, and their positions."""
    most = g.add('Min', size_along(g, scores, 0), [count])
    values, positions = g.add_many('TopK', 2, scores, most)
    return values, positions


def large_enough(g: Graph, boxes: str, smallest: float) -> str:
    """The positions of boxes whose sides are longer than ``smallest``."""
    size = g.add('Sub', part(g, boxes, 2, 4, axis=1), part(g, boxes, 0, 2, axis=1))
    least = g.add('ReduceMin', size, [1], keepdims=0)
    return where(g, g.add('Greater', least, float(smallest)))


def kept(g: Graph, boxes: str, scores: str, groups: str | None, threshold: float, most: int) -> str:
    """Non-maximum suppression: positions of what is kept, by falling score.

    Args:
        g: The graph.
        boxes: (N, 4).
        scores: (N,).
        groups: (N,) int64; boxes of different ones leave each other alone. None: one group.
        threshold: A box that overlaps a better one by more (IoU) is left out.
        most: How many are kept.
    """
    if groups is not None:  # apart from each other, as mmcv does it
        flat = g.add('Concat', g.add('Reshape', boxes, [-1]), [0.0], axis=0)
        width = g.add('Add', g.add('ReduceMax', flat, [0], keepdims=0), 1.0)
        offset = g.add('Mul', g.add('Cast', groups, to=FLOAT), width)
        boxes = g.add('Add', boxes, g.add('Unsqueeze', offset, [1]))
    found = g.add(
        'NonMaxSuppression',
        g.add('Unsqueeze', boxes, [0]),
        g.add('Unsqueeze', scores, [0, 1]),
        [most],
        [float(threshold)],
    )
    return g.add('Reshape', part(g, found, 2, 3, axis=1), [-1])


def take(g: Graph, positions: str, *values: str) -> list[str]:
    """These rows of each value."""
    return [g.add('Gather', value, positions, axis=0) for value in values]


# ---- regions and masks -------------------------------------------------------------------------


def regions(g: Graph, extractor: Any, features: Sequence[str], boxes: str) -> str:
    """Features (R, C, h, w) of boxes (R, 4): ``SingleRoIExtractor`` with ``RoIAlign``."""
    side = g.add('Sub', part(g, boxes, 2, 4, axis=1), part(g, boxes, 0, 2, axis=1))
    area = g.add('ReduceProd', side, [1], keepdims=0)
    scale = g.add('Div', g.add('Sqrt', area), float(extractor.finest_scale))
    scale = g.add('Add', scale, 1e-6)
    # The floor of the logarithm, without its rounding next to a whole number.
    level: Operand = g.add('Mul', g.add('Cast', area, to=INT), 0)
    for power in range(1, len(features)):
        above = g.add('GreaterOrEqual', scale, 2.0**power)
        level = g.add('Add', level, g.add('Cast', above, to=INT))
    found, order = [], []
    for i, (maps, layer) in enumerate(zip(features, extractor.roi_layers)):
        positions = where(g, g.add('Equal', level, i))
        (own,) = take(g, positions, boxes)
        image = g.add('Mul', positions, 0)
        height, width = layer.output_size
        aligned = g.add(
            'RoiAlign',
            maps,
            own,
            image,
            coordinate_transformation_mode='half_pixel' if layer.aligned else 'output_half_pixel',
            mode=layer.pool_mode,
            output_height=height,
            output_width=width,
            sampling_ratio=layer.sampling_ratio,
            spatial_scale=layer.spatial_scale,
        )
        found.append(aligned)
        order.append(positions)
    joined, places = g.add('Concat', *found, axis=0), g.add('Concat', *order, axis=0)
    counted = g.add('Range', 0, g.add('Squeeze', size_along(g, places, 0)), 1)
    back = g.add('ScatterElements', g.add('Mul', places, 0), places, counted, axis=0)
    return take(g, back, joined)[0]


def masks_of_labels(g: Graph, masks: str, labels: str) -> str:
    """Of masks (R, classes, h, w) those of the labels (R,), (R, h, w)."""
    return g.add('GatherND', masks, g.add('Unsqueeze', labels, [1]), batch_dims=1)


def pasted(g: Graph, masks: str, boxes: str, size: Sequence[str], threshold: float) -> str:
    """Masks (R, h, w) in their boxes in the image, (R, H, W) bool.

    Bilinear interpolation is a product along each axis: what a row of the mask has in a row of the
    image is one matrix. A box without area has an empty mask.

    Args:
        g: The graph.
        masks: Probabilities.
        boxes: (R, 4), in pixels of the image.
        size: Height and width of the image, (1,) each.
        threshold: From it on a pixel belongs to the mask.
    """
    weights = []
    for axis, length in ((1, size[0]), (0, size[1])):
        count = g.add('Cast', g.add('Range', 0, g.add('Squeeze', length), 1), to=FLOAT)
        pixel = g.add('Unsqueeze', g.add('Add', count, 0.5), [0])
        low, high = (part(g, boxes, i, i + 1, axis=1) for i in (axis, axis + 2))
        inside = g.add('Div', g.add('Sub', pixel, low), g.add('Sub', high, low))
        cells = size_along(g, masks, 2 - axis)
        place = g.add('Mul', inside, g.add('Cast', cells, to=FLOAT))
        place = g.add('Unsqueeze', g.add('Sub', place, 0.5), [2])  # (R, length, 1)
        cell = g.add('Cast', g.add('Range', 0, g.add('Squeeze', cells), 1), to=FLOAT)
        distance = g.add('Abs', g.add('Sub', place, cell))
        weights.append(g.add('Max', g.add('Sub', 1.0, distance), 0.0))
    rows_, columns = weights
    columns = g.add('Transpose', columns, perm=[0, 2, 1])
    image = g.add('MatMul', g.add('MatMul', rows_, masks), columns)
    return g.add('Cast', g.add('GreaterOrEqual', image, float(threshold)), to=BOOL)
