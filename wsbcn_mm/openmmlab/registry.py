"""The one table of our names: what configs call a layer, what it replaces, what stands for it.

Registered in mmengine's root registry: one name serves every scope. `BCN` is another name of
`BCN2d`, `WSConv` of `WSConv2d`, as `BN` and `Conv` are in mmcv. Everybody who asks whether a name
in a config is one of ours, or which of ours takes the place of another, asks here.
"""

from dataclasses import dataclass

from mmengine.registry import MODELS
from torch import nn

from wsbcn_mm import layers
from wsbcn_mm.layers import comparators
from wsbcn_mm.openmmlab.layers import Converted, Kept, MicroBatchNorm2d


@dataclass(frozen=True)
class Layer:
    """A row of the table.

    Attributes:
        names: What configs call it. The first one is what the converter writes.
        kind: The class. Configs in pure Python hold it, and are read as its name.
        replaces: The types of mmcv and torch whose place it takes.
        stock: The type that stands for it where this package is not installed, after folding: of a
            WS convolution the convolution with standardized weights, of BCN the batch stage (the
            channel stage is a GroupNorm). None: nothing does.
    """

    names: tuple[str, ...]
    kind: type[nn.Module]
    replaces: tuple[str, ...] = ()
    stock: str | None = None


NORMS = (
    Layer(('BCN1d',), layers.BatchChannelNorm1d, ('BN1d', 'BatchNorm1d'), 'BN1d'),
    Layer(
        ('BCN2d', 'BCN'),
        layers.BatchChannelNorm2d,
        (
            *('BN', 'BN2d', 'SyncBN', 'MMSyncBN', 'GN'),
            *('BatchNorm2d', 'SyncBatchNorm', 'GroupNorm'),  # torch's names
        ),
        'BN',
    ),
    Layer(('BCN3d',), layers.BatchChannelNorm3d, ('BN3d', 'BatchNorm3d'), 'BN3d'),
)
# They take the place of convolutions that differ from theirs in the weight alone.
CONVS = (
    Layer(('WSConv1d',), layers.WSConv1d, ('Conv1d',), 'Conv1d'),
    Layer(
        ('WSConv2d', 'WSConv'), layers.WSConv2d, ('Conv', 'Conv2d', 'ConvWS', 'ConvAWS'), 'Conv2d'
    ),
    Layer(('WSConv3d',), layers.WSConv3d, ('Conv3d',), 'Conv3d'),
    Layer(('WSConvTranspose2d',), layers.WSConvTranspose2d, (), 'deconv'),
)
MICRO_BN = Layer(('MicroBN',), MicroBatchNorm2d, (), 'BN')  # in evaluation it is one
FOR_STUDIES = (
    Layer(('WSMeanOnlyConv2d',), comparators.WSMeanOnlyConv2d),
    Layer(('WSStdOnlyConv2d',), comparators.WSStdOnlyConv2d),
    Layer(('WeightNormConv2d',), comparators.WeightNormConv2d),
    Layer(('CenteredWeightNormConv2d',), comparators.CenteredWeightNormConv2d),
    Layer(('SampleLayerNorm',), comparators.SampleLayerNorm),
)
# Parts that are built from their `kind`: with other layers, and frozen.
CONVERTED, KEPT = 'Converted', 'Kept'

# Hooks that are put into configs or looked for there (their classes register themselves).
ESTIMATES_HOOK = 'EstimatesHook'
ATOMIC_CHECKPOINT_HOOK = 'AtomicCheckpointHook'
DATA_CHECK_HOOK = 'DataCheckHook'


def _by_name(*rows: Layer) -> dict[str, Layer]:
    return {name: row for row in rows for name in (*row.names, row.kind.__name__)}


# By every name that a config may use, the class' own included.
NORM_NAMED = _by_name(*NORMS)
CONV_NAMED = _by_name(*CONVS)
MICRO_BN_NAMED = _by_name(MICRO_BN)

# Type upstream -> our name for what takes its place.
NORM_FOR = {kind: row.names[0] for row in NORMS for kind in row.replaces}
CONV_FOR = {kind: row.names[0] for row in CONVS for kind in row.replaces}

for row in (*NORMS, *CONVS, MICRO_BN, *FOR_STUDIES):
    MODELS.register_module(list(row.names), module=row.kind)
MODELS.register_module(CONVERTED, module=Converted)
MODELS.register_module(KEPT, module=Kept)
