"""Which settings of a config a statement of the hosts used when it stopped."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import torch

from wsbcn_mm.openmmlab.explain.traces import OUT_OF_MEMORY, Build, Frame, after, object_of
from wsbcn_mm.openmmlab.explain.wording import cut, said, short
from wsbcn_mm.openmmlab.places import Place, dotted, place_of, same, value_at, walk


def stopped_at_settings(
    root: dict, build: Build, frames: list[Frame], error: BaseException
) -> str | None:
    """What ran stopped in code of the hosts, at a statement that uses values of the config."""
    inner = after(build, frames) if build.runs else None
    if inner is None or isinstance(error, OUT_OF_MEMORY):
        return None
    # A comprehension is a function of its own; torch and the dicts of a config do as they are told.
    told = ('torch', 'mmengine.config')
    own = [f for f in inner if not f.module.startswith(told) and f.code.co_name[0] != '<']
    last = own[-1] if own else inner[0]
    statement = last.statement()
    if statement is None or not (last.is_released or last.raises):
        return None
    names, attributes = _names_of(statement)
    owner = last.names.get('self')
    if attributes and isinstance(build.kind, type) and not isinstance(owner, build.kind):
        # A part of it that the model has under another name (the loss of a head).
        build = object_of(root, owner, ('model',)) or build
    used, part = {*names, *attributes}, build.part if isinstance(build.part, dict) else {}
    found = [((*build.place, key), value) for key, value in part.items() if key in used]
    if isinstance(error, KeyError):  # of what was looked up by a name out of the config
        asked = error.args[:1]
        found = found or [
            ((*build.place, key), value)
            for key, value in part.items()
            if key != 'type' and asked and asked[0] in (value, *(value if _many(value) else ()))
        ]
    found = found or _handed_on(root, build, last, names)
    if not found:
        return None
    had = [f'{name} {size}' for name in names if (size := _size(last.names.get(name)))]
    return (
        f'{" or ".join(dotted(place) for place, _ in found)}: {build.name} stopped at it\n'
        f'  {said(error)}{what_there_is(error, frames)}\n'
        f'  got {", ".join(short(value) for _, value in found)}\n'
        f'  at {last.module}: {cut(last.statement_text(), 120)}'
        + (f'\n  with {", ".join(had)}' if had else '')
    )


def what_there_is(error: BaseException, frames: list[Frame]) -> str:
    """A line with the keys of the dict in which one was not found; '' for any other error."""
    own = [f for f in frames if not f.module.startswith('mmengine.config')]
    statement = own[-1].statement() if own and isinstance(error, KeyError) else None
    if statement is None or not error.args:
        return ''
    names, attributes = _names_of(statement)
    held = [own[-1].names.get(name) for name in names]
    held += [getattr(own[-1].names.get('self'), name, None) for name in attributes]
    for value in held:
        if isinstance(value, dict) and value and error.args[0] not in value:
            return f'\n  there are {cut(", ".join(map(str, value)), 300)}'
    return ''


def _many(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _handed_on(root: dict, build: Build, last: Frame, names: list[str]) -> list[tuple[Place, Any]]:
    """What a function was given out of the config, and uses under these names."""
    model = list(walk(root.get('model'), ('model',)))
    for name in names:
        value = last.names.get(name)
        alike = [p for p, v in model if type(v) is type(value) and same(v, value)]
        meant = [p for p in alike if p[-1] == name or isinstance(value, str)]
        if len(meant) == 1:
            return [(meant[0], value)]
    for name, value in last.names.items():
        place = place_of(root, value, build.place) if isinstance(value, dict) and value else None
        if place is not None and _made_of(name, last) & set(names):
            return [(place, value_at(root, place))]
    return []


def _made_of(name: str, frame: Frame) -> set[str]:
    """A variable of a function, and those that were computed from it."""
    made = {name}
    for node in ast.walk(frame.function() or ast.Module([], [])):
        if isinstance(node, ast.Assign):
            used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            if used & made:
                made |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return made


def _names_of(statement: ast.stmt) -> tuple[list[str], set[str]]:
    """The variables of a statement and the attributes of ``self``; nothing of its body."""
    names: list[str] = []
    attributes: set[str] = set()
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.Name):
            names.append(node.id)
        if isinstance(node, ast.Attribute) and getattr(node.value, 'id', None) == 'self':
            attributes.add(node.attr)
        todo += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
    return list(dict.fromkeys(names)), attributes


def _size(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f'of shape {tuple(value.shape)}'
    return f'of length {len(value)}' if isinstance(value, (tuple, list)) else ''
