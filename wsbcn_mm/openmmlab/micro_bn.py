"""BatchNorm as the baseline at one image per GPU, where the plain one cannot train every model."""

from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F


@MODELS.register_module(name='MicroBN')
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
