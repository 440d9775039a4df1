"""A part of a model whose constructor cannot be told by its config to use WS or BCN.

Some constructors take no ``conv_cfg``, pass theirs to convolutions without a norm as well, or build
BatchNorms that no ``norm_cfg`` reaches. `Converted` builds such a part and replaces its layers.
"""

from mmengine.registry import MODELS
from torch import nn

from wsbcn_mm.convert import convert_model


@MODELS.register_module()
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
