"""Modules that attributes refer to beside the module tree, where a new layer has to stand as well.

A forward pass may go by ``self.steps = [self.conv, self.norm]``, a dictionary, an object or a
`functools.partial`: with another layer in the tree alone, the old one would go on running there.
What cannot be looked into (proxies, iterators, objects of other languages) is left as it is.
"""

import collections
import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 100  # of containers in containers; what lies deeper is not looked for
_LONG = 64  # a list of more that begins with a number or a text holds those alone
_OF_TORCH = frozenset(vars(nn.Module()))
_VALUES = frozenset((str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device))
_LEAVES = (Tensor, type, types.ModuleType)
_OPAQUE = ('torch', 'numpy', 'builtins', __package__)  # objects of theirs hold no layers of a model

Visit = Callable[[nn.Module], nn.Module]


def found(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that attributes in a model refer to, each with one attribute that does."""
    places: dict[nn.Module, str] = {}
    tree = dict.fromkeys(model.modules())
    seen: set[nn.Module] = set()
    memo: _Memo = {}
    for module in tree:
        for name, value in _attributes(module):
            where = f'attribute {name!r} of a {type(module).__name__}'

            def note(reached: nn.Module, where: str = where) -> nn.Module:
                if reached in tree:
                    places.setdefault(reached, where)
                for _, _, child in _children_outside(reached, tree, seen):
                    places.setdefault(child, where)
                return reached

            _through(value, note, memo, _DEPTH)
    return places


def replace(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Puts new modules wherever the tree or an attribute refers to the old ones.

    Args:
        model: Changed in place, as are the containers and objects that its attributes refer to.
        new: By the ``id`` of the old module.
    """
    tree = dict.fromkeys(model.modules())
    seen: set[nn.Module] = set()
    memo: _Memo = {}

    def put(reached: nn.Module) -> nn.Module:
        for holder, name, child in list(_children_outside(reached, tree, seen)):
            holder._modules[name] = new.get(id(child), child)
        return new.get(id(reached), reached)

    # The new ones may have taken over attributes of the old ones.
    for module in (*tree, *(part for layer in new.values() for part in layer.modules())):
        for name, value in _attributes(module):
            changed = _through(value, put, memo, _DEPTH)
            if changed is not value:
                vars(module)[name] = changed
    replace_children(model, new)


def replace_children(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Puts new modules wherever the tree refers to the old ones; see `replace`."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in new:
                module._modules[name] = new[id(child)]


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if name not in _OF_TORCH]


def _children_outside(
    module: nn.Module, tree: Mapping[nn.Module, Any], seen: set[nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Modules of the tree that one outside of it has as children: holder, name, child."""
    if module in tree or module in seen:
        return
    seen.add(module)
    for name, child in module._modules.items():
        if child in tree:
            yield module, name, child  # type: ignore[misc]  # no None in a tree
        elif child is not None:
            yield from _children_outside(child, tree, seen)


# ----------------------------------------------------------------------------------------------
# Values, with every module in them replaced by what `visit` says: mutable ones in place

_Memo = dict[int, tuple[Any, Any]]
"""By id: the value, which must live as long, and what has become of it."""


def _through(value: Any, visit: Visit, memo: _Memo, depth: int) -> Any:
    kind = type(value)  # not isinstance(), which proxies answer for another object
    if kind in _VALUES or depth == 0 or issubclass(kind, _LEAVES):
        return value
    if issubclass(kind, nn.Module):
        return visit(value)
    if id(value) in memo:
        return memo[id(value)][1]
    memo[id(value)] = value, value
    changed = _looked_into(value, kind, lambda v: _through(v, visit, memo, depth - 1))
    memo[id(value)] = value, changed
    return changed


def _looked_into(value: Any, kind: type, look: Callable[[Any], Any]) -> Any:
    # By the methods of torch's and Python's own classes alone: a derived one may forbid it.
    if issubclass(kind, (list, collections.deque)):
        base: Any = list if issubclass(kind, list) else collections.deque
        if base.__len__(value) <= _LONG or type(base.__getitem__(value, 0)) not in _VALUES:
            for i, part in enumerate(base.__iter__(value)):
                _set(base, value, i, part, look(part))
    elif issubclass(kind, dict):
        _look_into_dict(value, look)
    elif issubclass(kind, (tuple, frozenset)):
        base = tuple if issubclass(kind, tuple) else frozenset
        old = list(base.__iter__(value))
        parts = [look(part) for part in old]
        if any(a is not b for a, b in zip(parts, old)):
            new = base.__new__(kind, parts)
            if kind.__dictoffset__:
                _dict_of(new).update(_dict_of(value))
            return new
    elif issubclass(kind, set):
        old = list(set.__iter__(value))
        parts = [look(part) for part in old]
        if any(a is not b for a, b in zip(parts, old)):
            set.clear(value)
            set.update(value, parts)
    elif kind is functools.partial:
        parts = [look(part) for part in (value.func, value.args, value.keywords)]
        if parts[0] is not value.func or parts[1] is not value.args:
            return functools.partial(parts[0], *parts[1], **parts[2])
    elif kind is types.MethodType:
        owner = look(value.__self__)
        if owner is not value.__self__:
            of_kind = types.MethodType(value.__func__, owner)
            return getattr(owner, getattr(value.__func__, '__name__', ''), of_kind)
    elif kind is types.FunctionType:
        _look_into_function(value, look)
    elif str(kind.__module__).partition('.')[0] not in _OPAQUE:
        _look_into_object(value, kind, look)
    return value


def _look_into_dict(value: dict[Any, Any], look: Callable[[Any], Any]) -> None:
    # Not its own items(): mmengine's configs import packages in it.
    items = list(dict.items(value))
    for key, part in items:
        _set(dict, value, key, part, look(part))
    keys = [look(key) for key, _ in items]
    if any(new is not old for new, (old, _) in zip(keys, items)):
        parts = list(dict.values(value))
        dict.clear(value)
        dict.update(value, zip(keys, parts))


def _look_into_function(value: types.FunctionType, look: Callable[[Any], Any]) -> None:
    defaults = look(value.__defaults__)
    if defaults is not value.__defaults__:
        value.__defaults__ = defaults
    look(value.__kwdefaults__)
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            part = cell.cell_contents
            changed = look(part)
            if changed is not part:
                cell.cell_contents = changed


def _look_into_object(value: Any, kind: type, look: Callable[[Any], Any]) -> None:
    if kind.__dictoffset__:
        attributes = _dict_of(value)
        for name, part in list(dict.items(attributes)):
            _set(dict, attributes, name, part, look(part))
    for slot in _slots(kind):
        try:
            part = slot.__get__(value, kind)
        except AttributeError:  # not set
            continue
        changed = look(part)
        if changed is not part:
            slot.__set__(value, changed)


def _dict_of(value: Any) -> dict[str, Any]:
    for base in type(value).__mro__:  # a class may give the name to something else
        descriptor = vars(base).get('__dict__')
        if type(descriptor) is types.GetSetDescriptorType:
            attributes: dict[str, Any] = descriptor.__get__(value)
            return attributes
    return {}


@functools.cache
def _slots(kind: type) -> list[types.MemberDescriptorType]:
    members = (member for base in kind.__mro__ for member in vars(base).values())
    return [member for member in members if isinstance(member, types.MemberDescriptorType)]


def _set(base: Any, container: Any, key: Any, old: Any, new: Any) -> None:
    """Without the methods of a derived class, which may forbid it."""
    if new is not old:
        base.__setitem__(container, key, new)
