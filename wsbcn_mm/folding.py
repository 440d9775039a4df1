"""Folding for inference: what is constant in evaluation is computed once.

In evaluation the standardized weight of a WS convolution is a constant, and BCN's batch stage is an
affine map per channel with constants. Behind a convolution both go into its weight and bias:

    BCN(conv(x, w)) = GN(a (conv(x, w) + bias - mu) + b) = GN(conv(x, a w) + a (bias - mu) + b)

with ``a = batch_weight / sqrt(running_var + eps)`` and ``b = batch_bias``. What remains is a plain
torch convolution and a plain `nn.GroupNorm`, whose scale and shift per group are written out per
channel. The map acts on the convolution's output, so its padding does not matter; in front of a
convolution (pre-activation order) it would, and nothing is folded there.

Which norm follows which convolution is not guessed from names: the model runs once, and every
operation that reads a convolution's output is watched. A pair is folded when every output of the
convolution goes to that norm and nowhere else, and every input of the norm comes from there.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.structure import Call, Watch, holders_of

Run = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Fold:
    """One change: the convolutions become plain, and take in what is constant in the norm.

    ``norm`` is None where Weight Standardization alone is folded. ``shared``: other modules hold
    the same convolution, with another norm behind it; the one that is named gets a convolution of
    its own.
    """

    convs: tuple[str, ...]
    norm: str | None
    shared: bool = False


@dataclass(frozen=True)
class Plan:
    """What can be folded in a model, and what cannot, with the reason.

    Attributes:
        folds: The changes.
        left: Names of the layers of this package that stay, each with the reason.
        fixed: Names of layers in whose place no other may stand.
    """

    folds: tuple[Fold, ...]
    left: dict[str, str]
    fixed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        paired = [fold for fold in self.folds if fold.norm is not None]
        lines = [
            f'{len(paired)} norms folded into {sum(len(fold.convs) for fold in paired)} '
            f'convolutions, {len(self.folds) - len(paired)} further weights standardized for good, '
            f'{len(self.left)} layers left'
        ]
        return '\n'.join(lines + [f'  {name}: {reason}' for name, reason in self.left.items()])

    @torch.no_grad()
    def apply(self, model: nn.Module, plain: bool = False) -> nn.Module:
        """A folded copy of the model, in evaluation mode; see `fold`."""
        folded = _evaluating_copy(model)
        new, at_one_place = {}, {}
        for step in self.folds:
            norm = None if step.norm is None else folded.get_submodule(step.norm)
            for name in step.convs:
                conv = folded.get_submodule(name)
                plain_conv = _plain_conv(conv) if norm is None else _conv_with(conv, norm)
                if step.shared:
                    at_one_place[name] = plain_conv
                else:
                    new[conv] = plain_conv
            if isinstance(norm, BatchChannelNorm):
                new[norm] = _group_norm(norm)
            elif norm is not None:
                new[norm] = nn.Identity().eval()
        if plain:
            for name in self.left.keys() - self.fixed:
                layer = folded.get_submodule(name)
                if isinstance(layer, BatchChannelNorm):
                    new[layer] = nn.Sequential(_batch_norm(layer), _group_norm(layer)).eval()
                else:
                    new[layer] = _conv_with_raw_weight(layer)
        folded = _replace(folded, new)
        for name, conv in at_one_place.items():
            holder, _, attribute = name.rpartition('.')
            folded.get_submodule(holder)._modules[attribute] = conv
        return folded


def fold(
    model: nn.Module, inputs: object = None, run: Run | None = None, plain: bool = False
) -> nn.Module:
    """A copy of the model for inference, with the same results as ``model.eval()``.

    ====================== =======================================================================
    layers                 become
    ====================== =======================================================================
    convolution + BCN      convolution with bias + `nn.GroupNorm` with a scale and shift per
                           channel; WS or plain, 1d to 3d, grouped or transposed
    WS convolution + BN    convolution with bias + `nn.Identity`
    WS convolution         convolution (in front of GroupNorm, and where no pair is confirmed)
    ====================== =======================================================================

    Modules keep their names, so code that refers to them goes on working. A layer that is used
    several times, or from several places, is folded once if it is followed by the same norm each
    time. Modules that share a convolution and have norms of their own (the levels of RetinaSepBN)
    get convolutions of their own. What cannot be folded exactly stays as it is, and a warning names
    it with the reason. Standardized weights are the layer's own; the scale and shift of a norm are
    applied to them in float64, and the result is rounded once to the dtype of the weight.

    Pairs are confirmed by running a copy of the model: on ``inputs``, or as ``run`` says. Parts
    that this does not reach (an auxiliary head), and with neither argument a model that does not
    take one image tensor, are run part by part on random input with the channels that their
    convolutions ask for; how the parts are used together is then not seen: give ``inputs``.

    Args:
        model: Any module; stays unchanged, its mode too. Training mode does not matter.
        inputs: The argument of one call ``model(inputs)``, or a tuple of the arguments.
        run: Instead, for a model that is called in another way: a function of a copy of the model
            that runs it as it will be used, and returns what is used of the result.
        plain: Replace what cannot be folded as well, unless it has hooks or is referred to from
            outside of the module tree: a BCN by torch's BatchNorm followed by GroupNorm (one pass
            over the map more, the same result); a WS convolution that is never run, whose weight
            something else reads as it is, by a convolution with that weight.

    Returns:
        The new model in evaluation mode, with parameters of its own. Its results differ from the
        model's by rounding alone.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: both ``inputs`` and ``run``.

    Example:
        >>> from wsbcn_mm import BatchChannelNorm2d, WSConv2d
        >>> model = nn.Sequential(WSConv2d(3, 64, 3), BatchChannelNorm2d(64), nn.ReLU()).eval()
        >>> [type(layer).__name__ for layer in fold(model)]
        ['Conv2d', 'GroupNorm', 'ReLU']
    """
    steps = plan(model, inputs, run)
    for name, reason in steps.left.items():
        warnings.warn(f'{name} is not folded: {reason}', stacklevel=2)
    return steps.apply(model, plain)


def plan(model: nn.Module, inputs: object = None, run: Run | None = None) -> Plan:
    """Finds what `fold` would do, without doing it; the arguments are those of `fold`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module\n  got {type(model).__name__}')
    if inputs is not None and run is not None:
        raise ValueError('give inputs or run, not both')
    work = _evaluating_copy(model)
    names = {module: name for name, module in work.named_modules()}
    evidence = _Evidence()
    if inputs is not None:
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        evidence.add(work, lambda module: module(*arguments))
    elif run is not None:
        evidence.add(work, run)
    evidence.explore(work)
    return _decide(work, names, evidence)


def _evaluating_copy(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.eval()  # OpenMMLab's backbones answer None
    return model


# ----------------------------------------------------------------------------------------------
# What the run shows

_ELSEWHERE = 'the result of the run'
_HOLDS = 'no run calls it; something else reads its weight, without Weight Standardization'
_GUESSES = 4  # registration order is seldom far from the order of use


class _Evidence:
    """Who read the output of every convolution, collected over one run or more.

    Attributes:
        calls: By convolution, what is known of every call.
        inputs: By norm: one entry per call, the call of a convolution whose unchanged output came
            in, or None.
        leaks: Layers whose parameters something outside of them read.
        failed: By module: why it could not be run on its own.
    """

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self.inputs: dict[nn.Module, list[Call | None]] = defaultdict(list)
        self.leaks: set[nn.Module] = set()
        self.failed: dict[nn.Module, str] = {}

    def add(self, module: nn.Module, run: Run) -> None:
        """Runs the module and remembers what was seen; nothing of a run that raises."""
        watch = Watch(module)
        with torch.no_grad(), watch:
            result = run(module)
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf in watch.outputs:
                    watch.outputs[leaf].readers.append(_ELSEWHERE)
        for call in watch.calls:
            self.calls[call.conv].append(call)
        for norm, call in watch.inputs:
            self.inputs[norm].append(call)
        self.leaks |= watch.leaks

    def explore(self, module: nn.Module) -> None:
        """Runs what no run has reached yet: the module, or its parts where it does not run."""
        if _watched(module) or not any(self._is_open(m) for m in module.modules()):
            return
        for x in _guess_inputs(module):
            try:
                self.add(module, lambda module, x=x: module(x))
            except Exception as error:  # noqa: BLE001  whatever a module raises that wants other arguments
                self.failed[module] = f'{type(error).__name__}: {error}'.partition('\n')[0]
            else:
                break
        for child in module.children():
            self.explore(child)

    def _is_open(self, module: nn.Module) -> bool:
        kind = (WeightStandardized, BatchChannelNorm)
        seen = (self.calls, self.inputs, self.leaks)
        return isinstance(module, kind) and not any(module in some for some in seen)


def _watched(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, BatchChannelNorm, _BatchNorm))


def _guess_inputs(module: nn.Module) -> list[Tensor]:
    """Random inputs that a module may take: one per number of channels that a convolution wants."""
    inputs = {}
    for conv in module.modules():
        if isinstance(conv, _ConvNd):
            weight = conv.weight
            # Large enough for the strides of a backbone, odd in one axis.
            size = {1: (67,), 2: (64, 67), 3: (16, 16, 17)}[weight.dim() - 2]
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, conv.in_channels, *size, generator=generator)
            inputs.setdefault(x.shape, x.to(weight.device, weight.dtype))
    return list(inputs.values())[:_GUESSES]


# ----------------------------------------------------------------------------------------------
# Decisions


def _decide(root: nn.Module, names: dict[nn.Module, str], evidence: _Evidence) -> Plan:
    fixed = _fixed(root, evidence)
    holders = holders_of(root)
    folds, left, done = [], {}, set()
    for norm, name in names.items():
        ours = isinstance(norm, BatchChannelNorm)
        if not ours and not (isinstance(norm, _BatchNorm) and norm in evidence.inputs):
            continue
        calls = evidence.inputs.get(norm, [])
        convs = list(dict.fromkeys(call.conv for call in calls if call is not None))
        if not ours and not all(isinstance(conv, WeightStandardized) for conv in convs):
            continue  # not a layer of this package, nor behind one
        reason = _why_not_at_all(norm, calls, convs, names, evidence, fixed)
        whole = [_why_not_whole(norm, conv, names, evidence) for conv in convs]
        if reason is None and not any(whole):
            folds.append(Fold(tuple(names[conv] for conv in convs), name))
            done.update(convs)
        elif reason is None and all(_splits(norm, c, evidence, holders) for c in convs):
            places = dict.fromkeys((call.conv, call.holder) for call in calls)
            paths = (
                f'{names[holder]}.{attribute}'.lstrip('.')
                for conv, holder in places
                for attribute, child in holder.named_children()
                if child is conv
            )
            folds.append(Fold(tuple(paths), name, shared=True))
        elif ours:
            left[name] = reason or next(filter(None, whole))
    for conv, name in names.items():
        if isinstance(conv, WeightStandardized) and conv not in done:
            if conv in fixed:
                left[name] = fixed[conv]
            else:
                folds.append(Fold((name,), None))
    immovable = {name for layer, name in names.items() if fixed.get(layer, _HOLDS) != _HOLDS}
    return Plan(tuple(folds), left, frozenset(immovable))


def _why_not_at_all(
    norm: nn.Module, calls: list, convs: list, names: dict, evidence: _Evidence, fixed: dict
) -> str | None:
    """Why a norm cannot be folded into the convolutions in front of it, whoever else uses them."""
    if norm in fixed:
        return fixed[norm]
    if not calls:
        failed = '; '.join(
            f'{names[m] or "the model"}: {why}'
            for m, why in evidence.failed.items()
            if norm in set(m.modules())
        )
        return f'no run reached it ({failed})' if failed else 'no run reached it'
    if None in calls:
        return 'its input is not the output of a convolution (or not each time, or was changed)'
    if isinstance(norm, _BatchNorm) and norm.running_mean is None:
        return 'it uses the statistics of its input in evaluation, too'
    for conv in convs:
        if conv in fixed:
            return f'{names[conv]} cannot be replaced: {fixed[conv]}'
        if not _is_linear_in_its_weight(conv):
            kind = type(conv).__name__
            return f'{names[conv]}, a {kind}, computes with something else than its weight'
    return None


def _why_not_whole(
    norm: nn.Module, conv: nn.Module, names: dict, evidence: _Evidence
) -> str | None:
    """Where an output of the convolution goes, if not to the norm alone."""
    for call in evidence.calls[conv]:
        if call.readers != [norm]:
            others = [r for r in call.readers if r is not norm]
            other = others[0] if others else 'nothing' if not call.readers else 'it a second time'
            other = names.get(other, other) if isinstance(other, nn.Module) else other
            return f'the output of {names[conv]} also goes to {other}'
    return None


def _splits(norm: nn.Module, conv: nn.Module, evidence: _Evidence, holders: dict) -> bool:
    """Whether the holders of a shared convolution may get convolutions of their own.

    All of them were seen to run it, and those that use the norm put nothing else behind it.
    """
    calls = evidence.calls[conv]
    mine = {call.holder for call in calls if norm in call.readers}
    return (
        {call.holder for call in calls} == set(holders[conv])
        and len(mine) < len(holders[conv])
        and all(call.readers == [norm] for call in calls if call.holder in mine)
    )


def _fixed(root: nn.Module, evidence: _Evidence) -> dict[nn.Module, str]:
    """Layers that cannot be replaced without changing what happens around them."""
    found = {
        layer: _HOLDS
        if isinstance(layer, WeightStandardized) and layer not in evidence.calls
        else 'something else reads its parameters'
        for layer in evidence.leaks
    }
    for module in root.modules():
        if _hooks(module) and _watched(module):
            found[module] = 'it has hooks, which a new layer would not have'
        for attribute, value in vars(module).items():
            for layer in _modules_in(value) if attribute != '_modules' else ():
                if _watched(layer):
                    kind = type(module).__name__
                    found[layer] = f'attribute {attribute!r} of a {kind} refers to it as well'
    return found


def _hooks(module: nn.Module) -> bool:
    kinds = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return any(getattr(module, kind) for kind in kinds)


def _modules_in(value: object) -> Iterator[nn.Module]:
    """Modules that an attribute holds beside the module tree."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, dict):
        yield from (item for item in value.values() if isinstance(item, nn.Module))
    elif isinstance(value, (list, tuple, set)):
        yield from (item for item in value if isinstance(item, nn.Module))


@torch.no_grad()
def _is_linear_in_its_weight(conv: nn.Module) -> bool:
    """Whether scaling a convolution's weight and adding a bias does that to its output.

    Torch's own do. A subclass may compute its weight (mmcv's ConvWS): that is found out by trying.
    A parametrized one does.
    """
    if hasattr(conv, 'parametrizations') and not isinstance(conv, WeightStandardized):
        return False
    if isinstance(conv, WeightStandardized) or type(conv).__module__ == 'torch.nn.modules.conv':
        return True
    conv = copy.deepcopy(conv).double()
    scale = torch.linspace(0.5, 2, conv.out_channels, dtype=torch.float64).to(conv.weight.device)
    (x,) = _guess_inputs(conv)
    expected = conv(x) * scale.view(-1, *[1] * (x.dim() - 2)) + scale.view(-1, *[1] * (x.dim() - 2))
    found = _scale(conv, scale, scale)(x)
    return found.shape == expected.shape and torch.allclose(found, expected, 1e-9, 1e-9)


# ----------------------------------------------------------------------------------------------
# New layers


def _conv_with(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """The convolution followed by BCN's batch stage, or by BatchNorm: one plain convolution."""
    mean, var, weight, bias, eps = _affine_of(norm)
    scale = weight.double() / (var.double() + eps).sqrt()
    shift = bias.double() - mean.double() * scale
    return _scale(_plain_conv(conv, torch.float64), scale, shift, conv.weight.dtype)


def _affine_of(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    if isinstance(norm, BatchChannelNorm):
        statistics, weight, bias = norm.bn, norm.batch_weight, norm.batch_bias
    else:
        statistics, weight, bias = norm, norm.weight, norm.bias
    mean, var = statistics.running_mean, statistics.running_var
    weight = torch.ones_like(var) if weight is None else weight
    return mean, var, weight, torch.zeros_like(mean) if bias is None else bias, norm.eps


def _plain_conv(conv: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The convolution without Weight Standardization.

    Its weight is the one the layer itself computes: networks without trained statistics enlarge the
    rounding of another one a thousand times.
    """
    plain = conv.to_plain() if isinstance(conv, WeightStandardized) else copy.deepcopy(conv)
    plain.requires_grad_(conv.weight.requires_grad)
    return _like(plain.to(dtype or conv.weight.dtype), conv)


def _conv_with_raw_weight(conv: nn.Module) -> nn.Module:
    """A plain convolution that holds the parameters of a WS convolution as they are."""
    plain = _plain_conv(conv)
    plain.weight.copy_(conv.weight)
    return plain


def _like(new: nn.Module, conv: nn.Module) -> nn.Module:
    weight = conv.weight
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if layout is None or weight.is_contiguous():
        return new
    return new.to(memory_format=layout) if weight.is_contiguous(memory_format=layout) else new


def _scale(
    conv: nn.Module, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """``scale * conv(x) + shift`` per output channel as one convolution, of the given dtype."""
    new = copy.deepcopy(conv)
    weight = conv.weight
    if conv.transposed:  # (C_in, C_out / groups, *k), C_in and C_out both by group
        by_group = weight.unflatten(0, (conv.groups, -1))
        per_channel = scale.view(conv.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (by_group * per_channel).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = shift if conv.bias is None else conv.bias * scale + shift
    requires_grad = conv.weight.requires_grad
    new.weight = nn.Parameter(weight.to(dtype), requires_grad)
    new.bias = nn.Parameter(bias.to(dtype), requires_grad)
    return _like(new, conv)


def _group_norm(norm: BatchChannelNorm) -> nn.GroupNorm:
    """BCN's channel stage; its scale and shift per group written out per channel."""
    like = dict(device=norm.batch_weight.device, dtype=norm.batch_weight.dtype)
    affine = norm.weight is not None
    new = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine, **like)
    if affine:
        for target, source in ((new.weight, norm.weight), (new.bias, norm.bias)):
            target.copy_(source.repeat_interleave(norm.num_channels // source.numel()))
            target.requires_grad_(source.requires_grad)
    return new.eval()


def _batch_norm(norm: BatchChannelNorm) -> _BatchNorm:
    """BCN's batch stage in evaluation."""
    new = norm._bn_class(norm.num_channels, norm.eps).to(norm.batch_weight)
    statistics = norm.bn.state_dict()
    new.load_state_dict(dict(statistics, weight=norm.batch_weight, bias=norm.batch_bias))
    return new.eval()


def _replace(root: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts new modules wherever the tree refers to the old ones."""
    modules: Iterable[nn.Module] = list(root.modules())
    for module in modules:
        for name, child in module._modules.items():
            if child in new:
                module._modules[name] = new[child]
    return new.get(root, root)
