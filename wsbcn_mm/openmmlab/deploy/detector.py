"""A detector as one ONNX graph: image in; boxes, scores, labels and masks out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from mmdet.models.detectors import TwoStageDetector
from torch import Tensor

from wsbcn_mm.openmmlab.deploy import boxes, heads
from wsbcn_mm.openmmlab.deploy.graph import BOOL, FLOAT, INT, UINT8, Graph
from wsbcn_mm.openmmlab.deploy.inference import channels_of
from wsbcn_mm.openmmlab.deploy.onnx import NotExportable, export_part, with_metadata
from wsbcn_mm.openmmlab.deploy.parts import tensor_parts

IMAGE, SCALE, SIZE = 'image', 'scale_factor', 'original_size'  # inputs
KINDS: dict[str, tuple[int, list[int | str]]] = {
    'boxes': (FLOAT, ['n', 4]),
    'scores': (FLOAT, ['n']),
    'labels': (INT, ['n']),
    'masks': (BOOL, ['n', 'original_height', 'original_width']),
}


def export_detector(
    model: Any, image: Tensor, path: str | Path, opset: int = 18, metadata: dict | None = None
) -> None:
    """Writes a folded detector as one file.

    ===================== ==================== ===================================================
    input                 type and shape
    ===================== ==================== ===================================================
    ``image``             uint8 (H, W, C)      resized, and padded where the test pipeline does
                                               that; channels as there (BGR); not normalised
    ``scale_factor``      float32 (2,)         width and height after resizing by those before
    ``original_size``     int64 (2,)           height and width before; only where there are masks
    ===================== ==================== ===================================================

    Outputs, in pixels of the original image, by falling score: ``boxes`` (N, 4) float32, corners;
    ``scores`` (N,) float32; ``labels`` (N,) int64; ``masks`` (N, height, width) bool where the
    model has a mask head. H, W and N are open.

    Args:
        model: A two-stage detector with the standard RoI head, or one with a dense head that
            predicts as MMDetection's base class does (RetinaNet, FCOS, ATSS, RTMDet).
        image: What `inference.preprocess` returns.
        path: The file.
        opset: At least 18.
        metadata: As in `export_part`.

    Raises:
        NotExportable: the model predicts in a way that is not written here; names it.
    """
    if opset < 18:
        raise NotExportable(f'a whole detector needs opset 18 or newer\n  got {opset}')
    heads.refuse_what_differs(model)
    g = Graph(opset)
    picture = g.takes(IMAGE, UINT8, ['height', 'width', channels_of(model)])
    factors = g.takes(SCALE, FLOAT, [2])
    scale = g.add('Concat', factors, factors, axis=0)
    shape = boxes.part(g, g.add('Shape', picture), 0, 2, axis=0)
    limits = heads.around(g, shape)
    parts = {part.name: part for part in tensor_parts(model, image)}

    def network(name: str, value: str) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'part.onnx'
            export_part(parts[name], file, opset, dynamic=True)
            exported = onnx.load(str(file))
        return g.inline(exported, name, {parts[name].input_name: value})

    out = network('image', heads.normalised(g, model.data_preprocessor, picture, shape))
    if not isinstance(model, TwoStageDetector):
        found = heads.dense(g, model.bbox_head, out, limits, scale)
    else:
        size = g.takes(SIZE, INT, [2]) if model.with_mask else None
        found = heads.two_stages(g, model, network, out, limits, scale, size)
    for name, value in found.items():
        g.gives(name, value, *KINDS[name])
    onnx.save(with_metadata(g.model(), metadata or {}), str(path))


# ---- the check ---------------------------------------------------------------------------------

BOX_TOLERANCE = 1e-3  # of the longer side of the image
SCORE_TOLERANCE = 1e-3
MASK_TOLERANCE = 1e-2  # of a mask's pixels, or 4 pixels of a small one


@torch.no_grad()
def check_detector(session: Any, model: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Runs a file and the model on one image; both must find the same.

    A detection whose score is within `SCORE_TOLERANCE` of the threshold, or of the last place that
    is given, may be there in one of them alone.

    Args:
        session: Of onnxruntime.
        model: In evaluation mode.
        batch: For ``test_step``, as a data loader gives it.

    Returns:
        The largest difference of ``boxes`` (pixels), ``scores``, ``masks`` (share of a mask's
        pixels), and the number of detections ``found``.

    Raises:
        NotExportable: they do not find the same.
    """
    picture = batch['inputs'][0].permute(1, 2, 0).contiguous().numpy()
    meta = batch['data_samples'][0]
    height, width = meta.ori_shape[:2]
    fed = {
        IMAGE: picture,
        SCALE: np.array(meta.scale_factor[:2], np.float32),
        SIZE: np.array([height, width], np.int64),
    }
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {i.name: fed[i.name] for i in session.get_inputs()})
    wanted = model.test_step(batch)[0].pred_instances.numpy()
    settings = model.roi_head.test_cfg if hasattr(model, 'roi_head') else model.bbox_head.test_cfg
    least = settings.get('score_thr', 0)
    for scores in (wanted.scores, values[names.index('scores')]):
        if len(scores) == settings.max_per_img:
            least = max(least, float(scores.min()))
    return _compared(dict(zip(names, values)), wanted, least, max(height, width))


def report(results: Mapping[str, Mapping[str, float]]) -> str:
    """What `check_detector` returned, by image, in words."""
    lines = [
        f'{name}: {found["found"]:.0f} found; largest differences: boxes {found["boxes"]:.2g} '
        f'pixels, scores {found["scores"]:.2g}, masks {found["masks"]:.2g} of their pixels'
        for name, found in results.items()
    ]
    if not any(found['found'] for found in results.values()):
        lines.append(
            'neither finds anything there, which compares little: --images with objects that the '
            'model finds compare more'
        )
    return '\n'.join(lines)


def _compared(
    found: dict[str, np.ndarray], wanted: Any, least: float, side: int
) -> dict[str, float]:
    worst = dict(boxes=0.0, scores=0.0, masks=0.0, found=float(len(wanted.scores)))
    free = list(range(len(found['scores'])))
    for i, (box, score, label) in enumerate(zip(wanted.bboxes, wanted.scores, wanted.labels)):
        near = [j for j in free if found['labels'][j] == label]
        away = [float(np.abs(found['boxes'][j] - box).max()) for j in near]
        apart = [abs(float(found['scores'][j] - score)) for j in near]
        fits = [
            (away[k], j, apart[k])
            for k, j in enumerate(near)
            if away[k] <= BOX_TOLERANCE * side and apart[k] <= SCORE_TOLERANCE
        ]
        if not fits:
            _refuse_missing('the model', 'the file does not', score, label, box, least)
            continue
        distance, j, difference = min(fits)
        free.remove(j)
        worst['boxes'] = max(worst['boxes'], distance)
        worst['scores'] = max(worst['scores'], difference)
        if 'masks' in found:
            worst['masks'] = max(worst['masks'], _other_pixels(found['masks'][j], wanted.masks[i]))
    for j in free:
        score, label, box = (found[name][j] for name in ('scores', 'labels', 'boxes'))
        _refuse_missing('the file', 'the model does not', score, label, box, least)
    return worst


def _refuse_missing(
    who: str, other: str, score: float, label: int, box: Sequence[float], least: float
) -> None:
    if score > least + SCORE_TOLERANCE:
        corners = ', '.join(f'{value:.1f}' for value in box)
        raise NotExportable(
            f'{who} finds class {label} with score {score:.4f} at ({corners}), and {other}'
        )


def _other_pixels(mask: np.ndarray, wanted: np.ndarray) -> float:
    other, size = int((mask != wanted).sum()), int(wanted.sum())
    if other > max(4, MASK_TOLERANCE * size):
        raise NotExportable(f'{other} pixels of a mask of {size} differ')
    return other / max(size, 1)
