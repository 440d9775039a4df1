"""A run of a model, watched: what reads the output of each convolution."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from wsbcn_mm.networks.layer_kinds import is_conv, is_norm

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

KEPT = 'the result of the run'
"""What reads an output that is still there when a run is over; a module may keep it, too."""


def trace(model: nn.Module, run: Callable[[], object]) -> dict[int, tuple[list[str], list[str]]]:
    """Runs a model and sees what reads the output of each convolution.

    Args:
        model: Any module, not compiled.
        run: Runs it forward once, and returns what is used of the result.

    Returns:
        For each convolution that took part, by ``id``: the names of the normalisations that read
        its output, and what else did (names of torch operations, `KEPT`, or ``'nothing'``).
    """
    names = {module: name for name, module in model.named_modules()}
    seen: dict[int, tuple[list[str], list[str]]] = {}
    watch = Watch(model)
    with watch:
        result = run()
    watch.note_kept()
    del result  # the outputs in it are kept, however they lie there
    for call in watch.calls:
        norms, others = seen.setdefault(id(call.conv), ([], []))
        for reader in call.readers or ['nothing']:
            if isinstance(reader, nn.Module):
                norms.append(names[reader])
            else:
                others.append(reader.removeprefix('aten.').partition('.')[0])
    return {
        conv: (list(dict.fromkeys(by)), list(dict.fromkeys(others)))
        for conv, (by, others) in seen.items()
    }


@dataclass
class Call:
    """One call of a convolution.

    Attributes:
        conv: The convolution.
        holder: The module that has it as a child; of several, the one that was running.
        version: Of the output.
        readers: The norms that got the output as input, and names of operations that read it
            otherwise.
    """

    conv: _ConvNd
    holder: nn.Module | None
    version: int
    readers: list[nn.Module | str]


class Watch(TorchDispatchMode):
    """While active: hooks on convolutions and norms, and a look at the inputs of every operation.

    Under the module system nothing is missed: every operation on a tensor passes here.

    Attributes:
        calls: Every call of a convolution.
        inputs: For every call of a norm: the convolution's call whose unchanged output came in, or
            None.
        outputs: The call that a tensor is the output of.
        leaks: Layers whose parameters or buffers something outside of them read.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        norms = [m for m in root.modules() if is_norm(m)]
        inner = {part for norm in norms for part in norm.children()}  # BCN holds a BatchNorm
        self.layers = [m for m in norms if m not in inner]
        self.layers += [m for m in root.modules() if is_conv(m)]
        self.owners = {  # the root keeps the tensors alive
            id(tensor): layer
            for layer in self.layers
            for tensor in (*layer.parameters(), *layer.buffers())
        }
        self.outputs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.calls: list[Call] = []
        self.inputs: list[tuple[nn.Module, Call | None]] = []
        self.leaks: set[nn.Module] = set()
        self.active: list[nn.Module] = []
        self.holders = holders_of(root)
        self.running: list[nn.Module] = []  # of the modules that hold a shared convolution
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        sharing = [holders for holders in self.holders.values() if len(holders) > 1]
        for holder in {holder for holders in sharing for holder in holders}:
            self.hooks.append(holder.register_forward_pre_hook(lambda m, _: self.running.append(m)))
            self.hooks.append(holder.register_forward_hook(lambda m, *_: self.running.remove(m)))
        for layer in self.layers:
            self.hooks.append(layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True))
            self.hooks.append(layer.register_forward_hook(self._leave_layer))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def note_kept(self) -> None:
        """Notes which outputs somebody still has: in a result, in an attribute of a module.

        Of a run with gradients nothing is known: its graph has them all.
        """
        if len(self.outputs):
            gc.collect()  # not what only waits to be freed
        for output, call in self.outputs.items():
            if output.grad_fn is None:
                call.readers.append(KEPT)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._see(value, func)
        return func(*args, **(kwargs or {}))

    def _see(self, tensor: Tensor, func: Callable[..., Any]) -> None:
        owner = self.owners.get(id(tensor))
        if owner is not None and owner not in self.active:
            self.leaks.add(owner)
        call = self._call_of(tensor)
        # What a norm does with its input is the norm's reading of it, noted when it was entered.
        if call is not None and not (self.active and self.active[-1] in call.readers):
            call.readers.append(str(func))

    def _call_of(self, tensor: Tensor) -> Call | None:
        return self.outputs.get(tensor, None)

    def _enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_conv(layer):
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            call = None if x is None else self._call_of(x)
            if call is not None:
                call.readers.append(layer)
            unchanged = x is not None and call is not None and call.version == x._version
            self.inputs.append((layer, call if unchanged else None))
        self.active.append(layer)

    def _leave_layer(self, layer: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.active.remove(layer)
        if is_conv(layer) and isinstance(output, Tensor):
            holders = self.holders.get(layer, [])
            if len(holders) > 1:
                holders = [m for m in reversed(self.running) if m in holders]
            call = Call(layer, holders[0] if holders else None, output._version, [])
            self.calls.append(call)
            self.outputs[output] = call


def holders_of(root: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules that have a convolution as a child, by convolution."""
    holders: dict[nn.Module, list[nn.Module]] = defaultdict(list)
    for module in root.modules():
        for child in {c for c in module.children() if is_conv(c)}:
            holders[child].append(module)
    return holders
