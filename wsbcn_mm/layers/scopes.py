"""How long a standardized weight holds; see `standardization`.

A `Scope` holds the results of one forward pass, or of a longer block. What it knows of the model
from one pass to the next is in `plans`.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from wsbcn_mm import backends, compat, distributed
from wsbcn_mm.backends import cpu, triton
from wsbcn_mm.backends.states import is_captured, is_watched, result_dtype, state_of
from wsbcn_mm.backends.together import FirstUses, Results, standardize_all
from wsbcn_mm.layers import optimizer_steps as optimizer_steps  # heard of from here on
from wsbcn_mm.layers import plans

ON_CPU = 4 * 2**20
"""Bytes that a call standardizes on a CPU: they stay in its cache for the convolutions."""
OVER_RANKS = 16 * 2**20
"""Elsewhere, where there are several processes: the gradients of a chunk are there when the last
of them is, and the buckets of DistributedDataParallel, 25 MB, shall not wait for each other."""
ALONE = 256 * 2**20
"""Where there is one process: on a GPU a call costs more than its work."""


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
    if not scopes or is_watched():
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
        self._task = compat.backward_pass()  # the backward pass that this is part of
        self._plan = plans.plan_of(model)
        # A pass that the model's own hooks opened: they have run.
        self._opener = model if self.is_of_a_pass() else None
        self._hooked = self._plan.hooked(model, self._opener)
        self._order = self._plan.order(model.training)
        self._training = model.training
        self._used: dict[Any, None] = {}
        self._tables: dict[tuple[Any, ...], dict[Any, _Held]] = {}
        self._looked_again = False
        self._layers: set[Any] | None = None
        self._held: dict[Any, _Held] = {}  # of each layer the one that was found last
        self.get_usual: Callable[[Any], Tensor | None] = _nothing
        """What `get` would give for a layer's own weight, where nothing is unusual; else None."""
        self._bind()

    def _bind(self) -> None:
        if cpu.entries is not None:
            # Called once per use of a layer, where every line would be paid.
            self.get_usual = functools.partial(
                cpu.entries.get_usual,
                self._held,
                self._used,
                self.frame,
                self._order,
                self._hooked,
                # Not by the scope itself, which would be kept, and its frame, until a collection.
                functools.partial(Scope._open_table, weakref.proxy(self)),
                self._one_pass,
            )

    def _open_table(self, weight: Tensor) -> tuple[dict[Any, _Held], int] | None:
        """Where `get_usual` may note what it standardizes now with a weight, and of how many bytes.

        None: that is for `get` to do.
        """
        if backends.forced() is not None or compat.backward_pass() != self._task:
            return None
        if compat.compiles_backward_passes():
            return None
        if is_captured(weight) and not (self._one_pass and triton.HAS_NODES):
            return None
        return self._table(weight, result_dtype(weight)), most_bytes(weight)

    def _table(self, weight: Tensor, dtype: torch.dtype) -> dict[Any, _Held]:
        """The results for what is the same for all layers now."""
        context = (
            dtype,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            backends.forced(),
            torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None,
        )
        return self._tables.setdefault(context, {})

    def is_of_a_pass(self) -> bool:
        """Whether a forward pass opened it, which will close it."""
        return self.frame is not None and self._one_pass

    @property
    def layers(self) -> set[Any]:
        """Those that it serves."""
        if self._layers is None:
            self._layers = self._plan.layers()
        return self._layers

    def enter_again(self, model: nn.Module) -> None:
        """Another call of the model within its pass: its pre-hooks run once more, between uses."""
        self.entered += 1
        if self._opener is not None:
            self._opener = None
            self._hooked = self._plan.hooked(model, None)
            if self._hooked:
                self._tables.clear()
                self._held.clear()
                self._bind()

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
        return compat.backward_pass() == self._task and self.is_running()

    def look_again(self, layer: Any) -> bool:
        """Whether a layer has become part of the model."""
        model = self.model()
        if self._looked_again or model is None:
            return False
        self._looked_again = True
        self._plan.look(model)
        self._layers = None
        self._hooked = self._plan.hooked(model, self._opener)
        self._bind()
        return layer in self.layers

    def get(self, layer: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The standardized weight of one of the layers."""
        if layer in self._hooked:
            return computed(layer, weight, dtype)
        if not plans.is_plain(weight) or (not self._one_pass and is_captured(weight)):
            return computed(layer, weight, dtype)
        if state_of(weight, self._one_pass) is None:  # it could not be said how long a result holds
            return computed(layer, weight, dtype)
        table = self._table(weight, dtype)
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
        if layer not in self._order:
            return [layer], [weight]
        place = self._order.index(layer)
        left_out = table, self._hooked
        found: tuple[list[Any], list[Tensor]]
        found = (plans.gather if cpu.entries is None else cpu.entries.gather)(
            self._order, place, left_out, layer, weight, most_bytes(weight)
        )
        return found

    def close(self) -> None:
        """Forgets all results."""
        self._tables = {}
        self._held.clear()
        self.get_usual = _nothing
        self.frame = None
        if self._one_pass and self._used and list(self._used) != self._order:
            self._plan.remember(self._training, list(self._used))
        self._used.clear()


def _nothing(layer: Any) -> None:
    """`Scope.get_usual` without the compiled extension, and of a scope that has ended."""


def most_bytes(weight: Tensor) -> int:
    """How much is standardized in one call together with this weight."""
    if weight.device.type == 'cpu':
        return ON_CPU
    return OVER_RANKS if distributed.world_size() > 1 else ALONE


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
