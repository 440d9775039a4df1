"""Models of OpenMMLab outside of a Runner: loading, running on images, their tensor parts.

The *tensor parts* of a model are what a deployment runs as a network: everything between the
normalised image and the raw predictions, without boxes, non-maximum suppression and RoIAlign.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from wsbcn_mm.layers.standardization import standardize_once_per_forward
from wsbcn_mm.openmmlab import checkpoints
from wsbcn_mm.openmmlab.config import scope_of


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, as a test run builds it, in evaluation mode."""
    scope = scope_of(cfg)
    import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    init_default_scope(scope)
    model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))
    model.eval()
    return model


def load_model(cfg: Config, checkpoint: str | dict) -> nn.Module:
    """Model and checkpoint together, in evaluation mode on the CPU.

    Args:
        cfg: The config.
        checkpoint: A file or an address, or what `checkpoints.read_checkpoint` returned.

    Returns:
        The model; ``dataset_meta`` holds class names and palette where the checkpoint has them.

    Raises:
        CheckpointMismatch: the checkpoint is not one of this model.
    """
    source = 'the checkpoint'
    if isinstance(checkpoint, str):
        source, checkpoint = checkpoint, checkpoints.read_checkpoint(checkpoint)
    model = build_model(cfg)
    standardize_once_per_forward(model)
    state = checkpoints.state_dict_of(checkpoint, source)
    checkpoints.load(model, state, checkpoint, source=source)
    model.dataset_meta = checkpoints.meta_of(checkpoint).get('dataset_meta')
    return model


# ----------------------------------------------------------------------------------------------
# Images


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A BGR image (height, width, 3) of smooth noise: it has edges and areas, as pictures do."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cell in (4, 16, 64):
        noise = torch.rand(1, 3, -(-height // cell), -(-width // cell), generator=generator)
        image += nn.functional.interpolate(noise, (height, width), mode='bilinear') / 3
    return (image[0].permute(1, 2, 0) * 255).byte().numpy()


def channels_of(model: nn.Module) -> int:
    """How many channels an image of a model has: grey ones have one."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    return 3 if mean is None else mean.numel()


def batch_of(cfg: Config, image: np.ndarray, channels: int = 3) -> dict:
    """What a data loader gives ``test_step`` for one image at its own size.

    Args:
        cfg: The config.
        image: (H, W, C).
        channels: How many the model takes; those of the image are repeated or left out.
    """
    image = image[..., [i % image.shape[2] for i in range(channels)]]
    size = tuple(image.shape[:2])
    meta = dict(img_id=0, img_path='', img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    if scope_of(cfg) == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return dict(inputs=[tensor], data_samples=[Sample(metainfo=meta)])


def preprocess(model: nn.Module, cfg: Config, image: np.ndarray) -> Tensor:
    """The normalised and padded image that enters the backbone, (1, 3, H, W)."""
    batch = batch_of(cfg, image, channels_of(model))
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return model.data_preprocessor(batch, False)['inputs'].to(weight)


def run_on(cfg: Config, image: np.ndarray) -> Callable[[nn.Module], object]:
    """A ``run`` for `wsbcn_mm.fold`: every tensor part on one image.

    Models whose heads are no tensor parts (transformers) run inference on it instead. The run
    raises ValueError where the model does not take an image of this size.
    """

    def run(model: nn.Module) -> object:
        try:
            return run_parts(model)
        except RuntimeError as error:
            size = f'{image.shape[0]}x{image.shape[1]}'
            raise ValueError(
                f'the model does not run on an image of {size}\n  {error}\n  try another size'
            ) from error

    def run_parts(model: nn.Module) -> object:
        parts = tensor_parts(model, preprocess(model, cfg, image))
        if hasattr(model, 'bbox_head') and _image_function(model) is _features:
            model.test_step(batch_of(cfg, image, channels_of(model)))
        return [part.module(part.input) for part in parts]

    return run


# ----------------------------------------------------------------------------------------------
# Tensor parts


@dataclass
class Part:
    """A part of a model that maps tensors to tensors, and an input for it.

    Attributes:
        name: Such as ``'image'`` or ``'mask_head'``; names the exported file.
        module: Takes one tensor, returns a tuple of tensors.
        input: An example.
        outputs: Names of what it returns.
        input_name: Name of the input.
    """

    name: str
    module: nn.Module
    input: Tensor
    outputs: list[str]
    input_name: str = 'image'


class _Calls(nn.Module):
    """A function of a model as a module: the model is its only child."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in _named(self.function(self.model, x)))


def _named(value: object, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
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
def tensor_parts(model: nn.Module, image: Tensor) -> list[Part]:
    """The tensor parts of a detector or segmenter, see the module.

    ====================== =======================================================================
    part                   computes
    ====================== =======================================================================
    ``image``              segmenter: class scores at the size of the image; detector: feature maps
                           and what the dense head (RPN, RetinaNet, ...) makes of them
    ``bbox_head``          class scores and box deltas of RoI features, RoI models only; with a
                           number for every stage of a cascade
    ``mask_head``          masks of RoI features
    ``auxiliary_head``     segmenter: scores of an auxiliary head; of use in verification only
    ====================== =======================================================================

    Args:
        model: Built from a config; in evaluation mode.
        image: What `preprocess` returns.
    """
    parts = [_part('image', model, _image_function(model), image)]
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
        heads, extractors = (
            getattr(roi_head, name, None) for name in (f'{kind}_head', f'{kind}_roi_extractor')
        )
        if heads is None:
            continue
        extractors = extractors or roi_head.bbox_roi_extractor  # shared
        several = isinstance(heads, nn.ModuleList)
        for i in range(len(heads) if several else 1):
            extractor = extractors[i] if isinstance(extractors, nn.ModuleList) else extractors
            rois = extractor(tuple(features[: extractor.num_inputs]), _example_rois(image))
            name = f'{kind}_head_{i}' if several else f'{kind}_head'
            function = _roi_function(f'{kind}_head', i if several else None)
            parts.append(_part(name, model, function, rois, 'roi_features'))
    return parts


def _part(
    name: str, model: nn.Module, function: Callable, x: Tensor, input_name: str = 'image'
) -> Part:
    outputs = [key for key, _ in _named(function(model, x))]
    return Part(name, _Calls(model, function), x, outputs, input_name)


def _image_function(model: nn.Module) -> Callable:
    if hasattr(model, 'decode_head'):
        return _segment
    if hasattr(model, 'roi_head') or hasattr(model, 'rpn_head'):
        dense = getattr(model, 'rpn_head', None) is not None and not _has_learned_proposals(model)
        return _features_and_rpn if dense else _features
    from mmdet.models.detectors import SingleStageDetector

    return _features_and_head if isinstance(model, SingleStageDetector) else _features


def _has_learned_proposals(model: nn.Module) -> bool:
    """Sparse R-CNN and its kin: no dense head, and RoI heads that also take proposals."""
    return type(getattr(model, 'rpn_head', None)).__name__ == 'EmbeddingRPNHead'


def _segment(model: nn.Module, x: Tensor) -> dict:
    metas = [dict(img_shape=x.shape[2:])] * x.shape[0]
    return dict(scores=model.encode_decode(x, metas))


def _features(model: nn.Module, x: Tensor) -> dict:
    return dict(feature=list(model.extract_feat(x)))


def _features_and_rpn(model: nn.Module, x: Tensor) -> dict:
    features = model.extract_feat(x)
    scores, boxes = model.rpn_head(features)[:2]
    return dict(feature=list(features), rpn_scores=list(scores), rpn_boxes=list(boxes))


def _features_and_head(model: nn.Module, x: Tensor) -> dict:
    features = model.extract_feat(x)
    return dict(feature=list(features), head=model.bbox_head(features))


def _auxiliary_function(index: int) -> Callable:
    def auxiliary(model: nn.Module, x: Tensor) -> dict:
        heads = model.auxiliary_head
        head = heads[index] if isinstance(heads, nn.ModuleList) else heads
        return dict(scores=head(model.extract_feat(x)))

    return auxiliary


def _roi_function(attribute: str, index: int | None) -> Callable:
    def head(model: nn.Module, x: Tensor) -> dict:
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
def relative_error(parts: list[Part], others: list[Part]) -> float:
    """Largest error of the others' outputs, relative to the largest value of each output.

    Both get the inputs of ``parts``, which may be of another model with the same parts.
    """
    worst = 0.0
    for part, other in zip(parts, others, strict=True):
        expected, found = part.module(part.input), other.module(part.input)
        for want, got in zip(expected, found, strict=True):
            scale = want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
            error = ((got - want).abs().max() / scale).item()
            worst = error if error != error else max(worst, error)  # NaN stays
            if worst != worst:
                return worst
    return worst
