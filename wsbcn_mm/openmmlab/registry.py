"""The names that configs use, in mmengine's root registry: one name serves every scope.

`BCN` is an alias of `BCN2d`, `WSConv` of `WSConv2d`, as `BN` and `Conv` are in mmcv.
"""

from mmengine.registry import MODELS

from wsbcn_mm import layers
from wsbcn_mm.layers import comparators

for names, layer in {
    ('WSConv1d',): layers.WSConv1d,
    ('WSConv', 'WSConv2d'): layers.WSConv2d,
    ('WSConv3d',): layers.WSConv3d,
    ('WSConvTranspose2d',): layers.WSConvTranspose2d,
    ('BCN1d',): layers.BatchChannelNorm1d,
    ('BCN', 'BCN2d'): layers.BatchChannelNorm2d,
    ('BCN3d',): layers.BatchChannelNorm3d,
    # For studies only.
    ('WSMeanOnlyConv2d',): comparators.WSMeanOnlyConv2d,
    ('WSStdOnlyConv2d',): comparators.WSStdOnlyConv2d,
    ('WeightNormConv2d',): comparators.WeightNormConv2d,
    ('CenteredWeightNormConv2d',): comparators.CenteredWeightNormConv2d,
    ('SampleLayerNorm',): comparators.SampleLayerNorm,
}.items():
    MODELS.register_module(list(names), module=layer)
