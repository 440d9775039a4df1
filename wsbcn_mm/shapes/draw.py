"""One image of the data set: background, clutter, objects with their masks, and the camera."""

import colorsys
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from wsbcn_mm.shapes.arguments import Sample

CLASSES = ('ellipse', 'rectangle', 'triangle', 'star', 'cross')
"""Class names. A class id counts from 0 here, from 1 in the COCO files and in the VOC masks."""

MIN_VISIBLE_SHARE = 0.55
"""Every drawn object shows at least this share of its area, which counts what the image cuts."""

MIN_VISIBLE_PIXELS = 60
"""Every drawn object shows at least this many pixels."""

# Real data has images without any object, and they are a classic cause of crashes. A fixed rhythm
# rather than chance: also a tiny data set has some (images 1, 40, 79, ...).
EMPTY_EVERY = 39
EMPTY_OFFSET = 1

_MIN_OBJECTS, _MAX_OBJECTS = 4, 8
_PLACEMENT_TRIES = 40
_MIN_INSIDE_SHARE = 0.6  # of a new object: the image's border hides more of a shape than a cover
_LONG_SIDE = (32.0, 96.0)
_SUPERSAMPLING = 3

_BACKGROUNDS = ('plain', 'gradient', 'noise', 'blobs', 'stripes')
_TEXTURES = ('plain', 'gradient', 'noise', 'stripes', 'checkers', 'spots')
# As in nature, texture and colour tell something about the class, but not all: most objects wear
# those of their class (in the order of CLASSES), the others any. Light and colour cast of the image
# come on top, so that a colour means little without its surroundings.
_OWN_TEXTURES = ('spots', 'checkers', 'stripes', 'plain', 'noise')
_OWN_TEXTURE_SHARE = 0.85
_OWN_COLOUR_SHARE = 0.95

Instances = list[tuple[int, np.ndarray]]
Window = tuple[slice, slice]


# ----------------------------------------------------------------------------------------------
# Random helpers and coordinates
# ----------------------------------------------------------------------------------------------
def log_uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None) -> Any:
    """A number; with ``size`` an array of them."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _random_colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.06, 0.94, 3)


@functools.lru_cache(maxsize=8)
def _pixel_grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns x (1, W) and y (H, 1) of the pixel centres; cached, hence read-only."""
    x = np.arange(width)[None, :] + 0.5
    y = np.arange(height)[:, None] + 0.5
    x.flags.writeable = y.flags.writeable = False
    return x, y


def rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


# ----------------------------------------------------------------------------------------------
# Textures: maps of values in [0, 1] which mix two colours
# ----------------------------------------------------------------------------------------------
def _value_noise(
    u: np.ndarray, v: np.ndarray, period: float, rng: np.random.Generator
) -> np.ndarray:
    """Smooth noise: random values on a lattice of `period` pixels, interpolated between."""
    u, v = (u - u.min()) / period, (v - v.min()) / period
    column, row = np.floor(u).astype(int), np.floor(v).astype(int)
    lattice = rng.random((row.max() + 2, column.max() + 2))
    fu, fv = u - column, v - row
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    top = lattice[row, column] * (1 - fu) + lattice[row, column + 1] * fu
    bottom = lattice[row + 1, column] * (1 - fu) + lattice[row + 1, column + 1] * fu
    return top * (1 - fv) + bottom * fv


def _texture(
    kind: str, x: np.ndarray, y: np.ndarray, period: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws one texture at a random angle.

    Args:
        kind: One of `_BACKGROUNDS` or `_TEXTURES`.
        x: Pixel coordinates, (1, W).
        y: Pixel coordinates, (H, 1).
        period: Length in pixels over which the texture repeats or changes.
        rng: Random numbers.

    Returns:
        Values in [0, 1], (H, W).
    """
    u, v = rotate(x, y, rng.uniform(0, 2 * np.pi))
    if kind == 'plain':
        return np.zeros_like(u)
    if kind == 'gradient':
        return (u - u.min()) / (u.max() - u.min())
    if kind == 'noise':
        return _value_noise(u, v, period, rng)
    if kind == 'blobs':
        return np.clip(0.5 + 1.8 * (_value_noise(u, v, period, rng) - 0.5), 0, 1)
    phase_u, phase_v = rng.uniform(0, 2 * np.pi, 2)
    wave_u = np.sin(u * (2 * np.pi / period) + phase_u)
    if kind == 'stripes':
        return np.clip(0.5 + wave_u, 0, 1)
    wave_v = np.sin(v * (2 * np.pi / period) + phase_v)
    if kind == 'checkers':
        return np.clip(0.5 + 2 * wave_u * wave_v, 0, 1)
    return np.clip(0.5 + 2 * (wave_u + wave_v - 0.6), 0, 1)  # spots


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first + (second - first) * share[..., None]


# ----------------------------------------------------------------------------------------------
# Background and clutter
# ----------------------------------------------------------------------------------------------
def background(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a textured background without hard edged areas, float (H, W, 3) in [0, 1].

    Its textures are soft or cross the whole image, so none of them can pass for an object.
    """
    x, y = _pixel_grid(width, height)
    first = _random_colour(rng)
    first = first.mean() + rng.uniform(0.1, 0.6) * (first - first.mean())
    kind = _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))]
    # Stripes are sharp: in full contrast they would hide objects better than nature does.
    spread = 0.3 if kind == 'stripes' else 0.5
    second = np.clip(first + rng.uniform(-spread, spread, 3), 0.03, 0.97)
    period = log_uniform(rng, 12, 50)
    canvas = mix(first, second, _texture(kind, x, y, period, rng))
    grain = _texture('noise', x, y, log_uniform(rng, 2.5, 9), rng) - 0.5
    canvas += rng.uniform(0.02, 0.14) * grain[..., None]
    return np.clip(canvas, 0, 1)


def _random_stroke(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the points (N, 2) of one distractor: a dot, a line, an arc or a squiggle."""
    start = rng.uniform(0, 1, 2) * (width, height)
    kind = rng.integers(4)
    if kind == 0:
        return start[None]
    length = log_uniform(rng, 8, 34)
    along = np.linspace(-0.5, 0.5, 24)
    if kind == 1:
        across = np.zeros_like(along)
    elif kind == 2:
        across = rng.uniform(0.3, 1.4) * along**2
    else:
        across = 0.12 * np.sin(along * rng.uniform(9, 16) + rng.uniform(0, 6))
    points = np.stack(rotate(along * length, across * length, rng.uniform(0, 2 * np.pi)), axis=1)
    return start + points


def _paint_stroke(
    canvas: np.ndarray, points: np.ndarray, radius: float, colour: np.ndarray
) -> None:
    """Paints all pixels within `radius` pixels of the points, with soft edges."""
    height, width = canvas.shape[:2]
    x, y = _pixel_grid(width, height)
    left, top = np.maximum(np.floor(points.min(axis=0) - radius - 1).astype(int), 0)
    right, bottom = np.maximum(np.ceil(points.max(axis=0) + radius + 1).astype(int), 0)
    window = canvas[top:bottom, left:right]
    if window.size == 0:
        return
    dx = x[:, left:right, None] - points[:, 0]
    dy = y[top:bottom, :, None] - points[:, 1]
    distance = np.sqrt((dx * dx + dy * dy).min(axis=2))
    window[:] = mix(window, colour, np.clip(radius + 0.5 - distance, 0, 1))


def paint_clutter(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Paints distractors that belong to no class: all of them are thin or tiny."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(0, 15)):
        points = _random_stroke(width, height, rng)
        radius = rng.uniform(0.9, 2.2) if len(points) == 1 else rng.uniform(0.5, 1.1)
        _paint_stroke(canvas, points, radius, _random_colour(rng))


# ----------------------------------------------------------------------------------------------
# Objects
# ----------------------------------------------------------------------------------------------
def _regular_points(count: int) -> np.ndarray:
    angle = np.arange(count) * (2 * np.pi / count)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def unit_outline(name: str, rng: np.random.Generator) -> np.ndarray:
    """Returns the corners (N, 2) of a random member of a class, with half axes of about 1."""
    if name == 'ellipse':
        return _regular_points(64) * (1, rng.uniform(0.5, 1))
    if name == 'rectangle':
        return np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * (0.9, rng.uniform(0.4, 0.9))
    if name == 'triangle':
        tip = (rng.uniform(-0.45, 0.45), 1.0)
        return np.array([tip, (-1, -0.75), (1, -0.75)]) * (1, rng.uniform(0.7, 1))
    if name == 'star':
        points = _regular_points(10)
        points[1::2] *= rng.uniform(0.38, 0.5)
        return points * (1, rng.uniform(0.8, 1))
    if name == 'cross':
        arm = rng.uniform(0.22, 0.36)
        quarter = np.array([(1, -arm), (1, arm), (arm, arm)])
        turned = [
            np.stack(rotate(quarter[:, 0], quarter[:, 1], -k * np.pi / 2), axis=1) for k in range(4)
        ]
        return np.concatenate(turned) * (1, rng.uniform(0.75, 1))
    raise ValueError(f'no outline for the class {name!r}; the classes are {CLASSES}')


def random_outline(class_id: int, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the corners (N, 2), in pixels, of a random object of the class."""
    short = min(width, height)
    low, high = _LONG_SIDE
    long_side = log_uniform(rng, min(low, 0.3 * short), min(high, 0.6 * short))
    corners = unit_outline(CLASSES[class_id], rng) * (long_side / 2)
    x, y = corners.T
    corners = np.stack(rotate(x, y, rng.uniform(0, 2 * np.pi)), axis=1)
    return corners + rng.uniform(0, 1, 2) * (width, height)


def _inside(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd rule: bool (H, W), whether the points x (1, W), y (H, 1) are in the polygon."""
    inside = np.zeros((y.shape[0], x.shape[1]), bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        rows = np.flatnonzero((y1 > y[:, 0]) != (y2 > y[:, 0]))
        crossing = x1 + (y[rows] - y1) * ((x2 - x1) / (y2 - y1))
        inside[rows] ^= x < crossing
    return inside


def rasterise(corners: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Rasterises a polygon, including the parts outside the image.

    Args:
        corners: (N, 2) in pixels.

    Returns:
        Left and top pixel of the polygon's bounding window, and for every pixel of this window
        the covered share in [0, 1].
    """
    left, top = np.floor(corners.min(axis=0)).astype(int)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int)
    k = _SUPERSAMPLING
    columns, rows = right - left, bottom - top
    x = left + (np.arange(columns * k)[None, :] + 0.5) / k
    y = top + (np.arange(rows * k)[:, None] + 0.5) / k
    fine = _inside(corners, x, y).reshape(rows, k, columns, k)
    return int(left), int(top), fine.mean(axis=(1, 3))


def clip_window(
    left: int, top: int, coverage: np.ndarray, width: int, height: int
) -> tuple[Window, np.ndarray]:
    """Returns the part of a window that is inside the image, as slices, and its coverage."""
    rows, columns = coverage.shape
    x1, x2 = min(max(left, 0), width), min(max(left + columns, 0), width)
    y1, y2 = min(max(top, 0), height), min(max(top + rows, 0), height)
    return np.s_[y1:y2, x1:x2], coverage[y1 - top : y2 - top, x1 - left : x2 - left]


def _visible_enough(visible: int, full: int) -> bool:
    return visible >= MIN_VISIBLE_PIXELS and visible >= MIN_VISIBLE_SHARE * full


def _class_colour(class_id: int, rng: np.random.Generator) -> np.ndarray:
    """A colour around the hue of the class; the hues lie evenly on the colour circle."""
    hue = (class_id / len(CLASSES) + rng.uniform(-0.06, 0.06)) % 1
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.65, 1), rng.uniform(0.45, 1)))


def _contrasting_colours(
    class_id: int, local: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an object's two colours, mostly well off the colour `local` of what it covers."""
    wanted = 0.55 if rng.random() < 0.9 else 0.3
    own = rng.random() < _OWN_COLOUR_SHARE
    first = max(
        (_class_colour(class_id, rng) if own else _random_colour(rng) for _ in range(6)),
        key=lambda colour: min(np.linalg.norm(colour - local), wanted),
    )
    # The texture's second colour is a darker or a paler first one.
    second = first * rng.uniform(0.3, 0.6) if rng.random() < 0.5 else 1 - 0.5 * (1 - first)
    return first, second


def paint_object(
    canvas: np.ndarray,
    window: Window,
    coverage: np.ndarray,
    class_id: int,
    rng: np.random.Generator,
) -> None:
    """Paints one textured object."""
    height, width = canvas.shape[:2]
    x, y = _pixel_grid(width, height)
    area = canvas[window]
    local = area[coverage > 0.5].mean(axis=0)
    first, second = _contrasting_colours(class_id, local, rng)
    kind = _TEXTURES[rng.integers(len(_TEXTURES))]
    if rng.random() < _OWN_TEXTURE_SHARE:
        kind = _OWN_TEXTURES[class_id]
    period = log_uniform(rng, 5, 14)
    share = _texture(kind, x[:, window[1]], y[window[0]], period, rng)
    area[:] = mix(area, mix(first, second, share), coverage)


def _place_objects(canvas: np.ndarray, count: int, rng: np.random.Generator) -> Instances:
    """Paints up to `count` objects, later ones over earlier ones.

    A placement that would leave any object (the new one or an earlier one) with too little to
    see is drawn anew before anything is painted. So every painted object stays annotated.
    """
    height, width = canvas.shape[:2]
    instances: Instances = []
    full_areas: list[int] = []
    for _ in range(count):
        for _ in range(_PLACEMENT_TRIES):
            class_id = int(rng.integers(len(CLASSES)))
            left, top, whole = rasterise(random_outline(class_id, width, height, rng))
            window, coverage = clip_window(left, top, whole, width, height)
            covers = coverage > 0.5
            full = int((whole > 0.5).sum())
            if covers.sum() < max(MIN_VISIBLE_PIXELS, _MIN_INSIDE_SHARE * full):
                continue
            left_over = [mask.sum() - (mask[window] & covers).sum() for _, mask in instances]
            if not all(map(_visible_enough, left_over, full_areas)):
                continue
            for _, mask in instances:
                mask[window] &= ~covers
            mask = np.zeros((height, width), bool)
            mask[window] = covers
            instances.append((class_id, mask))
            full_areas.append(full)
            paint_object(canvas, window, coverage, class_id, rng)
            break
    return instances


# ----------------------------------------------------------------------------------------------
# Camera: what makes whole images differ
# ----------------------------------------------------------------------------------------------
def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with a window of 7 pixels; `sigma` in pixels."""
    radius = 3
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = np.pad(image, pad, mode='edge')
        length = image.shape[axis]
        image = sum(
            weight * np.take(padded, np.arange(i, i + length), axis=axis)
            for i, weight in enumerate(kernel)
        )
    return image


def photograph(scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the scene as a random camera in random light sees it, uint8 (H, W, 3).

    Gain, contrast, gamma, cast, blur and noise are drawn once an image and range widely, so that
    the mean and the spread of one image say little about those of another.
    """
    contrast = log_uniform(rng, 0.7, 1.6)
    gamma = log_uniform(rng, 0.7, 1.4)
    gain = log_uniform(rng, 0.35, 1.6) * log_uniform(rng, 0.8, 1.25, 3)
    mean = scene.mean()
    image = np.clip(mean + contrast * (scene - mean), 0, None) ** gamma * gain
    if rng.random() < 0.5:
        image = _blur(image, rng.uniform(0.4, 1.0))
    # A dark image needs less noise than a bright one, else its objects would drown in it.
    noise = log_uniform(rng, 0.004, 0.035) * (0.3 + image.mean())
    image = np.clip(image + noise * rng.standard_normal(image.shape), 0, None)
    # A soft shoulder instead of a hard clip: bright images keep their objects visible.
    image = image / (1 + image**3) ** (1 / 3)
    return np.rint(image * 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------
# Public: one image
# ----------------------------------------------------------------------------------------------
def draw_image(
    split: str, index: int, size: Sequence[int] = (192, 160), seed: int = 0
) -> tuple[np.ndarray, Instances]:
    """Draws one image of the data set.

    The same arguments always give the same image, however many images the data set has.

    Args:
        split: 'train' or 'val'.
        index: Number of the image in its split, from 0.
        size: Width and height in pixels, each at least 48.
        seed: Seed of the data set, at least 0.

    Returns:
        The image as uint8 RGB of shape (height, width, 3), before JPEG compression, and its
        instances in the order of painting: pairs of the class id (index into `CLASSES`) and the
        visible pixels as bool of shape (height, width). The masks do not overlap. About one
        image in 39 has no instance.

    Raises:
        ValueError: An argument is out of its range.
    """
    sample = Sample.checked(split, index, size, seed)
    width, height = sample.size
    rng = sample.random()
    canvas = background(width, height, rng)
    paint_clutter(canvas, rng)
    count = int(rng.integers(_MIN_OBJECTS, _MAX_OBJECTS + 1))
    if sample.index % EMPTY_EVERY == EMPTY_OFFSET:
        count = 0
    instances = _place_objects(canvas, count, rng)
    return photograph(canvas, rng), instances
