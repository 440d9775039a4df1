"""Where the config says something, and what sets it otherwise."""

from __future__ import annotations

from torch import nn

from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.places import dotted


def owners(model: nn.Module) -> dict[str, str]:
    """For each module name: where the config says it."""
    return {name: dotted(place) for name, place in probe.owners(model).items()}


def line(where: str, value: str) -> str:
    """What sets one value: a statement of a child config, ``model = dict(backbone=dict(...))``."""
    if '[' in where:  # a child replaces lists as a whole; the command line takes no dicts
        if value.startswith('dict('):
            return f'{where} = {value}  (lists are replaced as a whole)'
        return f'--cfg-options {where.replace("[", ".").replace("]", "")}={value}'
    keys = where.split('.')
    for key in reversed(keys[1:]):
        value = f'dict({key}={value})'
    return f'{keys[0]} = {value}'
