"""What MMDetection's heads predict, in an ONNX graph; refused by name where a head differs.

The network is what torch exports; what stands between its parts (priors, decoding, selection,
non-maximum suppression, RoIAlign, masks in the image) is written here in standard operators, each
function as the method of MMDetection that it names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator, MlvlPointGenerator

from wsbcn_mm.openmmlab.deploy import boxes
from wsbcn_mm.openmmlab.deploy.graph import FLOAT, Graph
from wsbcn_mm.openmmlab.deploy.onnx import NotExportable

# Runs a part of the network, by name, on a value of the graph; its outputs by name.
Network = Callable[[str, str], dict[str, str]]


# ---- what can be written -----------------------------------------------------------------------


def refuse_what_differs(model: Any) -> None:
    """Raises `NotExportable` where a model does not predict as it is written here."""
    two = isinstance(model, TwoStageDetector)
    if not two and not isinstance(model, SingleStageDetector):
        _refuse(model, 'is neither a two-stage nor a dense detector')
    _same(model.data_preprocessor, DetDataPreprocessor, 'forward')
    dense = model.rpn_head if two else model.bbox_head
    if two:
        for method in ('_predict_by_feat_single', '_bbox_post_process'):
            _same(dense, RPNHead, method)
        _refuse_heads(model.roi_head)
    else:
        for method in ('predict', '_predict_by_feat_single', '_bbox_post_process'):
            _same(dense, BaseDenseHead, method)
        if dense.test_cfg.get('nms_pre', -1) <= 0:
            _refuse(dense, 'has no test_cfg.nms_pre')
        if getattr(dense.loss_cls, 'custom_cls_channels', False):
            _refuse(dense.loss_cls, 'has an activation of its own')
    _same(dense, BaseDenseHead, 'predict_by_feat')
    _refuse_coder(dense.bbox_coder)
    generator = dense.prior_generator
    if isinstance(generator, AnchorGenerator):
        _same(generator, AnchorGenerator, 'single_level_grid_priors')
    elif isinstance(generator, MlvlPointGenerator):
        _same(generator, MlvlPointGenerator, 'single_level_grid_priors')
    else:
        _refuse(generator, 'makes other priors')
    _refuse_nms(dense.test_cfg.nms)


def _refuse_heads(roi_head: Any) -> None:
    for method in ('predict', 'predict_bbox', '_bbox_forward'):
        _same(roi_head, StandardRoIHead, method)
    head, extractors = roi_head.bbox_head, [roi_head.bbox_roi_extractor]
    for method in ('predict_by_feat', '_predict_by_feat_single'):
        _same(head, BBoxHead, method)
    if head.custom_cls_channels or not head.with_reg:
        _refuse(head, 'has scores or boxes of its own')
    _refuse_coder(head.bbox_coder)
    _refuse_nms(roi_head.test_cfg.nms)
    if roi_head.with_mask:
        extractors.append(roi_head.mask_roi_extractor)
        for method in ('predict_by_feat', '_predict_by_feat_single'):
            _same(roi_head.mask_head, FCNMaskHead, method)
        for method in ('predict_mask', '_mask_forward'):
            _same(roi_head, StandardRoIHead, method)
        if roi_head.test_cfg.mask_thr_binary < 0:
            _refuse(roi_head.mask_head, 'is asked for masks of 0 to 255 (mask_thr_binary < 0)')
    for extractor in extractors:
        for method in ('forward', 'map_roi_levels'):
            _same(extractor, SingleRoIExtractor, method)
        for layer in extractor.roi_layers:
            if type(layer).__name__ != 'RoIAlign' or not layer.aligned:
                _refuse(layer, 'is no aligned RoIAlign')


def _refuse_coder(coder: Any) -> None:
    if type(coder) not in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder):
        _refuse(coder, 'decodes boxes in another way')
    if getattr(coder, 'add_ctr_clamp', False):
        _refuse(coder, 'limits how far centres move (add_ctr_clamp)')


def _refuse_nms(settings: Any) -> None:
    known = {'type', 'iou_threshold', 'class_agnostic', 'split_thr', 'max_num'}
    if settings is None or settings.get('type', 'nms') != 'nms' or not set(settings) <= known:
        _refuse(settings, 'is another non-maximum suppression')


def _same(module: Any, base: type, method: str) -> None:
    if getattr(type(module), method, None) is not getattr(base, method):
        _refuse(module, f'has another {method} than {base.__name__}')


def _refuse(thing: Any, why: str) -> NoReturn:
    name = dict(thing) if isinstance(thing, dict) else type(thing).__name__
    raise NotExportable(
        f'{name} {why}: boxes cannot be part of the graph\n  without --whole the network itself is '
        'exported, and boxes are left to the caller'
    )


# ---- before and between the heads -------------------------------------------------------------


def around(g: Graph, size: str) -> str:
    """A size (height, width) for the corners of boxes: (width, height, width, height) float32."""
    return g.add('Gather', g.add('Cast', size, to=FLOAT), [1, 0, 1, 0])


def normalised(g: Graph, settings: Any, picture: str, shape: str) -> str:
    """The picture (H, W, C) as the network takes it, (1, C, H', W'): ``DetDataPreprocessor``."""
    x = g.add('Transpose', g.add('Cast', picture, to=FLOAT), perm=[2, 0, 1])
    if settings._channel_conversion:
        x = g.add('Gather', x, [2, 1, 0], axis=0)
    if settings._enable_normalize:
        x = g.add('Sub', x, settings.mean.numpy())
        x = g.add('Div', x, settings.std.numpy())
    divisor = settings.pad_size_divisor
    more = g.add('Mod', g.add('Sub', divisor, g.add('Mod', shape, divisor)), divisor)
    pads = g.add('Concat', [0, 0, 0, 0], more, axis=0)
    x = g.add('Pad', x, pads, float(settings.pad_value), mode='constant')
    return g.add('Unsqueeze', x, [0])


def _levels(out: dict[str, str], prefix: str) -> list[str]:
    names: list[str] = []
    while f'{prefix}_{len(names)}' in out:
        names.append(out[f'{prefix}_{len(names)}'])
    return names


def _priors(g: Graph, head: Any, level: int, maps: str) -> str:
    generator = head.prior_generator
    stride = generator.strides[level]
    if isinstance(generator, AnchorGenerator):
        return boxes.anchors(g, maps, stride, generator.base_anchors[level].numpy())
    return boxes.points(g, maps, stride, float(generator.offset))


def _decoded(g: Graph, coder: Any, priors: str, values: str, limits: str) -> str:
    deltas = isinstance(coder, DeltaXYWHBBoxCoder)
    decode = boxes.from_deltas if deltas else boxes.from_distances
    return decode(g, coder, priors, values, limits)


def _probabilities(g: Graph, head: Any, scores: str) -> str:
    """Of the classes, without the background."""
    if head.use_sigmoid_cls:
        return g.add('Sigmoid', scores)
    return boxes.part(g, g.add('Softmax', scores, axis=-1), 0, -1, axis=-1)


# ---- heads -------------------------------------------------------------------------------------


def dense(g: Graph, head: Any, out: dict[str, str], limits: str, scale: str) -> dict[str, str]:
    """`BaseDenseHead.predict`: boxes of the original image, scores and labels.

    Args:
        g: The graph.
        head: The head.
        out: Its outputs: ``head_0_LEVEL`` scores, ``head_1_LEVEL`` boxes, ``head_2_LEVEL`` factors.
        limits: Size of the resized image, see `around`.
        scale: Resized by original size, (4,).
    """
    settings = head.test_cfg
    levels: list[list[str]] = []
    for level, (scores, values) in enumerate(zip(_levels(out, 'head_0'), _levels(out, 'head_1'))):
        priors = _priors(g, head, level, scores)
        columns = boxes.rows(g, scores, head.cls_out_channels)
        flat = g.add('Reshape', _probabilities(g, head, columns), [-1])
        score, place = boxes.best(g, flat, settings.nms_pre)
        above = g.add('Greater', score, float(settings.get('score_thr', 0)))
        score, place = boxes.take(g, boxes.where(g, above), score, place)
        row = g.add('Div', place, head.num_classes)
        label = g.add('Mod', place, head.num_classes)
        factors = _levels(out, 'head_2')
        if factors:
            factor = g.add('Sigmoid', g.add('Reshape', boxes.rows(g, factors[level], 1), [-1]))
            score = g.add('Mul', score, boxes.take(g, row, factor)[0])
        priors, deltas = boxes.take(g, row, priors, boxes.rows(g, values, 4))
        levels.append([_decoded(g, head.bbox_coder, priors, deltas, limits), score, label])
    found, score, label = (g.add('Concat', *values, axis=0) for values in zip(*levels))
    found = g.add('Mul', found, g.add('Reciprocal', scale))
    smallest = settings.get('min_bbox_size', -1)
    if smallest >= 0:
        large = boxes.large_enough(g, found, smallest)
        found, score, label = boxes.take(g, large, found, score, label)
    return _suppressed(g, settings, settings.max_per_img, found, score, label)


def _suppressed(
    g: Graph, settings: Any, most: int, found: str, score: str, label: str
) -> dict[str, str]:
    nms = settings.nms
    groups = None if nms.get('class_agnostic', False) else label
    most = min(most, nms.get('max_num', most)) if most > 0 else nms.get('max_num', boxes.LAST)
    keep = boxes.kept(g, found, score, groups, nms.get('iou_threshold', 0.5), most)
    return dict(zip(('boxes', 'scores', 'labels'), boxes.take(g, keep, found, score, label)))


def proposals(g: Graph, head: Any, out: dict[str, str], limits: str) -> str:
    """`RPNHead.predict`: boxes (R, 4) of the resized image.

    Args:
        g: The graph.
        head: The RPN.
        out: Its outputs: ``rpn_scores_LEVEL``, ``rpn_boxes_LEVEL``.
        limits: Size of the resized image, see `around`.
    """
    settings = head.test_cfg
    levels: list[list[str]] = []
    for level, (scores, values) in enumerate(
        zip(_levels(out, 'rpn_scores'), _levels(out, 'rpn_boxes'))
    ):
        priors = _priors(g, head, level, scores)
        columns = boxes.rows(g, scores, head.cls_out_channels)
        flat = g.add('Reshape', _probabilities(g, head, columns), [-1])
        deltas = boxes.rows(g, values, 4)
        count = settings.get('nms_pre', -1)
        score, place = boxes.best(g, flat, count if count > 0 else boxes.LAST)
        priors, deltas = boxes.take(g, place, priors, deltas)
        group = g.add('Add', g.add('Mul', place, 0), level)
        levels.append([priors, deltas, score, group])
    priors, deltas, score, group = (g.add('Concat', *values, axis=0) for values in zip(*levels))
    found = _decoded(g, head.bbox_coder, priors, deltas, limits)
    smallest = settings.get('min_bbox_size', -1)
    if smallest >= 0:
        large = boxes.large_enough(g, found, smallest)
        found, score, group = boxes.take(g, large, found, score, group)
    return _suppressed(g, settings, settings.max_per_img, found, score, group)['boxes']


def two_stages(
    g: Graph,
    model: Any,
    network: Network,
    out: dict[str, str],
    limits: str,
    scale: str,
    size: str | None,
) -> dict[str, str]:
    """`StandardRoIHead.predict` on the proposals: boxes, scores, labels, masks.

    Args:
        g: The graph.
        model: The detector.
        network: Its heads.
        out: Outputs of the part ``image``.
        limits: Size of the resized image, see `around`.
        scale: Resized by original size, (4,).
        size: Height and width of the original, (2,), for masks.
    """
    roi_head, features = model.roi_head, _levels(out, 'feature')
    given_boxes = proposals(g, model.rpn_head, out, limits)
    extractor = roi_head.bbox_roi_extractor
    given = boxes.regions(g, extractor, features[: extractor.num_inputs], given_boxes)
    answer = network('bbox_head', given)
    found = _classified(g, roi_head, answer, given_boxes, limits, scale)
    if not roi_head.with_mask:
        return found
    extractor = roi_head.mask_roi_extractor
    given = boxes.regions(g, extractor, features[: extractor.num_inputs], found['boxes'])
    masks = g.add('Sigmoid', network('mask_head', given)['masks'])
    head = roi_head.mask_head
    label = g.add('Mul', found['labels'], 0) if head.class_agnostic else found['labels']
    masks = boxes.masks_of_labels(g, masks, label)
    found['boxes'] = g.add('Div', found['boxes'], scale)
    assert size is not None
    sides = [boxes.part(g, size, i, i + 1, axis=0) for i in range(2)]
    threshold = roi_head.test_cfg.mask_thr_binary
    found['masks'] = boxes.pasted(g, masks, found['boxes'], sides, threshold)
    return found


def _classified(
    g: Graph, roi_head: Any, answer: dict[str, str], given: str, limits: str, scale: str
) -> dict[str, str]:
    """`BBoxHead.predict_by_feat`; boxes of the original image, or of the resized for masks."""
    head, settings = roi_head.bbox_head, roi_head.test_cfg
    scores = g.add('Softmax', answer['scores'], axis=-1)
    scores = boxes.part(g, scores, 0, -1, axis=1)
    deltas = g.add('Reshape', answer['boxes'], [0, -1, 4], allowzero=0)
    found = boxes.from_deltas(g, head.bbox_coder, g.add('Unsqueeze', given, [1]), deltas, limits)
    found = g.add('Expand', found, g.add('Concat', g.add('Shape', scores), [4], axis=0))
    if not roi_head.with_mask:
        found = g.add('Mul', found, g.add('Reciprocal', scale))
    flat = g.add('Reshape', scores, [-1])
    above = boxes.where(g, g.add('Greater', flat, float(settings.score_thr)))
    found, score = boxes.take(g, above, g.add('Reshape', found, [-1, 4]), flat)
    label = g.add('Mod', above, head.num_classes)
    return _suppressed(g, settings, settings.max_per_img, found, score, label)
