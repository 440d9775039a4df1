"""Puts modules in place of others wherever a model refers to them, beside its tree as well.

A forward pass may go by ``self.steps = [self.conv, self.norm]``, a dictionary, an object or a
`functools.partial`: with another layer in the tree alone, the old one would go on running there.
Weak references count. What cannot be looked into (proxies, iterators, attributes of classes, what
belongs to another thread, objects of other languages) is left as it is.
"""

import collections
import contextlib
import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LONG = 64  # a list of more is looked through for its kinds first
_OF_TORCH = frozenset(vars(nn.Module()))
_VALUES = frozenset((str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device))
_LEAVES = (Tensor, type, types.ModuleType, torch.jit.ScriptModule)
# Objects of theirs, and of this package, hold no layers of a model.
_OPAQUE = ('torch', 'numpy', 'builtins', __name__.partition('.')[0])


def modules_in_attributes(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that attributes in a model refer to, each with one attribute that does."""
    places: dict[nn.Module, str] = {}
    where = ''

    def note(reached: nn.Module) -> nn.Module:
        places.setdefault(reached, where)
        return reached

    walk = _Walk(model, note)
    for module in model.modules():
        for name, value in _attributes(module):
            where = f'attribute {name!r} of a {type(module).__name__}'
            walk.through(value)
    return places


def replace(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Puts new modules wherever the tree or an attribute refers to the old ones.

    Args:
        model: Changed in place, as are the containers and objects that its attributes refer to.
        new: By the ``id`` of the old module.
    """
    walk = _Walk(model, lambda reached: new.get(id(reached), reached))
    # The new ones may have taken over attributes of the old ones.
    parts = [part for layer in new.values() for part in layer.modules()]
    for module in dict.fromkeys([*model.modules(), *parts]):
        for name, value in _attributes(module):
            _set(dict, vars(module), name, value, walk.through(value))
    replace_children(model, new)


def replace_children(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Puts new modules wherever the tree refers to the old ones; see `replace`."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in new:
                module._modules[name] = new[id(child)]


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """What others keep on a module, its hooks among it."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in _OF_TORCH or (value and 'hook' in name and isinstance(value, dict))
    ]


# ----------------------------------------------------------------------------------------------
# Values, with every module of the tree in them replaced by what `visit` says: mutable ones in place

_Steps = Generator[Any, Any, Any]
"""Yields the parts of a value, is sent what becomes of each; returns what becomes of the value."""


class _Walk:
    """Looks into values, into each once; a loop, for chains of objects may be long."""

    def __init__(self, model: nn.Module, visit: Callable[[nn.Module], nn.Module]) -> None:
        self._visit = visit
        self._tree = {id(module): module for module in model.modules()}
        # By id: the value, which must live as long, and what has become of it.
        self._memo: dict[int, tuple[Any, Any]] = {}
        for module in self._tree.values():  # the tree itself, which functools.wraps(module) copies
            for own in (vars(module), module._modules):
                self._memo[id(own)] = own, own

    def through(self, value: Any) -> Any:
        """What becomes of a value."""
        under_way: list[tuple[Any, _Steps]] = []
        while True:
            steps = self._begun(value)
            if steps is None:
                known = self._memo.get(id(value))
                result = self._visit(value) if id(value) in self._tree else value
                result = result if known is None else known[1]
            else:
                self._memo[id(value)] = value, value
                under_way.append((value, steps))
                result = None
            while under_way:
                whole, steps = under_way[-1]
                try:
                    value = steps.send(result)
                    break
                except StopIteration as end:
                    result = end.value
                    self._memo[id(whole)] = whole, result
                    under_way.pop()
            else:
                return result

    def _begun(self, value: Any) -> _Steps | None:
        """None for what has no parts, or is known, or belongs to the tree."""
        kind = type(value)  # not isinstance(), which proxies answer for another object
        if kind in _VALUES or issubclass(kind, _LEAVES):
            return None
        if id(value) in self._tree or id(value) in self._memo:
            return None
        if issubclass(kind, weakref.ref):  # of those alone: what it refers to may be anything
            return _of_weak(value, kind) if id(value()) in self._tree else None
        return _parts(value, kind)


def _parts(value: Any, kind: type) -> _Steps | None:
    # By the methods of torch's and Python's own classes alone: a derived one may forbid it.
    base: Any
    for base in (list, collections.deque):
        if issubclass(kind, base):
            return _of_items(value, base)
    if issubclass(kind, dict):
        return _of_dict(value)
    for base in (tuple, frozenset):
        if issubclass(kind, base):
            return _of_unchangeable(value, kind, base)
    if issubclass(kind, set):
        return _of_set(value)
    if issubclass(kind, functools.partial):
        return _of_partial(value)
    if kind is types.MethodType:
        return _of_method(value)
    if kind is types.FunctionType:
        return _of_function(value)
    if kind is types.MappingProxyType:
        return _of_items(gc.get_referents(value), list, value)  # a dictionary
    if issubclass(kind, nn.Module):  # outside of the tree
        return _of_module(value)
    numpy = sys.modules.get('numpy')
    if numpy is not None and issubclass(kind, numpy.ndarray):
        return _of_items(value.flat, type(value.flat), value) if value.dtype == object else None
    if str(kind.__module__).partition('.')[0] not in _OPAQUE:
        return _of_object(value, kind)
    return None


def _of_items(items: Any, base: Any, value: Any = None) -> _Steps:
    parts = list(base.__iter__(items))  # once: an array's iterator does not begin anew
    if len(parts) <= _LONG or not _VALUES.issuperset(map(type, parts)):
        for i, part in enumerate(parts):
            changed = yield part
            with contextlib.suppress(ValueError):  # a read-only array
                _set(base, items, i, part, changed)
    return items if value is None else value


def _of_dict(value: dict[Any, Any]) -> _Steps:
    # Not its own items(): mmengine's configs import packages in it.
    items = list(dict.items(value))
    for key, part in items:
        _set(dict, value, key, part, (yield part))
    keys = []
    for key, _ in items:
        keys.append((yield key))
    if any(new is not old for new, (old, _) in zip(keys, items)):
        parts = list(dict.values(value))
        base: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
        base.clear(value)
        base.update(value, zip(keys, parts))
    return value


def _of_unchangeable(value: Any, kind: type, base: Any) -> _Steps:
    old, parts = list(base.__iter__(value)), []
    for part in old:
        parts.append((yield part))
    if all(a is b for a, b in zip(parts, old)):
        return value
    new = base.__new__(kind, parts)
    if kind.__dictoffset__:
        _dict_of(new).update(_dict_of(value))
    return new


def _of_set(value: Any) -> _Steps:
    old, parts = list(set.__iter__(value)), []
    for part in old:
        parts.append((yield part))
    if any(a is not b for a, b in zip(parts, old)):
        set.clear(value)
        set.update(value, parts)
    return value


def _of_partial(value: Any) -> _Steps:
    base: Any = functools.partial
    func, args, keywords, attributes = base.__reduce__(value)[2]
    new = (yield func), (yield args), (yield keywords)
    yield attributes
    if new[0] is not func or new[1] is not args:
        base.__setstate__(value, (*new, attributes))
    return value


def _of_method(value: types.MethodType) -> _Steps:
    owner = yield value.__self__
    if owner is value.__self__:
        return value
    of_kind = types.MethodType(value.__func__, owner)
    return getattr(owner, getattr(value.__func__, '__name__', ''), of_kind)


def _of_function(value: types.FunctionType) -> _Steps:
    defaults = yield value.__defaults__
    if defaults is not value.__defaults__:
        value.__defaults__ = defaults
    yield value.__kwdefaults__
    yield value.__dict__
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            part = cell.cell_contents
            changed = yield part
            if changed is not part:
                cell.cell_contents = changed
    return value


def _of_weak(value: Any, kind: type) -> _Steps:
    old = value()
    new = yield old
    if new is old:
        return value
    if kind is weakref.KeyedRef:
        return weakref.KeyedRef(new, value.__callback__, value.key)
    return weakref.ref(new, value.__callback__) if kind is weakref.ref else value


def _of_module(value: nn.Module) -> _Steps:
    for name, part in _attributes(value):
        _set(dict, vars(value), name, part, (yield part))
    for name, child in list(value._modules.items()):
        value._modules[name] = yield child
    return value


def _of_object(value: Any, kind: type) -> _Steps:
    if kind.__dictoffset__:
        attributes = _dict_of(value)
        for name, part in list(dict.items(attributes)):
            _set(dict, attributes, name, part, (yield part))
    for slot in _slots(kind):
        try:
            part = slot.__get__(value, kind)
        except AttributeError:  # not set
            continue
        changed = yield part
        if changed is not part:
            with contextlib.suppress(AttributeError, TypeError):  # of a class in C, read-only
                slot.__set__(value, changed)
    return value


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
