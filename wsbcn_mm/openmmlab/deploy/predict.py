"""From files of images or videos to predictions and pictures of them, one after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from PIL import ImageColor

from wsbcn_mm.openmmlab.config import scope_of
from wsbcn_mm.openmmlab.deploy import labels
from wsbcn_mm.openmmlab.deploy.classes import classes_of
from wsbcn_mm.openmmlab.deploy.inputs import Reader


class Predictor:
    """A model with what is needed before and after it.

    Args:
        cfg: The config.
        model: In evaluation mode, folded or not.
    """

    def __init__(self, cfg: Config, model: Any) -> None:
        self.model = model
        self.gives_labels = scope_of(cfg) in labels.SCOPES
        self.meta = classes_of(cfg, model, required=not self.gives_labels)
        self._read = Reader(cfg)
        if self.gives_labels:
            return
        scope = scope_of(cfg)
        kind = 'mmdet.DetLocalVisualizer' if scope == 'mmdet' else 'mmseg.SegLocalVisualizer'
        if scope == 'mmseg' and not self.meta.get('palette'):
            self.meta['palette'] = _colours(len(self.meta['classes']))
        if isinstance(self.meta.get('palette'), (list, tuple)):
            self.meta['palette'] = [
                ImageColor.getrgb(colour) if isinstance(colour, str) else colour
                for colour in self.meta['palette']
            ]
        look = {k: v for k, v in (cfg.get('visualizer') or {}).items() if k == 'alpha'}
        self._visualizer = VISUALIZERS.build(
            dict(type=kind, name='wsbcn_mm_infer', vis_backends=None, **look)
        )
        palette = self.meta.get('palette') or 'random'
        self._visualizer.dataset_meta = {**self.meta, 'palette': palette}

    @torch.no_grad()
    def __call__(self, path: str | Path) -> tuple[np.ndarray, Any]:
        """An image file as it was loaded, and its data sample: predictions in its pixels.

        Raises:
            DataError: this is no readable image.
            ValueError: the model predicts what cannot be written here.
        """
        image, batch = self._read(path)
        sample = self.model.test_step(batch)[0].cpu()
        if not any(name in sample for name in ('pred_instances', 'pred_sem_seg', 'pred_score')):
            found = [name for name, _ in sample.items() if name.startswith('pred_')]
            raise ValueError(
                f'the model predicts {", ".join(found) or "nothing"}, and boxes, masks, '
                'class maps and scores of classes are what is written here\n  panoptic results: '
                'tools/test.py with --cfg-options test_evaluator.outfile_prefix=DIR/panoptic '
                "writes COCO's format"
            )
        if 'labels' in sample.get('pred_instances', ()):  # CrowdDet gives numbers with a point
            sample.pred_instances.labels = sample.pred_instances.labels.long()
        return image, sample

    def draw(self, image: np.ndarray, sample: Any, path: Path, threshold: float) -> None:
        """A picture of the predictions on the image as it was loaded."""
        if self.gives_labels:
            frames = image if image.ndim == 4 else displayable(image)[None]
            found = labels.best(sample, self.meta['classes'], 3)
            labels.draw(frames, [f'{e["class"]}  {e["score"]:.2f}' for e in found], path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = dict(pred_score_thr=threshold) if 'pred_instances' in sample else {}
        self._visualizer.add_datasample(
            path.name,
            displayable(image),
            sample,
            draw_gt=False,
            out_file=str(path),
            **scores,
        )


def _colours(number: int) -> list[list[int]]:
    """Those that mmsegmentation's data sets give to classes without any."""
    return np.random.RandomState(42).randint(0, 255, size=(number, 3)).tolist()


def displayable(image: np.ndarray) -> np.ndarray:
    """Any loaded image (H, W) or (H, W, C) as 8-bit RGB; more than 8 bits by the largest value."""
    image = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8:
        values = np.nan_to_num(image.astype(np.float64)).clip(0)
        image = (values * (255 / max(values.max(initial=0), 255))).astype(np.uint8)
    image = image[..., [2, 1, 0]] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
    return np.ascontiguousarray(image)
