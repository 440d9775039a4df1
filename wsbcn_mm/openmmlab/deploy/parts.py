"""The tensor parts of a model: what a deployment runs as a network.

Everything between the normalised image and the raw predictions, without boxes, non-maximum
suppression and RoIAlign.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# From a model and a tensor to nested dicts, lists and tuples of tensors. A host's model has methods
# that no nn.Module has.
Function = Callable[[Any, Tensor], Any]


@dataclass
class Part:
    """A part of a model that maps tensors to tensors, and an input for it.

    Attributes:
        name: Such as ``'image'`` or ``'mask_head'``; names the exported file.
        module: Takes one tensor, returns a tuple of tensors.
        input: An example.
        outputs: Names of what it returns.
        input_name: Name of the input.
        values: What it returned for the example, where it was run to know the names.
    """

    name: str
    module: nn.Module
    input: Tensor
    outputs: list[str]
    input_name: str = 'image'
    values: tuple[Tensor, ...] = ()


class _Calls(nn.Module):
    """A function of a model as a module: the model is its only child."""

    def __init__(self, model: nn.Module, function: Function) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in _named(self.function(self.model, x)))


def _named(value: Any, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dicts, lists and tuples with a name."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named(item, f'{prefix}_{key}'.lstrip('_'))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _named(item, f'{prefix}_{i}' if prefix else str(i))


@torch.no_grad()
def tensor_parts(model: Any, image: Tensor) -> list[Part]:
    """The tensor parts of a model, see the module.

    ====================== =======================================================================
    part                   computes
    ====================== =======================================================================
    ``image``              classifier: class scores; segmenter: class scores at the size of the
                           image; detector: feature maps and what the dense head (RPN, RetinaNet,
                           ...) makes of them
    ``clip``               recognizer of MMAction2: class scores of a clip
    ``bbox_head``          class scores and box deltas of RoI features, RoI models only; with a
                           number for every stage of a cascade
    ``mask_head``          masks of RoI features
    ``auxiliary_head``     segmenter: scores of an auxiliary head; of use in verification only
    ====================== =======================================================================

    Args:
        model: Built from a config; in evaluation mode.
        image: What `inference.preprocess` returns.
    """
    if hasattr(model, 'cls_head'):
        return [_part('clip', model, image_function(model), image, 'clip')]
    parts = [_part('image', model, image_function(model), image)]
    if hasattr(model, 'decode_head'):
        auxiliary = getattr(model, 'auxiliary_head', None)
        heads = auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary]
        for i, head in enumerate(heads):
            if head is not None:
                parts.append(_part(f'auxiliary_head_{i}', model, _auxiliary_function(i), image))
        return parts
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is None or _has_learned_proposals(model):
        return parts
    features = model.extract_feat(image)
    for kind in ('bbox', 'mask'):
        roi_heads: Any = getattr(roi_head, f'{kind}_head', None)
        extractors: Any = getattr(roi_head, f'{kind}_roi_extractor', None)
        if roi_heads is None:
            continue
        extractors = extractors or roi_head.bbox_roi_extractor  # shared
        several = isinstance(roi_heads, nn.ModuleList)
        for i in range(len(roi_heads) if several else 1):
            extractor = extractors[i] if isinstance(extractors, nn.ModuleList) else extractors
            rois = extractor(tuple(features[: extractor.num_inputs]), _example_rois(image))
            name = f'{kind}_head_{i}' if several else f'{kind}_head'
            function = _roi_function(f'{kind}_head', i if several else None)
            parts.append(_part(name, model, function, rois, 'roi_features'))
    return parts


def _part(
    name: str, model: nn.Module, function: Function, x: Tensor, input_name: str = 'image'
) -> Part:
    found = list(_named(function(model, x)))
    names, values = [key for key, _ in found], tuple(value for _, value in found)
    return Part(name, _Calls(model, function), x, names, input_name, values)


def image_function(model: Any) -> Function:
    """What the part ``image`` (or ``clip``) of a model computes."""
    if hasattr(model, 'cls_head'):
        return _recognize
    if isinstance(getattr(model, 'head', None), nn.Module):  # MMPretrain's
        return _classify
    if hasattr(model, 'decode_head'):
        return _segment
    if hasattr(model, 'roi_head') or hasattr(model, 'rpn_head'):
        dense = getattr(model, 'rpn_head', None) is not None and not _has_learned_proposals(model)
        return _features_and_rpn if dense else features_alone
    from mmdet.models.detectors import SingleStageDetector

    return _features_and_head if isinstance(model, SingleStageDetector) else features_alone


def _classify(model: Any, x: Tensor) -> dict[str, Any]:
    return dict(scores=model(x))


def _recognize(model: Any, x: Tensor) -> dict[str, Any]:
    return dict(scores=model.extract_feat(x, stage='head')[0])


def _has_learned_proposals(model: Any) -> bool:
    """Sparse R-CNN and its kin: no dense head, and RoI heads that also take proposals."""
    return type(getattr(model, 'rpn_head', None)).__name__ == 'EmbeddingRPNHead'


def _segment(model: Any, x: Tensor) -> dict[str, Any]:
    metas = [dict(img_shape=x.shape[2:])] * x.shape[0]
    return dict(scores=model.encode_decode(x, metas))


def features_alone(model: Any, x: Tensor) -> dict[str, Any]:
    """Feature maps; the heads of the model are no tensor parts (transformers)."""
    return dict(feature=list(model.extract_feat(x)))


def _features_and_rpn(model: Any, x: Tensor) -> dict[str, Any]:
    features = model.extract_feat(x)
    scores, boxes = model.rpn_head(features)[:2]
    return dict(feature=list(features), rpn_scores=list(scores), rpn_boxes=list(boxes))


def _features_and_head(model: Any, x: Tensor) -> dict[str, Any]:
    features = model.extract_feat(x)
    return dict(feature=list(features), head=model.bbox_head(features))


def _auxiliary_function(index: int) -> Function:
    def auxiliary(model: Any, x: Tensor) -> dict[str, Any]:
        heads = model.auxiliary_head
        head = heads[index] if isinstance(heads, nn.ModuleList) else heads
        return dict(scores=head(model.extract_feat(x)))

    return auxiliary


def _roi_function(attribute: str, index: int | None) -> Function:
    def head(model: Any, x: Tensor) -> dict[str, Any]:
        roi_head = model.roi_head
        if getattr(roi_head, 'with_shared_head', False):
            x = roi_head.shared_head(x)
        heads = getattr(roi_head, attribute)
        module = heads if index is None else heads[index]
        # Double heads take the features twice, one for each branch.
        needed = inspect.signature(module.forward).parameters.values()
        result = module(*[x] * sum(p.default is p.empty for p in needed))
        if attribute == 'mask_head':
            return dict(masks=result)
        return dict(zip(('scores', 'boxes'), result))

    return head


def _example_rois(image: Tensor) -> Tensor:
    """Boxes of several sizes (5, 5), so that every level of a pyramid gets some."""
    height, width = image.shape[2:]
    boxes = [
        (0, 0, 1, 1),
        (0, 0, 0.5, 0.5),
        (0.3, 0.2, 0.6, 0.9),
        (0.5, 0.5, 0.6, 0.6),
        (0.1, 0.7, 0.15, 0.8),
    ]
    scale = image.new_tensor([width, height, width, height])
    return torch.cat([image.new_zeros(len(boxes), 1), image.new_tensor(boxes) * scale], 1)


@torch.no_grad()
def results(parts: Sequence[Part], inputs: Sequence[Part] | None = None) -> list[Tensor]:
    """What parts compute, one after the other.

    Args:
        parts: The parts.
        inputs: Parts of another model whose inputs are taken instead, in the dtype of ``parts``.
    """
    pairs = zip(parts, parts if inputs is None else inputs, strict=True)
    return [value for part, other in pairs for value in part.module(other.input.to(part.input))]


def largest_error(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Largest difference of two lists of results, each relative to its largest value; or NaN."""
    worst = 0.0
    for want, got in zip(expected, actual, strict=True):
        scale = want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
        error = ((got.to(want.dtype) - want).abs().max() / scale).item()
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def relative_error(parts: Sequence[Part], others: Sequence[Part]) -> float:
    """`largest_error` of the others' results; both get the inputs of ``parts``."""
    return largest_error(results(parts), results(others, parts))
