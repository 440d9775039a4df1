"""Lets activation checkpointing update the running statistics once and see the same ones twice.

Checkpointing runs a part of a model again during the backward pass. A layer that updates statistics
in its forward pass would update them twice, and in estimate mode, where they are used at once, the
second run would compute something else than the first: gradients of another function.

So a run that may be repeated remembers which statistics each use of a layer saw, and a repetition
asks for them, in the same order, and updates nothing. Which run is repeated is not guessed: a
*segment*, the object that torch makes for one run of one checkpointed part, is the same in both.
The interpreter's stack tells which segments the running code stands in:

- ``torch.utils.checkpoint(..., use_reentrant=False)``: its frame object;
- ``use_reentrant=True``, code that torch.compile made, and every `torch.autograd.Function` that
  runs layers in its forward and again in its backward method: the function's ``ctx``.

What is remembered lives as long as the segment, that is, as long as its graph.

A first run inside a backward pass (in a hook, or in somebody's backward method) stands in no
segment that knows the layer, and updates as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from wsbcn_mm import compat


class Use(NamedTuple):
    """What one use of a layer saw.

    Attributes:
        mean: (C,), the mean that it normalised with; None in batch mode, which measures it again.
        var: Likewise, the variance.
        input_mean: (C,), of its input, where the order of repetition is not that of the first run.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    input_mean: Tensor | None = None


@dataclass
class _Log:
    """The uses of one layer in one segment, and how far a repetition of it has come."""

    uses: list[Use] = field(default_factory=list)
    run: Hashable = None
    position: int = 0


_logs: WeakKeyDictionary[object, dict[Hashable, _Log]] = WeakKeyDictionary()
"""By segment, by layer."""


class _Place(NamedTuple):
    """A segment on the stack.

    Attributes:
        segment: The object that both runs share.
        run: None in the first run; else what tells one repetition from another.
        ordered: Whether a repetition uses layers in the order of the first run. The backward code
            of torch.compile need not.
    """

    segment: object
    run: Hashable
    ordered: bool


class Run:
    """A use of a layer that may be repeated, or that is a repetition.

    Args:
        identity: See `of`.
    """

    def __init__(self, identity: Tensor) -> None:
        # The same in compiled code, which may make new tensors of old storages.
        layer = self._layer = identity.untyped_storage()._cdata
        self._recording: list[object] = []
        self._repeats: _Place | None = None
        for place in _places(sys._getframe(1)):
            if place.run is None:
                self._recording.append(place.segment)
            elif _known(place, layer):
                self._repeats = place
                break

    def recall(self, input_mean: Tensor | None = None) -> Use | None:
        """What the use saw that this one repeats; None if this is a first run.

        Args:
            input_mean: (C,), the mean of the input, in code that torch.compile made.

        Raises:
            RuntimeError: it cannot be known which use is repeated.
        """
        if self._repeats is None:
            return None
        log = _logs.get(self._repeats.segment, {}).get(self._layer)
        if log is None:
            raise RuntimeError(
                'activation checkpointing repeats a use of a BatchChannelNorm layer that did not '
                'update its statistics at first\n  a layer must be in the same mode (train, eval) '
                'in the forward pass and in the backward pass'
            )
        if self._repeats.ordered:
            use = _next(log, self._repeats.run)
        else:
            use = _nearest(log, input_mean)
        self.remember(use)
        return use

    @property
    def is_recorded(self) -> bool:
        """Whether somebody may repeat it; without gradients alone nobody does."""
        return bool(self._recording)

    def remember(self, use: Use) -> None:
        """Notes what this use saw, for all segments that it is recorded by."""
        for segment in self._recording:
            _logs.setdefault(segment, {}).setdefault(self._layer, _Log()).uses.append(use)


def of(identity: Tensor) -> Run | None:
    """The run that the caller is in; None in ordinary training, where nothing is repeated.

    Args:
        identity: A tensor that the layer has for itself and never changes: tells layers apart.
    """
    return Run(identity) if _possible() else None


def remembered() -> list[object]:
    """The segments of which something is remembered: those whose graphs are alive."""
    return list(_logs)


def is_repeated() -> bool:
    """Whether the caller runs inside a repetition, whatever is repeated."""
    if torch.compiler.is_compiling() or not _possible():
        return False
    return any(place.run is not None for place in _places(sys._getframe(1)))


def _possible() -> bool:
    """Whether checkpointing may be at work: cheap, and True in vain under ``no_grad``.

    It records without gradients or with hooks on saved tensors, and repeats in a backward pass.
    """
    return (
        not torch.is_grad_enabled()
        or compat.saved_tensors_may_be_hooked()
        or compat.backward_pass() != -1
    )


def _known(place: _Place, layer: Hashable) -> bool:
    """Whether a repetition is one of the layer. Somebody's backward method may also use others."""
    by_torch = isinstance(place.segment, compat.CheckpointFrame) or not place.ordered
    return by_torch or layer in _logs.get(place.segment, {})


def _next(log: _Log, run: Hashable) -> Use:
    if log.run != run:
        log.run, log.position = run, 0
    if log.position == len(log.uses):
        raise RuntimeError(
            'activation checkpointing uses a BatchChannelNorm layer more often in the repetition '
            f'than at first ({len(log.uses)} times)\n'
            '  the checkpointed function must do the same each time'
        )
    log.position += 1
    return log.uses[log.position - 1]


def _nearest(log: _Log, input_mean: Tensor | None) -> Use:
    """The use with this input; a GPU may differ in the last digits."""
    if len(log.uses) == 1:
        return log.uses[0]
    assert input_mean is not None
    inputs = torch.stack([use.input_mean for use in log.uses if use.input_mean is not None])
    best, second = (inputs - input_mean).abs().sum(1).topk(2, largest=False).indices.tolist()
    if torch.allclose(inputs[best], inputs[second], rtol=1e-5, atol=1e-7):
        raise RuntimeError(
            'code that torch.compile made computes a BatchChannelNorm layer again that was used '
            f'{len(log.uses)} times, twice with the same input: it cannot be known which use is '
            'repeated\n  checkpoint outside of the compiled code: checkpoint(torch.compile(block))'
        )
    return log.uses[best]


def _places(frame: FrameType | None) -> Iterator[_Place]:
    """The segments that the running code stands in, from the inside out."""
    hooked = compat.recording_checkpoint()
    caller: FrameType | None = None  # of what: the frame that was looked at before
    while frame is not None:
        code = frame.f_code
        name, file = code.co_name, code.co_filename
        if name in compat.CHECKPOINT_FUNCTIONS and file == compat.CHECKPOINT_FILE:
            generator = frame.f_locals.get('gen')
            inner = None if generator is None else generator.gi_frame
            for value in () if inner is None else inner.f_locals.values():
                if isinstance(value, compat.CheckpointFrame):
                    hooked = None if value is hooked else hooked
                    yield _Place(value, None, True)
        elif name == 'unpack_hook' and file == compat.CHECKPOINT_FILE:
            yield _Place(frame.f_locals['frame'], frame.f_locals['gid'], True)
        elif name in ('forward', 'backward') and code.co_argcount:
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, torch.autograd.function.FunctionCtx):
                if name == 'forward':
                    yield _Place(ctx, None, True)
                # A reentrant checkpoint's own backward pass, after the repetition, is none.
                elif caller is None or caller.f_code.co_filename != torch.autograd.__file__:
                    compiled = '_aot_autograd' in code.co_filename
                    yield _Place(ctx, compat.backward_pass(), not compiled)
        caller, frame = frame, frame.f_back
    if hooked is not None:  # by an interface that leaves no frame on the stack
        yield _Place(hooked, None, True)
