"""Who reads the output of a convolution: seen in runs of the model, or of its parts."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.structure import KEPT, Call, Watch, is_conv

Run = Callable[[nn.Module], object]

_MOST_POSITIONS = 2**18  # of maps in another size: 512x512
_GUESSES = 4  # registration order is seldom far from the order of use


class Evidence:
    """Who read the output of every convolution, collected over one run or more.

    Attributes:
        calls: By convolution, what is known of every call.
        inputs: By norm: one entry per call, the call of a convolution whose unchanged output came
            in, or None.
        leaks: Layers whose parameters something outside of them read.
        failed: By module: why it could not be run on its own.
        refused_sizes: Sizes other than that of the inputs which the model does not take, and why.
    """

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self.inputs: dict[nn.Module, list[Call | None]] = defaultdict(list)
        self.leaks: set[nn.Module] = set()
        self.failed: dict[nn.Module, str] = {}
        self.refused_sizes: list[str] = []

    def add(self, module: nn.Module, run: Run) -> None:
        """Runs the module and remembers what was seen; nothing of a run that raises."""
        watch = Watch(module)
        with torch.no_grad(), watch:
            result = run(module)
        for call in watch.kept():
            call.readers.append(KEPT)
        del result  # the outputs in it are kept, however they lie there
        for call in watch.calls:
            self.calls[call.conv].append(call)
        for norm, seen in watch.inputs:
            self.inputs[norm].append(seen)
        self.leaks |= watch.leaks

    def add_other_sizes(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Runs the module on its arguments in half and twice their size, where it takes such."""
        for factor in (0.5, 2.0):
            resized = tree_map(partial(_resized, factor=factor), arguments)
            pairs = zip(tree_leaves(arguments), tree_leaves(resized))
            if all(old is new for old, new in pairs):
                continue
            try:
                self.add(module, partial(_call_with, arguments=resized))
            except Exception as error:  # noqa: BLE001  whatever a module raises that wants its size
                self.refused_sizes.append(f'{factor:g} times the size: {_in_one_line(error)}')

    def explore(self, module: nn.Module) -> None:
        """Runs what no run has reached yet: the module, or its parts where it does not run."""
        if watched(module) or not any(self._is_open(m) for m in module.modules()):
            return
        for x in guess_inputs(module):
            try:
                self.add(module, partial(_call, x=x))
            except Exception as error:  # noqa: BLE001  whatever a module raises that wants other arguments
                self.failed[module] = _in_one_line(error)
            else:
                break
        for child in module.children():
            self.explore(child)

    def _is_open(self, module: nn.Module) -> bool:
        kind = (WeightStandardized, BatchChannelNorm)
        seen = (self.calls, self.inputs, self.leaks)
        return isinstance(module, kind) and not any(module in some for some in seen)


def _in_one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.partition('\n')[0]


def _call_with(module: nn.Module, arguments: tuple[Any, ...]) -> object:
    return module(*arguments)


def _resized(value: Any, factor: float) -> Any:
    """A batch of maps in another size; whatever is none as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not 3 <= value.dim() <= 5:
        return value
    size = [max(1, int(length * factor)) for length in value.shape[2:]]
    if math.prod(size) > _MOST_POSITIONS:
        return value
    return interpolate(value.float(), size).to(value.dtype)


def _call(module: nn.Module, x: Tensor) -> object:
    return module(x)


def watched(module: nn.Module) -> bool:
    return is_conv(module) or isinstance(module, (BatchChannelNorm, _BatchNorm))


def guess_inputs(module: nn.Module) -> list[Tensor]:
    """Random inputs that a module may take: one per number of channels that a convolution wants."""
    inputs: dict[tuple[int, ...], Tensor] = {}
    for conv in module.modules():
        if is_conv(conv):
            weight = conv.weight
            # Large enough for the strides of a backbone, odd in one axis.
            size = {1: (67,), 2: (64, 67), 3: (16, 16, 17)}[weight.dim() - 2]
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, conv.in_channels, *size, generator=generator)
            inputs.setdefault(tuple(x.shape), x.to(weight.device, weight.dtype))
    return list(inputs.values())[:_GUESSES]
