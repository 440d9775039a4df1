"""Which normalisation follows which convolution: by the structure of a model, or by running it.

The structure is what modules show without being run: the order in which they were registered, their
names, and the ``order`` of OpenMMLab's ConvModule. It covers the usual ways to write a block; a run
of the model (`trace`) covers the rest, and tells what else reads a convolution's output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVS = (nn.modules.conv._ConvNd,)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation layer; torchvision's FrozenBatchNorm2d counts."""
    return isinstance(module, NORMS) or type(module).__name__ == 'FrozenBatchNorm2d'


def num_channels(norm: nn.Module) -> int | None:
    """The channels that a normalisation is for; None where it does not say (LayerNorm)."""
    if isinstance(norm, nn.LayerNorm):
        return None
    for name in ('num_channels', 'num_features'):
        if hasattr(norm, name):
            return getattr(norm, name)
    weight = getattr(norm, 'weight', None)
    return None if weight is None else weight.numel()


# Convolutions that have a WS version.
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


def standardizable(conv: nn.Module) -> bool:
    """Whether there is a WS version of this convolution: of torch's own kinds, a fan-in above 1."""
    fan_in = conv.in_channels // conv.groups * math.prod(conv.kernel_size)
    return torch_class(conv) is not None and fan_in > 1


@dataclass
class Follower:
    """What follows one convolution.

    Attributes:
        conv: The convolution.
        names: Every name under which the model holds it.
        norms: Names of the normalisations that read its output.
        bare: Places where something else reads its output, or nothing is known to follow.
    """

    conv: nn.Module
    names: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)

    @property
    def normalised(self) -> bool:
        """Whether a normalisation follows wherever the convolution is used."""
        return bool(self.norms) and not self.bare


def followers(model: nn.Module, run: Callable[[], object] | None = None) -> list[Follower]:
    """What follows each convolution of a model.

    Args:
        model: Any module.
        run: Runs the model once (``lambda: model(images)``). What is seen then overrules the
            structure, for the convolutions that take part. None: by structure alone.

    Returns:
        One entry per convolution object, in the order of the model.
    """
    found: dict[int, Follower] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CONVS):
            found.setdefault(id(module), Follower(module)).names.append(name)
    behind = dict(_pairs_of(model))
    for follower in found.values():
        for name in follower.names:
            (follower.norms if name in behind else follower.bare).append(behind.get(name, name))
    if run is not None:
        for key, (norms, bare) in trace(model, run).items():
            found[key].norms, found[key].bare = norms, bare
    return list(found.values())


# ---- by structure ------------------------------------------------------------------------------


def _pairs_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of (convolution, normalisation behind it)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = f'{prefix}.' if prefix else ''
        for conv, norm in _pairs_in(module):
            yield prefix + conv, prefix + norm


def _pairs_in(parent: nn.Module) -> Iterator[tuple[str, str]]:
    children = [(name, child) for name, child in parent._modules.items() if child is not None]
    order = getattr(parent, 'order', None)
    if isinstance(order, tuple) and 'conv' in order and 'norm' in order:  # mmcv's ConvModule
        if order.index('norm') != order.index('conv') + 1:
            return
    elif isinstance(parent, nn.Sequential):
        children = list(_flat(parent))
    elif isinstance(parent, nn.ModuleList):  # says nothing about the order of use
        return
    for position, (name, child) in enumerate(children):
        later = children[position + 1 :]
        if isinstance(child, nn.ModuleList) and 'conv' in name:
            yield from _pairs_of_lists(name, child, later)
        elif isinstance(child, CONVS):
            norm = _behind(name, child, later)
            if norm is not None:
                yield name, norm


def _flat(sequential: nn.Sequential, prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested Sequentials, in the order in which they run."""
    for name, child in sequential._modules.items():
        if type(child) is nn.Sequential:
            yield from _flat(child, f'{prefix}{name}.')
        elif child is not None and not isinstance(child, nn.Identity):
            yield prefix + name, child


def _behind(name: str, conv: nn.Module, later: list[tuple[str, nn.Module]]) -> str | None:
    """The normalisation among the children registered after a convolution that is its own."""
    names = _norm_names(name)
    for other, child in later:  # conv1, conv2, bn1, bn2
        if other in names and _fits(conv, child):
            return other
    for other, child in later:
        if type(child) is nn.Sequential and len(child):  # (norm, activation)
            inner, first = next(_flat(child), ('', child))
            if _fits(conv, first):
                return f'{other}.{inner}'
        if not isinstance(child, nn.Identity):
            return other if _fits(conv, child) else None
    return None


def _pairs_of_lists(
    name: str, convs: nn.ModuleList, later: list[tuple[str, nn.Module]]
) -> Iterator[tuple[str, str]]:
    """Two lists side by side, ``convs`` and ``bns``."""
    names = _norm_names(name)
    for other, child in later:
        if other in names and isinstance(child, nn.ModuleList) and len(child) == len(convs):
            for i, (conv, norm) in enumerate(zip(convs, child)):
                if isinstance(conv, CONVS) and _fits(conv, norm):
                    yield f'{name}.{i}', f'{other}.{i}'


def _norm_names(name: str) -> set[str]:
    """How the normalisation of a convolution of this name may be called."""
    return {re.sub('conv', norm, name) for norm in ('norm', 'bn', 'bcn', 'gn')} - {name}


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    return is_norm(norm) and num_channels(norm) in (None, conv.out_channels)


# ---- by a run ----------------------------------------------------------------------------------


def trace(model: nn.Module, run: Callable[[], object]) -> dict[int, tuple[list[str], list[str]]]:
    """Runs a model and sees what reads the output of each convolution.

    Args:
        model: Any module, not compiled.
        run: Runs it once.

    Returns:
        For each convolution that took part, by ``id``: the names of the normalisations that read
        its output, and what else did (names of torch functions, or ``'nothing'``).
    """
    names = {id(module): name for name, module in model.named_modules()}
    convs = {id(m): m for m in model.modules() if isinstance(m, CONVS)}
    # A BatchChannelNorm holds a BatchNorm, which is a part of it.
    parts = {id(c) for m in model.modules() if is_norm(m) for c in m.children()}
    norms = {id(m): m for m in model.modules() if is_norm(m) and id(m) not in parts}
    owner: dict[int, tuple[int, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    seen: dict[int, tuple[list[str], list[str]]] = {}
    read: set[int] = set()
    mode = _Reads(owner, seen, read)

    def before_norm(module, args):
        mode.inside += 1
        if args and id(args[0]) in owner:
            conv, _ = owner[id(args[0])]
            seen[conv][0].append(names[id(module)])
            read.add(id(args[0]))

    def after_norm(module, args, output):
        mode.inside -= 1

    def after_conv(module, args, output):
        seen.setdefault(id(module), ([], []))
        owner[id(output)] = (id(module), output)

    handles = [m.register_forward_hook(after_conv) for m in convs.values()]
    for norm in norms.values():
        handles.append(norm.register_forward_pre_hook(before_norm))
        handles.append(norm.register_forward_hook(after_norm))
    try:
        with mode:
            run()
    finally:
        for handle in handles:
            handle.remove()
    for key, (conv, _) in owner.items():
        if key not in read:
            seen[conv][1].append('nothing')
    return {
        conv: (list(dict.fromkeys(by)), list(dict.fromkeys(bare)))
        for conv, (by, bare) in seen.items()
    }


class _Reads(TorchFunctionMode):
    """Notes every torch function, outside of the normalisations, that reads a conv's output."""

    def __init__(self, owner: dict, seen: dict, read: set) -> None:
        super().__init__()
        self.owner, self.seen, self.read, self.inside = owner, seen, read, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # Questions about shape or device read nothing of the content.
        if not self.inside and _holds_tensor(result):
            for value in _tensors((args, kwargs or {})):
                if id(value) in self.owner:
                    self.read.add(id(value))
                    conv, _ = self.owner[id(value)]
                    self.seen[conv][1].append(getattr(function, '__name__', str(function)))
        return result


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        for item in value:
            yield from _tensors(item)


def _holds_tensor(value: object) -> bool:
    return next(_tensors(value), None) is not None
