"""Models of OpenMMLab outside of a Runner: from config and checkpoint to what folds and runs.

`load_planned` is the one way to a loaded model whose folding is planned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import Tensor, nn

from wsbcn_mm import folding
from wsbcn_mm.layers.standardization import standardize_once_per_forward
from wsbcn_mm.openmmlab import checkpoints, config, explain, filling
from wsbcn_mm.openmmlab.config import scope_of
from wsbcn_mm.openmmlab.deploy import clips
from wsbcn_mm.openmmlab.deploy.parts import features_alone, image_function, tensor_parts
from wsbcn_mm.openmmlab.errors import first_line

# What a host calls the sample that belongs to an input.
SAMPLES = {
    'mmdet': 'DetDataSample',
    'mmseg': 'SegDataSample',
    'mmpretrain': 'DataSample',
    'mmaction': 'ActionDataSample',
}


def build_model(cfg: Config) -> Any:
    """The model of a config, as a test run builds it, in evaluation mode.

    Raises:
        ConfigError: a ValueError; a field of the config cannot be used.
        ValueError: it takes videos and gives tracks (MMDetection's).
    """
    config.use_scope(cfg)
    with explain.named(cfg):
        model = revert_sync_batchnorm(MODELS.build(config.model_of(cfg)))
    config.refuse_tracker(model)
    model.eval()
    return model


def load_model(
    cfg: Config, checkpoint: str | dict[str, Any], source: str = 'the checkpoint'
) -> Any:
    """Model and checkpoint together, in evaluation mode on the CPU.

    Args:
        cfg: The config.
        checkpoint: A file or an address, or what `checkpoints.read_checkpoint` returned.
        source: Names the latter in errors.

    Returns:
        The model; ``dataset_meta`` holds class names and palette where the checkpoint has them.

    Raises:
        CheckpointMismatch: the checkpoint is not one of this model.
    """
    if isinstance(checkpoint, str):
        source, checkpoint = checkpoint, checkpoints.read_checkpoint(checkpoint)
    model = build_model(cfg)
    standardize_once_per_forward(model)
    state = checkpoints.state_dict_of(checkpoint, source)
    filling.load(model, state, checkpoint, source=source)
    model.dataset_meta = by_label(checkpoints.meta_of(checkpoint))
    return model


def by_label(meta: dict) -> dict | None:
    """What a checkpoint says of its data, the classes in the order of the labels if it has that."""
    data, names = meta.get('dataset_meta'), meta.get(checkpoints.BY_LABEL)
    if not data or not names or set(names) != set(data.get('classes') or ()):
        return data
    palette = data.get('palette')
    if isinstance(palette, (list, tuple)) and len(palette) == len(names):
        colours = dict(zip(data['classes'], palette))
        palette = [colours[name] for name in names]
    return {**data, 'classes': tuple(names), 'palette': palette, checkpoints.BY_LABEL: names}


@dataclass
class PlannedModel:
    """A loaded model, and how it folds.

    Attributes:
        cfg: The config.
        checkpoint: What the checkpoint file holds; only a state dict where none was given.
        model: In evaluation mode on the CPU.
        plan: What `wsbcn_mm.folding.plan` found in it.
    """

    cfg: Config
    checkpoint: dict[str, Any]
    model: Any
    plan: folding.Plan

    def folded(self, plain: bool = False) -> Any:
        """The folded model; ``plain`` as in `wsbcn_mm.fold`. It knows the classes, too."""
        folded: Any = self.plan.apply(self.model, plain)
        folded.dataset_meta = self.model.dataset_meta
        return folded


def load_planned(
    source: str | Config,
    checkpoint: str | None,
    image: np.ndarray,
    options: dict[str, Any] | None = None,
) -> PlannedModel:
    """Config and checkpoint, read and checked, as a model whose folding is planned.

    Args:
        source: A config, or its file or name.
        checkpoint: A file; None: the weights with which the model is built.
        image: BGR; what the model is tried on, see `run_on`.
        options: Of ``--cfg-options``.

    Raises:
        FileNotFoundError: no such config or checkpoint.
        ValueError: a config without a model, a damaged checkpoint, a model that does not take an
            image of this size.
        CheckpointMismatch: a ValueError; the checkpoint is not one of this model.
    """
    cfg = source if isinstance(source, Config) else config.load_config(source, options)
    if checkpoint is None:
        model = build_model(cfg)
        content, model.dataset_meta = dict(state_dict=model.state_dict()), None
    else:
        content = checkpoints.read_checkpoint(checkpoint)
        model = load_model(cfg, content, checkpoint)
    with explain.named(cfg):
        return PlannedModel(cfg, content, model, folding.plan(model, run=run_on(cfg, image)))


# ----------------------------------------------------------------------------------------------
# Images


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A BGR image (height, width, 3) of smooth noise: it has edges and areas, as pictures do."""
    if min(height, width) < 1:
        raise ValueError(f'height and width of an image must be at least 1\n  got {height} {width}')
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cell in (4, 16, 64):
        noise = torch.rand(1, 3, -(-height // cell), -(-width // cell), generator=generator)
        image += nn.functional.interpolate(noise, (height, width), mode='bilinear') / 3
    return (image[0].permute(1, 2, 0) * 255).byte().numpy()


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one the GPU where there is one.

    Raises:
        ValueError: there is none.
    """
    try:
        device = torch.device(name or get_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(
            f'--device {name}: {first_line(error)}\n  without --device: {get_device()}'
        ) from error
    return device


def channels_of(model: Any) -> int:
    """How many channels an image of a model has: grey ones have one."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    return 3 if mean is None else mean.numel()


def batch_of(cfg: Config, image: np.ndarray, channels: int = 3) -> dict[str, Any]:
    """What a data loader gives ``test_step`` for one image at its own size.

    Args:
        cfg: The config.
        image: (H, W, C); for MMAction2 also the frames of a video, (T, H, W, C).
        channels: How many the model takes; those of the image are repeated or left out.
    """
    image = image[..., [i % image.shape[-1] for i in range(channels)]]
    size = tuple(image.shape[-3:-1])
    meta = dict(img_id=0, img_path='', img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    scope = scope_of(cfg)
    if scope == 'mmaction':
        tensor = clips.inputs_of(cfg, image)
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    sample = getattr(import_module(f'{scope}.structures'), SAMPLES[scope])
    return dict(inputs=[tensor], data_samples=[sample(metainfo=meta)])


def preprocess(model: Any, cfg: Config, image: np.ndarray) -> Tensor:
    """The normalised and padded image that enters the model, (1, 3, H, W).

    Of MMAction2's a clip: (1, T, 3, H, W), or (1, 1, 3, T, H, W) in 3d networks.
    """
    batch = batch_of(cfg, image, channels_of(model))
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return model.data_preprocessor(batch, False)['inputs'].to(weight)


def run_on(cfg: Config, image: np.ndarray) -> Callable[[nn.Module], object]:
    """A ``run`` for `wsbcn_mm.fold`: every tensor part on one image.

    Models whose heads are no tensor parts (transformers) run inference on it instead. The run
    raises ValueError where the model does not take an image of this size.
    """

    def run(model: Any) -> object:
        try:
            return run_parts(model)
        except RuntimeError as error:
            size = 'x'.join(map(str, image.shape[-3:-1]))
            raise ValueError(
                f'the model does not run on an image of {size}\n  {error}\n  try another size'
            ) from error

    def run_parts(model: Any) -> object:
        parts = tensor_parts(model, preprocess(model, cfg, image))
        if hasattr(model, 'bbox_head') and image_function(model) is features_alone:
            model.test_step(batch_of(cfg, image, channels_of(model)))
        return [part.values for part in parts]

    return run
