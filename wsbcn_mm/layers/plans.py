"""What a scope knows of a model from one pass to the next: layers, never a result.

Which layers there are, in which order they are used, before which of them somebody else's code
runs, and what can be standardized in one call.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from wsbcn_mm import compat
from wsbcn_mm.backends import cpu, triton
from wsbcn_mm.backends.layouts import is_dense
from wsbcn_mm.backends.states import is_captured
from wsbcn_mm.networks.own_classes import is_ours

HOOKS_THAT_WRITE_NO_WEIGHT: list[Callable[..., Any]] = []
"""Forward pre-hooks of this package."""


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model as it is now."""
    plan = _plans.get(model)
    if plan is None:
        _plans[model] = plan = Plan(model)
    else:
        plan.look_where_changed(model)
    return plan


class Plan:
    """The layers of a model, and in which order they are used."""

    def __init__(self, model: nn.Module) -> None:
        self._orders: dict[bool, list[weakref.ref[Any]]] = {}
        self.look(model)

    def look(self, model: nn.Module) -> None:
        """Finds the layers."""
        self._seen = _registrations.count
        found = _layers_by_module(model)
        self._layers = [weakref.ref(layer) for layer in found[model]]
        self._below = [
            (weakref.ref(module), [weakref.ref(layer) for layer in below])
            for module, below in found.items()
            if below
        ]
        # FullyShardedDataParallel gathers the weights of one of its units at a time, and wants
        # their gradients when the unit's backward pass ends: no call may span several.
        fsdp = sys.modules.get('torch.distributed.fsdp')
        units = tuple(getattr(fsdp, name) for name in _UNITS if hasattr(fsdp, name))
        self._apart = any(isinstance(module, units) for module in found)

    def look_where_changed(self, model: nn.Module) -> None:
        """As `look`, unless no module has become part of another one since."""
        if self._seen != _registrations.count:
            self.look(model)

    def layers(self) -> set[Any]:
        """All of them."""
        return set(_alive(self._layers))

    def hooked(self, model: nn.Module, opener: nn.Module | None) -> Collection[Any]:
        """The layers before whose use somebody else's code runs.

        It may write a weight through ``.data`` (masked convolutions do): a forward pre-hook of the
        layer, or of a module that it lies in, or of all modules; a method of the layer's own. Those
        too whose weight is the same memory.

        Args:
            model: The model.
            opener: A module whose pre-hooks have run before any use.
        """
        of_all = torch.nn.modules.module._global_forward_pre_hooks
        look = survey if cpu.entries is None else cpu.entries.survey
        kinds = look(self._layers, self._below, opener)
        if kinds is not None and not of_all and not any(map(_runs_foreign_code, kinds)):
            return ()
        layers = self.layers()
        if not self._apart and any(type(_own_weight(layer)) not in _PLAIN for layer in layers):
            self.look(model)  # it may have been sharded since
        return layers if of_all else self._hooked(opener)

    def _hooked(self, opener: nn.Module | None) -> set[Any]:
        layers = self.layers()
        foreign = {kind for kind in {type(layer) for layer in layers} if _runs_foreign_code(kind)}
        found = {
            layer
            for layer in layers
            if type(layer) in foreign or not _METHODS.isdisjoint(layer.__dict__)
        }
        for of_module, below in self._below:
            module = of_module()
            hooks = None if module is None else module._forward_pre_hooks
            if hooks and module is not opener and any(map(_may_write, hooks.values())):
                found.update(_alive(below))
        written = {memory for layer in found if (memory := _memory(layer)) is not None}
        return {layer for layer in layers if layer in found or _memory(layer) in written}

    def order(self, training: bool) -> list[Any]:
        """Those that the last pass used, in the order of use; before that, all."""
        return [] if self._apart else _alive(self._orders.get(training, self._layers))

    def remember(self, training: bool, used: list[Any]) -> None:
        """Notes what a pass used."""
        self._orders[training] = [weakref.ref(layer) for layer in used]


_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def _alive(refs: list[weakref.ref[Any]]) -> list[Any]:
    return [layer for ref in refs if (layer := ref()) is not None]


def _layers_by_module(model: nn.Module) -> dict[nn.Module, dict[Any, None]]:
    """Of each module of a model the layers that it is or contains, in the order of the tree."""
    found: dict[nn.Module, dict[Any, None]] = {}
    _look_below(model, found)
    return found


# Not a function inside the other one: it would refer to itself, and keep the model until a
# garbage collection.
def _look_below(module: nn.Module, found: dict[nn.Module, dict[Any, None]]) -> dict[Any, None]:
    below = found.get(module)
    if below is None:
        below = found[module] = {}
        if hasattr(type(module), 'standardizes_rows'):  # wrappers hand on what they wrap
            below[module] = None
        for child in module._modules.values():
            if child is not None:
                below.update(_look_below(child, found))
    return below


class _Registrations:
    """Counts how often, in this process, a module became part of another one."""

    count = 0

    def __call__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():  # which would compile anew for each number
            self.count += 1


_registrations = _Registrations()
register_module_module_registration_hook(_registrations)


_UNITS = ('FSDPModule', 'FullyShardedDataParallel')
_METHODS = {'forward', 'standardized_weight'}


def _runs_foreign_code(kind: Any) -> bool:
    ours = all(is_ours(getattr(kind, name)) for name in _METHODS)
    return not ours or kind.__call__ is not nn.Module.__call__


def _may_write(hook: Callable[..., Any]) -> bool:
    return all(hook is not known for known in HOOKS_THAT_WRITE_NO_WEIGHT)


def survey(
    layers: list[weakref.ref[Any]],
    below: list[tuple[weakref.ref[nn.Module], Any]],
    opener: nn.Module | None,
) -> list[type] | None:
    """As the compiled extension's; see nodes/python.h."""
    kinds: dict[type, None] = {}
    for layer in _alive(layers):
        kinds[type(layer)] = None
        if not _METHODS.isdisjoint(layer.__dict__) or type(_own_weight(layer)) not in _PLAIN:
            return None
    modules = [of_module() for of_module, _ in below]
    if any(m is not None and m is not opener and m._forward_pre_hooks for m in modules):
        return None
    return list(kinds)


_PLAIN = (nn.Parameter, Tensor)


def _own_weight(layer: Any) -> Tensor | None:
    # Not `layer.weight`: reading a parametrized weight computes it.
    own: Tensor | None = layer._parameters.get('weight')
    return own


def _memory(layer: Any) -> tuple[int, int] | None:
    own = _own_weight(layer)
    # What transforms hand on has none of its own, and nothing is shared inside them.
    if own is None or type(own) not in _PLAIN or compat.in_transform():
        return None
    return own.untyped_storage()._cdata, int(own.storage_offset())


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a tensor whose changes torch counts, and what holds for it is known."""
    if type(weight) not in _PLAIN or weight.is_inference():
        return False
    return triton.HAS_NODES or not is_captured(weight)


def gather(
    order: list[Any],
    place: int,
    left_out: tuple[Container[Any], ...],
    layer: Any,
    weight: Tensor,
    most_bytes: int,
) -> tuple[list[Any], list[Tensor]]:
    """As the compiled extension's; see nodes/python.h."""
    layers, weights = [layer], [weight]
    size = _joins(layer, weight, layer, weight)
    for member in order[place + 1 :] if size else ():
        own = _own_weight(member)
        stays = own is None or any(member in container for container in left_out)
        more = 0 if own is None or stays else _joins(layer, weight, member, own)
        if own is None or not more:
            continue
        size += more
        if size > most_bytes:
            break
        layers.append(member)
        weights.append(own)
    return layers, weights


def _has_its_memory(weight: Tensor) -> bool:
    # Somebody may have freed that of a layer that this pass does not use.
    values = weight.storage_offset() + weight.numel()
    return weight.untyped_storage().nbytes() >= values * weight.itemsize


def _joins(layer: Any, weight: Tensor, other: Any, of_other: Tensor) -> int:
    """The bytes of another weight that can be standardized in the same call; else 0."""
    joins = (
        is_plain(of_other)
        and of_other.dtype is weight.dtype
        and of_other.device == weight.device
        and of_other.requires_grad == weight.requires_grad
        and of_other.dim() > 0
        and of_other.numel() > len(of_other)  # else it is refused, when it is used
        and is_dense(of_other)
        and _has_its_memory(of_other)
        and other.eps == layer.eps
        and other.formula == layer.formula
        and other.standardizes_rows()
    )
    return of_other.nbytes if joins else 0
