"""A stock model in which some layers are replaced by others of torch; needs torch and mmengine.

This file lies beside a config that names it in ``custom_imports``: a folded model has layers that
no setting of a stock config describes, such as a convolution with bias in front of a norm.
"""

from mmengine.registry import MODELS
from torch import nn


@MODELS.register_module(force=True)  # a copy beside another config says the same
def FoldedLayers(kind: str, layers: dict, **kwargs) -> nn.Module:  # noqa: N802
    """Builds a model and replaces layers of it.

    In a config: ``model=dict(type='FoldedLayers', kind='MaskRCNN', layers={...}, ...)``, every
    other key as before. The result is the model itself, not a wrapper.

    Args:
        kind: The ``type`` that the model would have.
        layers: By the name of a layer in the model, in this order: the ``type`` of a layer in
            torch.nn with its arguments, or the name of another one that is used there as well.
        **kwargs: The model's own arguments.
    """
    model = MODELS.build(dict(type=kind, **kwargs))
    for name, layer in layers.items():
        if isinstance(layer, str):
            new = model.get_submodule(layer)
        else:
            arguments = {key: value for key, value in layer.items() if key != 'type'}
            new = getattr(nn, layer['type'])(**arguments)
        holder, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(holder), attribute, new)
    return model
