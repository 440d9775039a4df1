"""Modules that attributes refer to beside the module tree, where a new layer has to stand as well.

A forward pass may go by ``self.steps = [self.conv, self.norm]``, a dictionary, an object or a
`functools.partial`: with another layer in the tree alone, the old one would go on running there.
"""

import collections
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 12  # of containers in containers; what lies deeper is not looked for
_OF_TORCH = frozenset(vars(nn.Module()))
_LEAVES = (Tensor, str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.dtype)
_OPAQUE = ('torch', 'numpy', 'builtins', __package__)  # objects of theirs hold no layers of a model

Visit = Callable[[nn.Module], nn.Module]


def found(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that attributes in a model refer to, each with one attribute that does."""
    places: dict[nn.Module, str] = {}
    tree = set(model.modules())
    memo: dict[int, Any] = {}
    for module in tree:
        for name in vars(module).keys() - _OF_TORCH:
            reached: list[nn.Module] = []

            def note(part: nn.Module, reached: list[nn.Module] = reached) -> nn.Module:
                reached.extend([part] if part in tree else part.modules())
                return part

            _through(vars(module)[name], note, memo, _DEPTH)
            where = f'attribute {name!r} of a {type(module).__name__}'
            places.update((part, where) for part in reached if part not in places)
    return places


def replace(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Puts new modules wherever the tree or an attribute refers to the old ones.

    Args:
        model: Changed in place, as are the containers and objects that its attributes refer to.
        new: By the ``id`` of the old module.
    """

    def put(reached: nn.Module) -> nn.Module:
        if id(reached) not in new and reached not in tree:  # held by an attribute alone
            _replace_children(reached, new)
        return new.get(id(reached), reached)

    tree = set(model.modules())
    memo: dict[int, Any] = {}
    # The new ones may have taken over attributes of the old ones.
    for module in tree | {part for layer in new.values() for part in layer.modules()}:
        for name in vars(module).keys() - _OF_TORCH:
            value = vars(module)[name]
            changed = _through(value, put, memo, _DEPTH)
            if changed is not value:
                vars(module)[name] = changed
    _replace_children(model, new)


def _replace_children(root: nn.Module, new: Mapping[int, nn.Module]) -> None:
    for module in list(root.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in new:
                module._modules[name] = new[id(child)]


def _through(value: Any, visit: Visit, memo: dict[int, Any], depth: int) -> Any:
    """The value with every module in it replaced by what ``visit`` says; mutable ones in place."""
    if isinstance(value, _LEAVES) or depth == 0:
        return value
    if isinstance(value, nn.Module):
        return visit(value)
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = value
    memo[id(value)] = _looked_into(value, lambda part: _through(part, visit, memo, depth - 1))
    return memo[id(value)]


def _looked_into(value: Any, look: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, collections.deque)):
        for i, part in enumerate(value):
            _set(value, i, part, look(part))
    elif isinstance(value, dict):
        for key, part in list(value.items()):
            _set(value, key, part, look(part))
        keys = {key: look(key) for key in value}
        if any(a is not b for a, b in keys.items()):
            items = [(keys[key], part) for key, part in value.items()]
            value.clear()
            value.update(items)
    elif isinstance(value, (tuple, set, frozenset)):
        parts = [look(part) for part in value]
        if any(a is not b for a, b in zip(parts, value)):
            return value._make(parts) if hasattr(value, '_make') else type(value)(parts)
    elif isinstance(value, functools.partial):
        parts = [look(part) for part in (value.func, value.args, value.keywords)]
        if parts[0] is not value.func or parts[1] is not value.args:
            return functools.partial(parts[0], *parts[1], **parts[2])
    elif isinstance(value, types.MethodType):
        owner = look(value.__self__)
        if owner is not value.__self__:
            of_kind = types.MethodType(value.__func__, owner)
            return getattr(owner, value.__name__, of_kind)
    elif isinstance(value, types.FunctionType):
        value.__defaults__ = look(value.__defaults__)
        look(value.__kwdefaults__)
        for cell in value.__closure__ or ():
            try:
                part = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            changed = look(part)
            if changed is not part:
                cell.cell_contents = changed
    elif type(value).__module__.partition('.')[0] not in _OPAQUE:
        if type(value).__dictoffset__:
            for name, part in list(vars(value).items()):
                _set(vars(value), name, part, look(part))
        for slot in _slots(type(value)):  # type: ignore[arg-type]
            try:
                part = slot.__get__(value, type(value))
            except AttributeError:  # not set
                continue
            changed = look(part)
            if changed is not part:
                slot.__set__(value, changed)
    return value


@functools.cache
def _slots(kind: type) -> list[types.MemberDescriptorType]:
    members = (member for base in kind.__mro__ for member in vars(base).values())
    return [member for member in members if isinstance(member, types.MemberDescriptorType)]


def _set(container: Any, key: Any, old: Any, new: Any) -> None:
    if new is not old:
        container[key] = new
