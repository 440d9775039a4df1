"""Weight Standardization and Batch-Channel Normalization for training with 1-2 images per GPU.

Needs torch alone. Where OpenMMLab (mmengine) is installed, importing this package also registers
the layers there, so that a config says ``custom_imports = dict(imports=['wsbcn_mm'])`` and then
``norm_cfg=dict(type='BCN', num_groups=32)``, ``conv_cfg=dict(type='WSConv2d')``.
"""

from importlib.util import find_spec

import wsbcn_mm.compat  # first: it refuses a torch that lacks what the others need
from wsbcn_mm import (  # noqa: F401  README names them so
    audit,
    backends,
    convert,
    diagnostics,
    estimates,
    recalibration,
)
from wsbcn_mm.folding import fold
from wsbcn_mm.functional import batch_channel_norm, weight_standardize
from wsbcn_mm.layers import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
)
from wsbcn_mm.layers.standardization import (
    standardize_once_per_forward,
    standardized_once,
    weights_do_not_change,
)
from wsbcn_mm.version import __version__

if find_spec('mmengine') is not None:
    import wsbcn_mm.openmmlab  # noqa: F401  registers

__all__ = [
    'BatchChannelNorm1d',
    'BatchChannelNorm2d',
    'BatchChannelNorm3d',
    'WSConv1d',
    'WSConv2d',
    'WSConv3d',
    'WSConvTranspose2d',
    '__version__',
    'batch_channel_norm',
    'fold',
    'standardize_once_per_forward',
    'standardized_once',
    'weight_standardize',
    'weights_do_not_change',
]
