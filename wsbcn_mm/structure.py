"""Which normalisation follows which convolution: by the structure of a model, or by running it.

The structure is what modules show without being run: the order in which they were registered, their
names, and the ``order`` of OpenMMLab's ConvModule. It covers the usual ways to write a block; a run
(`wsbcn_mm.networks.watching`) covers the rest, and tells what else reads a convolution's output.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd

from wsbcn_mm.networks.layer_kinds import fan_in, is_conv, is_norm, num_channels, torch_class
from wsbcn_mm.networks.own_classes import computes_with_its_weight
from wsbcn_mm.networks.watching import trace


def standardizable(conv: _ConvNd) -> bool:
    """Whether there is a WS form of this convolution.

    It has a fan-in above 1 and is of torch's own kinds, or of a class that computes with its own
    weight.
    """
    return fan_in(conv) > 1 and (torch_class(conv) is not None or computes_with_its_weight(conv))


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
    def dim(self) -> int:
        """Over how many axes of a map it goes."""
        return len(self.conv.kernel_size)

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


def dims_of_norms(
    model: nn.Module, found: list[Follower], input_axes: dict[int, set[int]]
) -> dict[int, int]:
    """Over how many axes of a map each normalisation goes, by ``id``; not those that nobody knows.

    Where a convolution stands in front of one, that tells it. Elsewhere (pre-activation, pooling,
    behind an addition) a run has shown it, or its kind does. Not that of a BatchNorm1d, which also
    stands behind linear layers.

    Args:
        model: Any module.
        found: From `followers`.
        input_axes: How many axes the inputs had in a run, samples and channels counted.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    dims = {id(modules[name]): follower.dim for follower in found for name in follower.norms}
    for norm in model.modules():
        if is_norm(norm) and len(input_axes.get(id(norm), ())) == 1:
            (number,) = input_axes[id(norm)]
            if number > 2:
                dims.setdefault(id(norm), number - 2)
    everywhere = {follower.dim for follower in found}
    vectors = norms_of_vectors(model)
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d) or type(norm).__name__ == 'FrozenBatchNorm2d':
            dims.setdefault(id(norm), 2)
        elif isinstance(norm, nn.BatchNorm3d):
            dims.setdefault(id(norm), 3)
        elif isinstance(norm, nn.SyncBatchNorm) and len(everywhere) == 1 and name not in vectors:
            dims.setdefault(id(norm), *everywhere)
    return dims


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
