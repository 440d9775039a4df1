"""Videos of MMAction2: what a clip of a config is, and how its pipeline reads one from a file."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor

from wsbcn_mm.openmmlab.config import type_name
from wsbcn_mm.openmmlab.loaders import datasets_of

SUFFIXES = ('.mp4', '.avi', '.mkv', '.mov', '.webm', '.mpg', '.mpeg', '.wmv', '.m4v')
DEFAULT_FRAMES = 8  # where neither the test data nor the backbone say it


def num_frames(cfg: Config) -> int:
    """Frames that a network takes at once: of all segments in 2d networks, of a clip in 3d ones."""
    for loader in ('test_dataloader', 'val_dataloader'):
        for _, dataset in datasets_of(cfg, loader):
            for step in dataset.get('pipeline') or []:
                if type_name(step).endswith('SampleFrames') and 'clip_len' in step:
                    clips = step.get('num_clips', 1) if is_2d(cfg) else 1
                    return step['clip_len'] * clips
    return cfg.model.get('backbone', {}).get('num_segments', DEFAULT_FRAMES)


def is_2d(cfg: Config) -> bool:
    """Whether the frames of a clip are put to the batch."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    return preprocessor.get('format_shape', 'NCHW') == 'NCHW'


def inputs_of(cfg: Config, image: np.ndarray) -> Tensor:
    """What a data loader gives for one clip: (T, C, H, W), in 3d networks (1, C, T, H, W).

    Args:
        cfg: The config.
        image: Frames (T, H, W, C), or one image (H, W, C), which then moves to the right.
    """
    count = num_frames(cfg)
    if image.ndim == 3:
        frames = np.stack([np.roll(image, 4 * t, axis=1) for t in range(count)])
    else:
        frames = image[np.linspace(0, len(image) - 1, count).round().astype(int)]
    tensor = torch.from_numpy(np.ascontiguousarray(frames))
    return tensor.permute(0, 3, 1, 2) if is_2d(cfg) else tensor.permute(3, 0, 1, 2)[None]


def info_of(path: Path | str) -> dict[str, Any]:
    """What MMAction2's data sets say about a video."""
    return dict(filename=str(path), label=-1, start_index=0, modality='RGB')


def reading_steps(pipeline: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    """A test pipeline in two: up to the frames as they are in the file, and what comes then.

    One that reads folders of frames reads videos instead.

    Raises:
        ValueError: it does not decode frames.
    """
    steps = [copy.deepcopy(step) for step in pipeline]
    names = [type_name(step) for step in steps]
    decode = next((i for i, name in enumerate(names) if name.endswith('Decode')), None)
    if decode is None or not any(name.endswith('SampleFrames') for name in names):
        raise ValueError(
            'the test pipeline must sample and decode the frames of a video\n  got '
            + ', '.join(names)
        )
    if names[decode] == 'RawFrameDecode':
        steps[decode] = dict(type='OpenCVDecode')
        steps.insert(0, dict(type='OpenCVInit'))
        decode += 1
    return steps[: decode + 1], steps[decode + 1 :]
