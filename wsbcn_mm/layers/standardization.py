"""Standardizes every weight of a model once per forward pass, in a few operator calls.

Without anything from here every call of a layer standardizes its weight. That is always right; it
costs time where a layer is used several times in a forward pass (a shared head on every level of a
pyramid) and, for a network of many layers, one operator call each.

A scope is what a model's outermost forward pass opens and closes (`standardize_once_per_forward`)::

    wsbcn_mm.standardize_once_per_forward(model)  # once, after the model was built

Inside it, the first use of a weight standardizes it together with those that were used after it
the last time, up to a few MB on a CPU and all of them on a GPU: one operator call, and one for
their gradients. Another use of the weight gets the same result. **When the forward pass ends, by an
exception too, the results are forgotten:** whatever then changes the weights, the next pass
computes with them as they are. `standardized_once` is a scope as a block, `weights_do_not_change` a
longer one, which its caller vouches for.

Within a scope a result is used again only for the very tensor it was computed from, and only while
nothing that torch counts says otherwise: an edit in place, a step of an optimizer, other memory, a
backward pass, another eps, formula, dtype, grad mode, backend or stream. (A forward pass that
writes into weights through ``.data`` between two uses of a layer is beyond that.)

A scope belongs to the thread that opened it and to the layers of its model. What runs elsewhere
computes for itself: replicas of DataParallel, what activation checkpointing repeats in the backward
pass, code under torch.compile, traces, function transforms. What a CUDA graph captures is shared
within that capture. Nothing is stored in a model: copies and pickles know nothing of results.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from wsbcn_mm import backends, compat
from wsbcn_mm.backends import cpu
from wsbcn_mm.layers.plans import HOOKS_THAT_WRITE_NO_WEIGHT
from wsbcn_mm.layers.scopes import Scope, computed, drop_abandoned, open_here, scope_of

# ----------------------------------------------------------------------------------------------
# What a layer asks


def standardized(layer: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The standardized weight of a layer: from the scope that it is in, or computed.

    Args:
        layer: A WS convolution.
        weight: Its weight.
        dtype: Of the result.
    """
    if torch.compiler.is_compiling():
        result: Tensor = layer.standardize(weight, dtype)
        return result
    scope = scope_of(layer)
    return computed(layer, weight, dtype) if scope is None else scope.get(layer, weight, dtype)


def usual(layer: Any) -> Tensor | None:
    """What `standardized` gives for a layer's own weight, where nothing is unusual; None elsewhere.

    Every line here is paid once per use of a layer.
    """
    scopes = open_here()
    if scopes:
        return scopes[-1].get_usual(layer)
    if cpu.entries is None or layer.standardized_hooks or not layer.standardizes_rows():
        return None
    if backends.forced() is not None or compat.compiles_backward_passes():
        return None
    weight = layer._parameters.get('weight')
    result: Tensor | None = cpu.entries.weight_standardize(weight, layer.eps, layer.formula)
    return result


# ----------------------------------------------------------------------------------------------
# What users open


def standardize_once_per_forward(model: nn.Module) -> Callable[[], None]:
    """Lets every outermost forward pass of a model standardize each weight once.

    Any call ``model(...)``, in training or evaluation, of the model itself or through
    DistributedDataParallel around it, is a scope of its own. Where models are nested, the outermost
    one's counts. Copies and pickles of the model do the same.

    Args:
        model: A model with WS convolutions; others are left as they are. With a wrapper around it
            (DistributedDataParallel), the one inside.

    Returns:
        A function that undoes it.

    Examples:
        >>> import torch, wsbcn_mm
        >>> model = torch.nn.Sequential(wsbcn_mm.WSConv2d(3, 8, 3), wsbcn_mm.WSConv2d(8, 8, 3))
        >>> undo = wsbcn_mm.standardize_once_per_forward(model)
        >>> model(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """
    if model in _attached:
        return _attached[model]
    handles = [
        model.register_forward_pre_hook(_before_forward, prepend=True),
        model.register_forward_hook(_after_forward, always_call=True),
    ]
    attached = weakref.ref(model)

    def undo() -> None:
        for handle in handles:
            handle.remove()
        model = attached()
        if model is not None:
            _attached.pop(model, None)

    _attached[model] = undo
    return undo


_attached: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def standardized_once(model: nn.Module) -> Iterator[None]:
    """One forward pass as a block: each weight of the model is standardized once inside it.

    For passes that are not a call of the model: ``model.head(model.backbone(x))``. It ends with the
    block, or when a backward pass begins.

    Args:
        model: A model with WS convolutions.

    Examples:
        >>> with standardized_once(model):
        ...     loss = model.loss(images)
        >>> loss.backward()
    """
    with _block(model, one_pass=True):
        yield


@contextlib.contextmanager
def weights_do_not_change(model: nn.Module) -> Iterator[None]:
    """A block in which the caller does not change the model's weights: standardized once in all.

    For loops of evaluation. It holds the standardized weights, as much memory as the weights
    themselves, until it ends. Edits that torch counts are seen all the same; those through
    ``.data`` are not.

    Args:
        model: A model with WS convolutions.

    Examples:
        >>> with torch.no_grad(), weights_do_not_change(model):
        ...     for image in images:
        ...         show(model(image))
    """
    with _block(model, one_pass=False):
        yield


def weights_do_not_change_during(frame: FrameType, model: nn.Module) -> Callable[[], None]:
    """`weights_do_not_change` without a block, for hooks of a loop.

    Args:
        frame: A function call that is running; the scope ends with it at the latest.
        model: A model with WS convolutions.

    Returns:
        A function that ends it, to be called in the same thread.
    """
    drop_abandoned()
    scope = Scope(model, frame, one_pass=False)
    open_here().append(scope)

    def close() -> None:
        scope.close()
        if scope in open_here():
            open_here().remove(scope)

    return close


def open_scopes() -> int:
    """How many scopes this thread has open."""
    drop_abandoned()
    return len(open_here())


@contextlib.contextmanager
def _block(model: nn.Module, one_pass: bool) -> Iterator[None]:
    scope, scopes = Scope(model, None, one_pass), open_here()
    scopes.append(scope)
    try:
        yield
    finally:  # perhaps in another thread
        scope.close()
        scopes.remove(scope)


def _before_forward(model: nn.Module, _args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    drop_abandoned()
    scope = Scope(model, sys._getframe(1), True)
    for outer in open_here():
        if outer.is_current() and outer.layers >= scope.layers:
            if outer.is_of_a_pass() and outer.model() is model:
                outer.enter_again(model)
            return
    open_here().append(scope)


HOOKS_THAT_WRITE_NO_WEIGHT.append(_before_forward)


def _after_forward(model: nn.Module, _args: Any, _output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for scope in reversed(open_here()):
        if scope.is_of_a_pass() and scope.model() is model:
            scope.entered -= 1
            if not scope.entered:
                scope.close()
                open_here().remove(scope)
            return
