"""Layers and parts that only hosts need: a baseline norm, parts converted or frozen when built.

Their names in configs are in `registry`.
"""

from types import MethodType
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from wsbcn_mm.convert import convert_model


class MicroBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that also trains where a channel has a single value.

    One value has no variance: `nn.BatchNorm2d` raises, for instance in ASPP's image pooling at one
    image per GPU. Here such an input is normalised with the running statistics, which stay as they
    are; if that is all a layer ever sees, it is an affine map. Everything else, arguments and state
    dict included, is BatchNorm's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (N, C, H, W); N x H x W = 1 uses the running statistics."""
        if self.training and input.numel() == self.num_features:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def Converted(kind: str, convert: dict | None = None, **kwargs) -> nn.Module:  # noqa: N802
    """Builds a part and turns its conv -> norm pairs into WS + BCN.

    In a config: ``backbone=dict(type='Converted', kind='BiSeNetV1', ...)``, every other key as
    before. The result is the part itself, not a wrapper: names in checkpoints stay.

    Args:
        kind: The ``type`` that the part would have.
        convert: Arguments of `wsbcn_mm.convert.convert_model`.
        **kwargs: The part's own arguments.
    """
    part = MODELS.build(dict(type=kind, **kwargs))
    convert_model(part, **(convert or {}))
    return part


def Kept(kind: str, frozen: bool = True, **kwargs: Any) -> nn.Module:  # noqa: N802
    """Builds a part that stays as its weights were trained: norms in evaluation mode, frozen.

    In a config: ``backbone=dict(type='Kept', kind='ResNet', ...)``, every other key as before. The
    result is the part itself, not a wrapper: names in checkpoints stay. Frozen means without
    gradients from the moment it is built, hence before DistributedDataParallel and the optimizer
    see it: nothing is computed, kept or communicated for it in the backward pass, and it does not
    count where gradients are clipped. ``frozen_stages`` of the hosts does the same for parts of
    some of their classes only.

    Norms that keep running statistics do not update them, whatever ``train()`` is called with. The
    part's own ``training`` follows ``train()``: some backbones return other maps in training.

    Args:
        kind: The ``type`` that the part would have.
        frozen: Whether the weights stay, too. False: they train, and the statistics stay.
        **kwargs: The part's own arguments.
    """
    part: Any = MODELS.build(dict(type=kind, **kwargs))
    if frozen:
        part.requires_grad_(False)
    part.train = MethodType(_train_without_statistics, part)  # a copy of the part gets its own
    return part.train(part.training)


def _train_without_statistics(part: nn.Module, mode: bool = True) -> nn.Module:
    type(part).train(part, mode)
    for module in part.modules():
        if getattr(module, 'running_mean', None) is not None:
            module.eval()
    return part
