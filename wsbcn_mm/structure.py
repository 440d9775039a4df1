"""Which normalisation follows which convolution: by the structure of a model, or by running it.

The structure is what modules show without being run: the order in which they were registered, their
names, and the ``order`` of OpenMMLab's ConvModule. It covers the usual ways to write a block; a run
of the model (`trace`) covers the rest, and tells what else reads a convolution's output. `Watch` is
what looks on; folding uses it, too.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, jit, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from wsbcn_mm.own_classes import computes_with_its_weight

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def is_conv(module: nn.Module | None) -> TypeGuard[_ConvNd]:
    """Whether this is a convolution: of torch's classes, or one that holds what theirs do.

    Deformable convolutions (of mmcv, of torchvision) derive from nn.Module itself.
    """
    if isinstance(module, _ConvNd):
        return True
    if isinstance(module, jit.ScriptModule):  # which holds no layers of Python's
        return False
    weight = None if module is None else module._parameters.get('weight')
    kernel_size = getattr(module, 'kernel_size', None)
    widths = [getattr(module, name, None) for name in ('in_channels', 'out_channels')]
    groups = getattr(module, 'groups', 1)
    if weight is None or not isinstance(kernel_size, tuple) or not isinstance(groups, int):
        return False
    return isinstance(widths[0], int) and (
        tuple(weight.shape) == (widths[1], widths[0] // groups, *kernel_size)
    )


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation layer; torchvision's FrozenBatchNorm2d counts."""
    return isinstance(module, NORMS) or type(module).__name__ == 'FrozenBatchNorm2d'


def num_channels(norm: nn.Module) -> int | None:
    """The channels that a normalisation is for; None where it does not say (LayerNorm)."""
    if isinstance(norm, nn.LayerNorm):
        return None
    for name in ('num_channels', 'num_features'):
        width = getattr(norm, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(norm, 'weight', None)
    return weight.numel() if isinstance(weight, Tensor) else None


# Convolutions that have a WS version of the same name.
TORCH_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
# Subclasses that convolve as torch's own class does, by name: they need not be installed. mmcv's
# wrappers accept empty inputs, which torch does by itself today. ConvWS standardizes.
SAME_AS_TORCH = {'mmcv.cnn.bricks.wrappers', 'mmcv.cnn.bricks.conv_ws.ConvWS2d'}


def torch_class(conv: nn.Module) -> type | None:
    """The class of torch that a convolution is, if it has a WS version; None for other classes."""
    kind = type(conv)
    name = f'{kind.__module__}.{kind.__qualname__}'
    if kind.__module__ in SAME_AS_TORCH or name in SAME_AS_TORCH:
        kind = next(base for base in kind.__mro__ if base in (*TORCH_CONVS, nn.Module))
    return kind if kind in TORCH_CONVS else None


def standardizable(conv: _ConvNd) -> bool:
    """Whether there is a WS form of this convolution.

    It has a fan-in above 1 and is of torch's own kinds, or of a class that computes with its own
    weight.
    """
    return fan_in(conv) > 1 and (torch_class(conv) is not None or computes_with_its_weight(conv))


def fan_in(conv: _ConvNd) -> int:
    """Weights per output channel."""
    return conv.in_channels // getattr(conv, 'groups', 1) * math.prod(conv.kernel_size)


@dataclass
class Follower:
    """What follows one convolution.

    Attributes:
        conv: The convolution.
        names: Every name under which the model holds it.
        norms: Names of the normalisations that read its output.
        unnormalised: What else reads its output, or its own name where nothing is known to follow.
    """

    conv: _ConvNd
    names: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    unnormalised: list[str] = field(default_factory=list)

    @property
    def normalised(self) -> bool:
        """Whether a normalisation follows wherever the convolution is used."""
        return bool(self.norms) and not self.unnormalised


def followers(model: nn.Module, run: Callable[[], object] | None = None) -> list[Follower]:
    """What follows each convolution of a model.

    Args:
        model: Any module.
        run: Runs the model once (``lambda: model(images)``). What is seen then overrules the
            structure, for the convolutions that take part. None: by structure alone.

    Returns:
        One entry per convolution object, in the order of the model.
    """
    by_conv: dict[int, Follower] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_conv(module):
            by_conv.setdefault(id(module), Follower(module)).names.append(name)
    norm_behind = dict(_pairs_of(model))
    for follower in by_conv.values():
        for name in follower.names:
            if name in norm_behind:
                follower.norms.append(norm_behind[name])
            else:
                follower.unnormalised.append(name)
    if run is not None:
        for key, (norms, others) in trace(model, run).items():
            by_conv[key].norms, by_conv[key].unnormalised = norms, others
    return list(by_conv.values())


# ---- by structure ------------------------------------------------------------------------------


def norms_of_vectors(model: nn.Module) -> set[str]:
    """Names of the normalisations that are registered right behind a linear layer of their width.

    They see one vector for each sample. The kind of a SyncBatchNorm or a GroupNorm does not tell.
    """
    found = set()
    for prefix, parent in model.named_modules(remove_duplicate=False):
        children = list(parent.named_children())
        for (_, linear), (name, norm) in itertools.pairwise(children):
            if not isinstance(linear, nn.Linear) or not is_norm(norm):
                continue
            if num_channels(norm) == linear.out_features:
                found.add(f'{prefix}.{name}' if prefix else name)
    return found


def dims_of_other_norms(
    model: nn.Module, found: list[Follower], axes: dict[int, set[int]], dims: dict[int, int]
) -> None:
    """Norms that follow no convolution (pre-activation, pooling, behind an addition).

    Their kind tells the number of axes, or a run showed it. Not a BatchNorm1d that was not run,
    which also stands behind linear layers.
    """
    for norm in model.modules():
        if is_norm(norm) and len(axes.get(id(norm), ())) == 1:
            (number,) = axes[id(norm)]
            if number > 2:
                dims.setdefault(id(norm), number - 2)
    everywhere = {len(follower.conv.kernel_size) for follower in found}
    vectors = norms_of_vectors(model)
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d) or type(norm).__name__ == 'FrozenBatchNorm2d':
            dims.setdefault(id(norm), 2)
        elif isinstance(norm, nn.BatchNorm3d):
            dims.setdefault(id(norm), 3)
        elif isinstance(norm, nn.SyncBatchNorm) and len(everywhere) == 1 and name not in vectors:
            dims.setdefault(id(norm), *everywhere)


def _pairs_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of (convolution, normalisation behind it)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = f'{prefix}.' if prefix else ''
        for conv, norm in _pairs_in(module):
            yield prefix + conv, prefix + norm


def _pairs_in(parent: nn.Module) -> Iterator[tuple[str, str]]:
    children = [(name, child) for name, child in parent._modules.items() if child is not None]
    order = getattr(parent, 'order', None)
    conv_module = isinstance(order, tuple) and 'conv' in order and 'norm' in order
    if isinstance(order, tuple) and conv_module:  # mmcv's
        if order.index('norm') != order.index('conv') + 1:
            return
    elif isinstance(parent, nn.Sequential):
        children = list(_flat(parent))
    elif isinstance(parent, nn.ModuleList):  # says nothing about the order of use
        return
    # norm1, conv1, conv2, attn, norm2: there a number tells which step a norm begins.
    begins_with_norm = any(
        re.search(r'\d$', name) and _norm_names(name) & {other for other, _ in children[:position]}
        for position, (name, child) in enumerate(children)
        if is_conv(child)
    )
    for position, (name, child) in enumerate(children):
        later = children[position + 1 :]
        if isinstance(child, nn.ModuleList) and 'conv' in name:
            yield from _pairs_of_lists(name, child, later)
        elif is_conv(child):
            names = set() if begins_with_norm else _norm_names(name)
            norm = _behind(name, names, child, later, isinstance(parent, nn.Sequential))
            if norm is not None:
                yield name, norm
        elif conv_module and name == 'conv':
            # What it takes for one: a shift in front of a convolution, a sequence of two of them.
            inside = [(n, m) for n, m in child.named_modules() if is_conv(m)]
            names = _norm_names(name)
            norm = _behind(name, names, inside[-1][1], later, True) if inside else None
            if norm is not None:
                yield f'{name}.{inside[-1][0]}', norm


def _flat(sequential: nn.Sequential, prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested Sequentials, in the order in which they run."""
    for name, child in sequential._modules.items():
        if type(child) is nn.Sequential:
            yield from _flat(child, f'{prefix}{name}.')
        elif child is not None and not isinstance(child, nn.Identity):
            yield prefix + name, child


def _behind(
    name: str,
    names: set[str],
    conv: _ConvNd,
    later: list[tuple[str, nn.Module]],
    in_sequence: bool,
) -> str | None:
    """The normalisation among the children registered after a convolution that is its own.

    ``names``: what it may be called wherever it stands; ``in_sequence``: the children run in the
    order in which they are registered.
    """
    for other, child in later:  # conv1, conv2, bn1, bn2
        if other in names and _fits(conv, child):
            return other
    for other, child in later:
        if type(child) is nn.Sequential and len(child):  # (norm, activation)
            inner, first = next(_flat(child), ('', child))
            if _fits(conv, first):
                return f'{other}.{inner}'
        if not isinstance(child, nn.Identity):
            own = in_sequence or not _of_the_next_step(name, other)
            return other if own and _fits(conv, child) else None
    return None


def _of_the_next_step(conv: str, norm: str) -> bool:
    """Whether a norm is numbered and the convolution in front of it is none by name, nor numbered.

    As in blocks that normalise first: pos_embed, norm1, attn, norm2. Not conv_pw, bn1.
    """
    number = re.search(r'\d+$', norm)
    return number is not None and 'conv' not in conv and not conv.endswith(number[0])


def _pairs_of_lists(
    name: str, convs: nn.ModuleList, later: list[tuple[str, nn.Module]]
) -> Iterator[tuple[str, str]]:
    """Two lists side by side, ``convs`` and ``bns``."""
    names = _norm_names(name)
    for other, child in later:
        if other in names and isinstance(child, nn.ModuleList) and len(child) == len(convs):
            for i, (conv, norm) in enumerate(zip(convs, child)):
                if is_conv(conv) and _fits(conv, norm):
                    yield f'{name}.{i}', f'{other}.{i}'


def _norm_names(name: str) -> set[str]:
    """How the normalisation of a convolution of this name may be called."""
    return {re.sub('conv', norm, name) for norm in ('norm', 'bn', 'bcn', 'gn')} - {name}


def _fits(conv: _ConvNd, norm: nn.Module) -> bool:
    return is_norm(norm) and num_channels(norm) in (None, conv.out_channels)


# ---- by a run ----------------------------------------------------------------------------------

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
    for call in watch.kept():
        call.readers.append(KEPT)
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

    def kept(self) -> list[Call]:
        """The calls whose output somebody still has: in a result, in an attribute of a module.

        Of a run with gradients nothing is known: its graph has them all.
        """
        if len(self.outputs):
            gc.collect()  # not what only waits to be freed
        return [call for output, call in self.outputs.items() if output.grad_fn is None]

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
