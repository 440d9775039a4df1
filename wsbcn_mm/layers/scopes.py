"""How long a standardized weight holds, and what is standardized together; see `standardization`.

A `Scope` holds the results of one forward pass, or of a longer block. Of a model, a `Plan`
remembers from one pass to the next which layers it has and in which order they are used: never a
result.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Container
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from wsbcn_mm import backends, distributed
from wsbcn_mm.backends import cpu, triton
from wsbcn_mm.backends.states import is_captured, is_transformed, state_of
from wsbcn_mm.backends.together import FirstUses, Results, is_dense, standardize_all
from wsbcn_mm.layers import optimizer_steps as optimizer_steps  # heard of from here on
from wsbcn_mm.own_classes import is_ours

ON_CPU = 4 * 2**20
"""Bytes that a call standardizes on a CPU: they stay in its cache for the convolutions."""
OVER_RANKS = 16 * 2**20
"""Elsewhere, where there are several processes: the gradients of a chunk are there when the last
of them is, and the buckets of DistributedDataParallel, 25 MB, shall not wait for each other."""
ALONE = 256 * 2**20
"""Where there is one process: on a GPU a call costs more than its work."""


HOOKS_THAT_WRITE_NO_WEIGHT: list[Callable[..., Any]] = []
"""Forward pre-hooks of this package."""


class Layer(Protocol):
    """What a scope has to know of a layer."""

    weight: Tensor
    eps: float
    formula: str
    standardized_hooks: dict[int, Callable[[Tensor], None]]

    def standardize(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes the standardized weight."""

    def standardizes_rows(self) -> bool:
        """Whether `standardize` is WS of ``weight.flatten(1)``, which can be done for many."""


def computed(layer: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The standardized weight, computed for this use."""
    result: Tensor = layer.standardize(weight, dtype)
    announce(layer, result)
    return result


def announce(layer: Any, result: Tensor) -> None:
    """Calls the hooks of a layer with a new result."""
    if layer.standardized_hooks:
        for hook in list(layer.standardized_hooks.values()):
            hook(result)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.scopes: list[Scope] = []


_thread = _Thread()


def open_here() -> list[Scope]:
    """The scopes of this thread, the innermost last."""
    return _thread.scopes


def scope_of(layer: Any) -> Scope | None:
    """The innermost scope that serves a layer."""
    scopes = _thread.scopes
    if not scopes or is_transformed():
        return None
    for scope in reversed(scopes):
        if layer in scope.layers and scope.is_current():
            return scope
    for scope in reversed(scopes):
        if scope.look_again(layer) and scope.is_current():
            return scope
    return None


def drop_abandoned() -> None:
    """Closes the scopes whose pass has ended without closing them."""
    # torch does not call hooks after what is no Exception (KeyboardInterrupt).
    for scope in list(open_here()):
        if not scope.is_running():
            scope.close()
            open_here().remove(scope)


class Scope:
    """Results for the layers of a model, and how long they hold.

    Args:
        model: The model.
        frame: The function call whose end is the end of the scope; None: somebody closes it.
        one_pass: Ends when a backward pass begins.
    """

    def __init__(self, model: nn.Module, frame: FrameType | None, one_pass: bool) -> None:
        self.model = weakref.ref(model)
        self.frame = frame
        self.entered = 1
        self._one_pass = one_pass
        self._task = torch._C._current_graph_task_id()  # the backward pass that this is part of
        self._plan = _plan_of(model)
        self._order = self._plan.order(model, model.training)
        self.layers = self._plan.layers()
        # A pass that the model's own hooks opened: they have run.
        self._hooked_by = model if self.is_of_a_pass() else None
        self._hooked = self._plan.hooked(self.layers, self._hooked_by)
        self._places = {layer: place for place, layer in enumerate(self._order)}
        self._training = model.training
        self._used: dict[Any, None] = {}
        self._tables: dict[tuple[Any, ...], dict[Any, _Held]] = {}
        self._looked_again = False
        self._held: dict[Any, _Held] = {}  # of each layer the one that was found last
        self.find: Callable[[Any], Tensor | None] = _find_nothing
        """What `get` would give a layer, where it is there already; None elsewhere."""
        if cpu.entries is not None:
            # Called once per use of a layer, where every line would be paid.
            self.find = functools.partial(cpu.entries.find, self._held, self._used, frame)

    def is_of_a_pass(self) -> bool:
        """Whether a forward pass opened it, which will close it."""
        return self.frame is not None and self._one_pass

    def enter_again(self) -> None:
        """Another call of the model within its pass: its pre-hooks run once more, between uses."""
        self.entered += 1
        if self._hooked_by is not None:
            self._hooked_by = None
            self._hooked = self._plan.hooked(self.layers, None)
            if self._hooked:
                self._tables.clear()
                self._held.clear()

    def is_running(self) -> bool:
        """Whether the call that opened it has not ended; asked in the thread that opened it."""
        if self.frame is None:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def is_current(self) -> bool:
        """Whether it serves what runs now: not the backward pass of what it computed."""
        return torch._C._current_graph_task_id() == self._task and self.is_running()

    def look_again(self, layer: Any) -> bool:
        """Whether a layer has become part of the model."""
        model = self.model()
        if self._looked_again or model is None:
            return False
        self._looked_again = True
        self._plan.look(model)
        self.layers = self._plan.layers()
        self._hooked = self._plan.hooked(self.layers, self._hooked_by)
        return layer in self.layers

    def get(self, layer: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The standardized weight of one of the layers."""
        if layer in self._hooked:
            return computed(layer, weight, dtype)
        if not _is_plain(weight) or (not self._one_pass and is_captured(weight)):
            return computed(layer, weight, dtype)
        context = (
            dtype,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            backends.forced(),
            torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None,
        )
        table = self._tables.get(context)
        if table is None:
            table = self._tables[context] = {}
        held = table.get(layer)
        value = None if held is None else self._take(layer, weight, held)
        if held is None or value is None:
            held = self._compute(layer, weight, dtype, table)
            value = self._take(layer, weight, held)
        self._held[layer] = held
        # None: another thread has changed the backend meanwhile.
        return computed(layer, weight, dtype) if value is None else value

    def _take(self, layer: Any, weight: Tensor | None, held: _Held) -> Tensor | None:
        results, index, eps, formula = held
        if layer.eps != eps or layer.formula != formula:
            return None
        value = results.take(index, weight)
        if value is not None and results.use(index):
            self._used[layer] = None
            announce(layer, value)
        return value

    def _compute(
        self, layer: Any, weight: Tensor, dtype: torch.dtype, table: dict[Any, _Held]
    ) -> _Held:
        members, weights = self._chunk(layer, weight, table)
        results: Results
        if len(members) == 1:
            results = _Alone(weight, layer.standardize(weight, dtype), self._one_pass)
        else:
            results = standardize_all(weights, layer.eps, layer.formula, dtype, self._one_pass)
        for index, member in enumerate(members):
            table[member] = self._held[member] = results, index, layer.eps, layer.formula
        return table[layer]

    def _chunk(
        self, layer: Any, weight: Tensor, table: dict[Any, _Held]
    ) -> tuple[list[Any], list[Tensor]]:
        """What is standardized together with a layer: those used after it the last time."""
        place = self._places.get(layer)
        if place is None:
            return [layer], [weight]
        left_out = table, self._hooked
        found: tuple[list[Any], list[Tensor]]
        found = (gather if cpu.entries is None else cpu.entries.gather)(
            self._order, place, left_out, layer, weight, most_bytes(weight)
        )
        return found

    def close(self) -> None:
        """Forgets all results."""
        self._tables = {}
        self._held.clear()
        self.find = _find_nothing
        self.frame = None
        if self._one_pass and self._used and list(self._used) != self._order:
            self._plan.remember(self._training, list(self._used))
        self._used.clear()


def _find_nothing(layer: Any) -> None:
    """`Scope.find` without the compiled extension, and of a scope that has ended."""


def most_bytes(weight: Tensor) -> int:
    """How much is standardized in one call together with this weight."""
    if weight.device.type == 'cpu':
        return ON_CPU
    return OVER_RANKS if distributed.world_size() > 1 else ALONE


_PLAIN = (nn.Parameter, Tensor)


def _own_weight(layer: Any) -> Tensor | None:
    # Not `layer.weight`: reading a parametrized weight computes it.
    own: Tensor | None = layer._parameters.get('weight')
    return own


def _is_plain(weight: Tensor) -> bool:
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


def _joins(layer: Any, weight: Tensor, other: Any, of_other: Tensor) -> int:
    """The bytes of another weight that can be standardized in the same call; else 0."""
    joins = (
        _is_plain(of_other)
        and of_other.dtype is weight.dtype
        and of_other.device == weight.device
        and of_other.requires_grad == weight.requires_grad
        and of_other.numel() > 0
        and is_dense(of_other)
        and other.eps == layer.eps
        and other.formula == layer.formula
        and other.standardizes_rows()
    )
    return of_other.nbytes if joins else 0


class _Alone(FirstUses):
    """The result for one weight."""

    def __init__(self, weight: Tensor, value: Tensor, one_pass: bool) -> None:
        super().__init__()
        self._weight, self._value, self._one_pass = weight, value, one_pass
        self._state = state_of(weight, one_pass)

    def take(self, index: int, weight: Tensor | None, /) -> Tensor | None:
        """See `wsbcn_mm.backends.together.Results`."""
        if weight is not self._weight or self._state is None:
            return None
        return self._value if state_of(weight, self._one_pass) == self._state else None


_Held = tuple[Results, int, float, str]
"""Where the result of a layer is, and the eps and formula that it holds for."""


# ----------------------------------------------------------------------------------------------
# What is known of a model from one pass to the next: layers, never results


def _layers_by_module(model: nn.Module) -> dict[nn.Module, dict[Any, None]]:
    """Of each module of a model the layers that it is or contains, in the order of the tree."""
    found: dict[nn.Module, dict[Any, None]] = {}

    def look(module: nn.Module) -> dict[Any, None]:
        below = found.get(module)
        if below is None:
            below = found[module] = {}
            if hasattr(type(module), 'standardizes_rows'):  # wrappers hand on what they wrap
                below[module] = None
            for child in module._modules.values():
                if child is not None:
                    below.update(look(child))
        return below

    look(model)
    return found


class _Registrations:
    """Counts how often, in this process, a module became part of another one."""

    count = 0

    def __call__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():  # which would compile anew for each number
            self.count += 1


_registrations = _Registrations()
register_module_module_registration_hook(_registrations)


_UNITS = ('FSDPModule', 'FullyShardedDataParallel')


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
        return {layer for ref in self._layers if (layer := ref()) is not None}

    def hooked(self, layers: set[Any], model: nn.Module | None) -> set[Any]:
        """Those of the layers before whose use somebody else's code runs.

        It may write a weight through ``.data`` (masked convolutions do): a forward pre-hook of the
        layer, or of a module that it lies in, or of all modules; a method of the layer's own.

        Args:
            layers: `layers`.
            model: A module whose pre-hooks have run before any use.
        """
        if torch.nn.modules.module._global_forward_pre_hooks:
            return layers
        foreign = {kind for kind in {type(layer) for layer in layers} if _runs_foreign_code(kind)}
        found = {
            layer
            for layer in layers
            if type(layer) in foreign or not _METHODS.isdisjoint(layer.__dict__)
        }
        for of_module, below in self._below:
            module = of_module()
            hooks = None if module is None else module._forward_pre_hooks
            if hooks and module is not model and any(map(_may_write, hooks.values())):
                found.update(layer for ref in below if (layer := ref()) is not None)
        return found

    def order(self, model: nn.Module, training: bool) -> list[Any]:
        """Those that the last pass used, in the order of use; before that, all."""
        refs = self._orders.get(training, self._layers)
        order = [layer for ref in refs if (layer := ref()) is not None]
        if not self._apart and any(type(own) not in _PLAIN for own in map(_own_weight, order)):
            self.look(model)  # it may have been sharded since
        return [] if self._apart else order

    def remember(self, training: bool, used: list[Any]) -> None:
        """Notes what a pass used."""
        self._orders[training] = [weakref.ref(layer) for layer in used]


_METHODS = {'forward', 'standardized_weight'}


def _runs_foreign_code(kind: Any) -> bool:
    ours = all(is_ours(getattr(kind, name)) for name in _METHODS)
    return not ours or kind.__call__ is not nn.Module.__call__


def _may_write(hook: Callable[..., Any]) -> bool:
    return all(hook is not known for known in HOOKS_THAT_WRITE_NO_WEIGHT)


_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def _plan_of(model: nn.Module) -> Plan:
    plan = _plans.get(model)
    if plan is None:
        _plans[model] = plan = Plan(model)
    else:
        plan.look_where_changed(model)
    return plan
