"""Configs out of somebody's checkpoint: read as data, and built without running what they name."""

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmengine import registry as registries
from mmengine.config import Config

from wsbcn_mm.openmmlab import compat
from wsbcn_mm.openmmlab.config import HOSTS, dicts_in
from wsbcn_mm.openmmlab.errors import first_line

# Classes of the hosts that evaluate an argument as Python (a mode of OpenCV) when they are built.
EVALUATING = {'CameraMotionCompensation'}


def foreign_config(text: str) -> Config:
    """The config in somebody's checkpoint, such that its model can be built without running it.

    `read_text` reads it. Building a model calls what its types name, and mmengine imports a name
    that it does not know: here each of them must be registered by the hosts or by this package, or
    be a plain word that no module has (operators, ``'nms'``: the hosts look them up elsewhere).

    Raises:
        ValueError: it is more than data, has no model of these hosts, or names something else.
    """
    cfg = read_text(text)
    model = cfg.get('model')
    if not isinstance(model, dict):
        raise ValueError('the config has no model')
    scope = cfg.get('default_scope') or str(model.get('type')).partition('.')[0]
    if scope not in HOSTS:
        raise ValueError(f'the config is of none of {", ".join(HOSTS)}: {scope!r}')
    compat.require(scope)
    import_module(f'{scope}.models')
    known = {name for registry in vars(registries).values() for name in _registered(registry)}
    known -= EVALUATING
    for part in dicts_in(model):
        part.pop('_scope_', None)
        for key in {'type', 'kind'} & part.keys():
            name = str(part[key]).rpartition('.')[2]
            if name not in known and not _names_no_module(str(part[key])):
                raise ValueError(f'the config names {part[key]!r}, which no host has registered')
            part[key] = name
    return Config(dict(cfg.to_dict(), default_scope=scope))


def _names_no_module(name: str) -> bool:
    return name.isidentifier() and name not in EVALUATING and find_spec(name) is None


def _registered(registry: object) -> Iterator[str]:
    if isinstance(registry, registries.Registry):
        yield from registry.module_dict
        for child in registry.children.values():
            yield from _registered(child)


def read_text(text: str) -> Config:
    """A config that was written as text, as checkpoints hold theirs, read as data.

    Nothing of it runs: assignments of numbers, texts, lists, dicts and ``dict(...)`` are all there
    is in what mmengine writes (``Config.pretty_text``), and all that is understood.

    Raises:
        ValueError: there is something else in it.
    """
    content = {}
    try:
        for statement in ast.parse(text).body:
            if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
                raise _not_data(statement)
            target = statement.targets[0]
            if not isinstance(target, ast.Name):
                raise _not_data(statement)
            content[target.id] = _value(statement.value)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f'the text is no config\n  {first_line(error)}') from error
    return Config(content)


def _value(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        found: dict[str, Any] = {}
        for part in node.args:
            found |= _value(part)
        for keyword in node.keywords:
            found |= (
                _value(keyword.value)
                if keyword.arg is None
                else {keyword.arg: _value(keyword.value)}
            )
        return found
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return kind(_value(item) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant):
        return node.value
    raise _not_data(node)


def _not_data(node: ast.AST | None) -> ValueError:
    text = '**' if node is None else ast.unparse(node)
    return ValueError(f'the config is more than data: {text[:80]}')
