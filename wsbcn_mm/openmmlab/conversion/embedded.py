"""The config inside of a checkpoint, which somebody else made: read as data, built by name alone.

A config names what is to be built, and a name with dots may be any function of any package. Only
names that the hosts registered are left, so that looking at a file runs nothing of it.
"""

from typing import Any

from mmengine.config import Config

from wsbcn_mm.openmmlab.config import read_text

HOSTS = ('mmdet', 'mmseg')  # 'mmdet.ResNet' is the ResNet of mmdet's registry


def config_in(text: str) -> Config:
    """The config of a checkpoint's ``meta``, with registered names alone.

    Raises:
        ValueError: it is more than data.
    """
    cfg = read_text(text)
    cfg.load_from = None
    return Config(_registered(cfg.to_dict()))


def _registered(value: Any) -> Any:
    """Without the modules in names of types: ``'mmdet.ResNet'``, ``'Conv2d'``."""
    if isinstance(value, dict):
        return {
            key: _name(item)
            if key in ('type', 'kind') and isinstance(item, str)
            else _registered(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_registered(item) for item in value]
    return value


def _name(dotted: str) -> str:
    package, dot, _ = dotted.partition('.')
    name = dotted.rpartition('.')[2]
    return f'{package}.{name}' if dot and package in HOSTS else name
