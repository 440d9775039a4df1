"""Layers and parts that only hosts need: a baseline norm, and parts converted after building.

Their names in configs are in `registry`.
"""

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
