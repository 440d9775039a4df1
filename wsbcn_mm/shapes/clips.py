"""Clips in which how a shape moves is the class: no single frame tells.

A light shape on a darker ground goes left, right, up or down, turns clockwise or counter-clockwise,
grows or shrinks, seen by a camera and in a light of the clip's own. Place, angle and size in a
frame taken at random are distributed alike in all classes, and of each pair of classes one is the
other played backwards: whoever sees one frame can only guess, one in eight.

Layout below the root, in MMAction2's formats::

    ROOT/clips.json                            stamp: format version and parameters
    ROOT/{train,val}_videos.txt                lines "train/000000.mp4 LABEL"
    ROOT/{train,val}_frames.txt                lines "train/000000 FRAMES LABEL"
    ROOT/videos/{train,val}/%06d.mp4
    ROOT/frames/{train,val}/%06d/img_%05d.jpg  counted from 1

From the shell::

    python -m wsbcn_mm.shapes --clips data/clips
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wsbcn_mm.shapes.arguments import Sample, Stamp
from wsbcn_mm.shapes.draw import (
    clip_window,
    log_uniform,
    mix,
    photograph,
    rasterise,
    rotate,
    unit_outline,
)
from wsbcn_mm.shapes.files import jpeg_bytes
from wsbcn_mm.shapes.folder import draw_once

MOTIONS = (
    *('left', 'right', 'up', 'down'),
    *('clockwise', 'counter-clockwise', 'growing', 'shrinking'),
)
"""Class names; a label is an index into them."""

FRAMES = 16
VERSION = 2
NUM_TRAIN, NUM_VAL = 480, 160
SIZE = (64, 64)
STAMP = 'clips.json'

_MOVERS = ('rectangle', 'triangle', 'cross')  # those that are seen to turn, in a few pixels too
_PATH = 0.35  # of the shorter side: how far a shape goes to either side of the middle of its way
_TURN = 1.3  # radians, likewise; less than half a symmetry of any of them per sampled frame
_GROWTH = 0.55  # logarithm of the size, likewise
_SIZE = (0.17, 0.22)  # half of a shape's side in the middle of its growth, of the shorter side


def draw_clip(
    split: str, index: int, size: Sequence[int] = SIZE, seed: int = 0
) -> tuple[np.ndarray, int]:
    """Draws one clip.

    The same arguments always give the same clip, however many the data set has.

    Args:
        split: 'train' or 'val'.
        index: Number of the clip in its split, from 0.
        size: Width and height in pixels, each at least 48.
        seed: Seed of the data set, at least 0.

    Returns:
        Frames as uint8 RGB of shape (16, height, width, 3), before compression, and the label, an
        index into `MOTIONS`.

    Raises:
        ValueError: An argument is out of its range.
    """
    sample = Sample.checked(split, index, size, seed)
    width, height = sample.size
    rng = sample.random(FRAMES)
    label = sample.index % len(MOTIONS)
    scene = _ground(width, height, rng)
    outline = unit_outline(_MOVERS[rng.integers(len(_MOVERS))], rng)
    colour = np.clip(scene.mean((0, 1)) + rng.uniform(0.5, 0.7, 3), 0, 1)
    camera = int(rng.integers(2**32))
    frames = [
        photograph(_with_object(scene, corners, colour), np.random.default_rng(camera))
        for corners in path_of(outline, label, width, height, rng)
    ]
    return np.stack(frames), label


def _ground(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A dark colour that slowly becomes another, (H, W, 3)."""
    first = rng.uniform(0.02, 0.3, 3)
    second = np.clip(first + rng.uniform(-0.08, 0.08, 3), 0, 1)
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)[:, None]
    share = np.clip(0.5 + np.cos(angle) * x + np.sin(angle) * y, 0, 1)
    return first + (second - first) * share[..., None]


def path_of(
    outline: np.ndarray, label: int, width: int, height: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The corners of the shape in each frame.

    Place, angle and size lie somewhere on their ways in every clip. The class' own one of them
    goes along its way, from the one end to the other; the others stay where a frame taken at
    random would find them if they moved.
    """
    motion = MOTIONS[label]
    ends = np.linspace(-1, 1, FRAMES)
    values = {
        name: np.full(FRAMES, rng.choice(ends) * rng.uniform(0.75, 1))
        for name in ('x', 'y', 'angle', 'size')
    }
    own = ('x', 'y', 'angle', 'size')[label // 2]
    forwards = motion in ('right', 'down', 'clockwise', 'growing')
    values[own] = ends * rng.uniform(0.75, 1) * (1 if forwards else -1)
    short = min(width, height)
    middle = np.array((width, height)) / 2
    start, scale = rng.uniform(0, 2 * np.pi), log_uniform(rng, *_SIZE) * short
    corners = []
    for right, down, angle, size in zip(*(values[name] for name in ('x', 'y', 'angle', 'size'))):
        # y points down: a negative angle of `rotate`'s is seen as clockwise.
        x, y = outline.T * scale * np.exp(_GROWTH * size)
        x, y = rotate(x, y, start - _TURN * angle)
        place = middle + _PATH * short * np.array((right, down))
        corners.append(np.stack([x, y], axis=1) + place)
    return corners


def _with_object(scene: np.ndarray, corners: np.ndarray, colour: np.ndarray) -> np.ndarray:
    height, width = scene.shape[:2]
    frame = scene.copy()
    window, coverage = clip_window(*rasterise(corners), width, height)
    frame[window] = mix(frame[window], np.broadcast_to(colour, frame[window].shape), coverage)
    return frame


# ----------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------
def draw_clips(
    root: str | os.PathLike[str] = 'data/clips',
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    size: Sequence[int] = SIZE,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draws the clips, unless they are there already.

    Several processes may call this at once, see `wsbcn_mm.shapes.folder.draw_once`. Needs OpenCV,
    which mmcv brings.

    Args:
        root: Folder of the data set. The module's docstring shows the layout below it.
        num_train: Number of clips for training, at least 1. The classes take turns.
        num_val: Number of clips for validation, at least 1.
        size: Width and height of the frames in pixels: the width at least 64 in steps of 16, the
            height at least 48 and even.
        seed: Seed of all clips, at least 0.
        progress: Called after each clip with the number of clips done and their total.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: An argument is out of its range; or `root` holds a data set with other
            parameters or of another version, or files which are none.
        OSError: The folder cannot be written.
    """
    stamp = Stamp.checked(('wsbcn_mm clips', VERSION), num_train, num_val, size, seed)
    width, height = stamp.size
    if width % 16 or width < 64 or height % 2:
        raise ValueError(
            'size must have a width of 64 or more in steps of 16, which decord can read, and an '
            f'even height, got {width} x {height}'
        )
    return draw_once(root, STAMP, stamp.json(), lambda folder: _write(folder, stamp, progress))


def _write(folder: Path, stamp: Stamp, progress: Callable[[int, int], None] | None) -> None:
    done = 0
    for split, count in stamp.counts.items():
        videos, frames = folder / 'videos' / split, folder / 'frames' / split
        videos.mkdir(parents=True)
        lines: dict[str, list[str]] = {'videos': [], 'frames': []}
        for index in range(count):
            name = f'{index:06d}'
            clip, label = draw_clip(split, index, stamp.size, stamp.seed)
            write_video(videos / f'{name}.mp4', clip)
            (frames / name).mkdir(parents=True)
            for number, frame in enumerate(clip, 1):
                (frames / name / f'img_{number:05d}.jpg').write_bytes(jpeg_bytes(frame))
            lines['videos'].append(f'{split}/{name}.mp4 {label}\n')
            lines['frames'].append(f'{split}/{name} {len(clip)} {label}\n')
            done += 1
            if progress is not None:
                progress(done, sum(stamp.counts.values()))
        for kind, text in lines.items():
            (folder / f'{split}_{kind}.txt').write_text(''.join(text), encoding='utf-8')


def write_video(path: Path, frames: np.ndarray) -> None:
    """Writes frames, uint8 RGB (N, H, W, 3), as MPEG-4 at 8 frames a second."""
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), 8.0, frames.shape[2:0:-1])
    if not writer.isOpened():
        raise OSError(
            f'{path}: this OpenCV cannot write MPEG-4 videos\n  pip install opencv-python'
        )
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
