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
from wsbcn_mm.networks import module_replacement
from wsbcn_mm.networks.layer_kinds import is_conv
from wsbcn_mm.networks.watching import Call, Watch

Run = Callable[[nn.Module], object]

_MOST_POSITIONS = 2**18  # of maps in another size: 512x512
_GUESSES = 4  # registration order is seldom far from the order of use


class Evidence:
    """Who read the output of every convolution, collected over one run or more.

    Attributes:
        calls: By convolution, what is known of every call.
        inputs: By norm: one entry per call, the call of a convolution whose unchanged output came
            in, or None.
        leaks: Layers whose parameters or statistics something outside of them read.
        beside: Layers that something ran which does not go by the module tree.
        failed: By module: why it could not be run on its own.
        refused_sizes: Sizes other than that of the inputs which the model does not take, and why.
    """

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self.inputs: dict[nn.Module, list[Call | None]] = defaultdict(list)
        self.leaks: set[nn.Module] = set()
        self.beside: set[nn.Module] = set()
        self.failed: dict[nn.Module, str] = {}
        self.refused_sizes: list[str] = []

    def add(self, module: nn.Module, run: Run) -> object:
        """Runs the module and remembers what was seen; nothing of a run that raises."""
        watch = Watch(module)
        with torch.no_grad(), watch:
            result = run(module)
        watch.note_kept()  # the outputs in the result are, however they lie there
        for call in watch.calls:
            self.calls[call.conv].append(call)
        for norm, seen in watch.inputs:
            self.inputs[norm].append(seen)
        self.leaks |= watch.leaks
        return result

    def put_twins(self, root: nn.Module) -> dict[nn.Module, nn.Module]:
        """Puts a twin in the place of every layer, with the same parameters, and by the layer.

        What still runs the layer itself does not go by the tree (a hook, an object in a list, code
        in another language), and would not run what folding puts there.
        """
        inner = {m.bn for m in root.modules() if isinstance(m, BatchChannelNorm)}
        layers = [m for m in root.modules() if watched(m) and m not in inner]
        twins = {layer: _twin(layer) for layer in layers}

        def ran(layer: nn.Module, *_: object) -> None:
            self.beside.add(twins[layer])

        for layer in layers:
            layer.register_forward_pre_hook(ran)
        module_replacement.replace_children(
            root, {id(layer): twin for layer, twin in twins.items()}
        )
        return twins

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
                self.refused_sizes.append(f'{factor:g} times the size: {in_one_line(error)}')

    def explore(self, module: nn.Module) -> None:
        """Runs what no run has reached yet: the module, or its parts where it does not run."""
        if watched(module) or not any(self._is_open(m) for m in module.modules()):
            return
        for x in guess_inputs(module):
            try:
                self.add(module, partial(_call, x=x))
            except Exception as error:  # noqa: BLE001  whatever a module raises that wants other arguments
                self.failed[module] = in_one_line(error)
            else:
                break
        for child in module.children():
            self.explore(child)

    def _is_open(self, module: nn.Module) -> bool:
        kind = (WeightStandardized, BatchChannelNorm)
        seen = (self.calls, self.inputs, self.leaks)
        return isinstance(module, kind) and not any(module in some for some in seen)


def _twin(layer: nn.Module) -> nn.Module:
    """A layer that holds what another one holds, and has hooks of its own."""
    twin = object.__new__(type(layer))
    own = {k: v.copy() for k, v in vars(layer).items() if 'hook' in k and isinstance(v, dict)}
    vars(twin).update(vars(layer), **own)
    return twin


def in_one_line(error: Exception) -> str:
    """The first line of what an error says."""
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
    """Whether this is a layer that folding changes, or looks at."""
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
