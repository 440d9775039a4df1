"""The layers: WS convolutions (`conv`), Batch-Channel Normalization (`norm`)."""

from wsbcn_mm.layers.conv import (
    WeightStandardized,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
)
from wsbcn_mm.layers.fusing import guard_fuse_modules
from wsbcn_mm.layers.norm import (
    BatchChannelNorm,
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
)

guard_fuse_modules()

__all__ = [
    'BatchChannelNorm',
    'BatchChannelNorm1d',
    'BatchChannelNorm2d',
    'BatchChannelNorm3d',
    'WSConv1d',
    'WSConv2d',
    'WSConv3d',
    'WSConvTranspose2d',
    'WeightStandardized',
]
