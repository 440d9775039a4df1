"""What can be folded in a model, and what cannot, with the reason."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from wsbcn_mm.folding import new_layers, results
from wsbcn_mm.folding.evidence import Evidence, Run, watched
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.networks import module_replacement
from wsbcn_mm.networks.copies import copied
from wsbcn_mm.networks.layer_kinds import is_conv
from wsbcn_mm.networks.own_classes import has_own_forward, normalises_as_its_kind
from wsbcn_mm.networks.watching import Call, holders_of


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
        refused_sizes: Sizes of the inputs in which the model was tried and did not run, and why;
            what it does there was not seen.
    """

    folds: tuple[Fold, ...]
    left: dict[str, str]
    fixed: frozenset[str] = frozenset()
    refused_sizes: tuple[str, ...] = ()

    def __str__(self) -> str:
        paired = [fold for fold in self.folds if fold.norm is not None]
        lines = [
            f'{len(paired)} norms folded into {sum(len(fold.convs) for fold in paired)} '
            f'convolutions, {len(self.folds) - len(paired)} further weights standardized for good, '
            f'{len(self.left)} layers left'
        ]
        lines += [f'  {name}: {reason}' for name, reason in self.left.items()]
        lines += [f'  the model does not run in {why}' for why in self.refused_sizes]
        return '\n'.join(lines)

    @torch.no_grad()
    def apply(self, model: nn.Module, plain: bool = False) -> nn.Module:
        """A folded copy of the model, in evaluation mode; see `fold`."""
        folded = _evaluating_copy(model)
        new: dict[nn.Module, nn.Module] = {}
        at_one_place: dict[str, _ConvNd] = {}
        for step in self.folds:
            norm = None if step.norm is None else folded.get_submodule(step.norm)
            for name in step.convs:
                conv = _conv_at(folded, name)
                plain_conv = new_layers.folded_conv(conv, norm)
                if step.shared:
                    at_one_place[name] = plain_conv
                else:
                    new[conv] = plain_conv
            if isinstance(norm, BatchChannelNorm):
                new[norm] = new_layers.group_norm(norm)
            elif norm is not None:
                new[norm] = nn.Identity().eval()
        if plain:
            for name in self.left.keys() - self.fixed:
                layer = folded.get_submodule(name)
                if isinstance(layer, BatchChannelNorm):
                    new[layer] = new_layers.both_stages(layer)
                else:
                    new[layer] = new_layers.conv_with_raw_weight(_conv_at(folded, name))
        module_replacement.replace_children(folded, {id(old): layer for old, layer in new.items()})
        folded = new.get(folded, folded)
        for name, plain_conv in at_one_place.items():
            holder, _, attribute = name.rpartition('.')
            folded.get_submodule(holder)._modules[attribute] = plain_conv
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

    Pairs are confirmed by running a copy of the model: on ``inputs``, and on maps of half and twice
    their size, for which it may go another way; or as ``run`` says, which is to go all ways there
    are. Parts that this does not reach (an auxiliary head), and with neither argument a model that
    does not take one image tensor, are run part by part on random input with the channels that
    their convolutions ask for; how the parts are used together is then not seen: give ``inputs``.

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
        ValueError: both ``inputs`` and ``run``; a folded model that does not run with them, or
            whose results differ by more than rounding (in float64, or in the model's own dtype
            where it takes no other).

    Examples:
        >>> from wsbcn_mm import BatchChannelNorm2d, WSConv2d
        >>> model = nn.Sequential(WSConv2d(3, 64, 3), BatchChannelNorm2d(64), nn.ReLU()).eval()
        >>> [type(layer).__name__ for layer in fold(model)]
        ['Conv2d', 'GroupNorm', 'ReLU']
    """
    with torch.inference_mode(False):
        return _folded(model, inputs, run, plain)


def _folded(model: nn.Module, inputs: object, run: Run | None, plain: bool) -> nn.Module:
    steps, expected = _planned(model, inputs, run)
    for name, reason in steps.left.items():
        warnings.warn(f'{name} is not folded: {reason}', stacklevel=3)
    folded = steps.apply(model, plain)
    if expected is not None:
        arguments = _arguments(inputs)
        results.check(
            lambda: _evaluating_copy(model),
            lambda double: steps.apply(double, plain),
            folded,
            results.seeded(run or (lambda m: m(*results.copies(arguments)))),
            results.seeded(run or (lambda m: m(*results.copies(arguments, torch.float64)))),
            expected,
        )
    return folded


def plan(model: nn.Module, inputs: object = None, run: Run | None = None) -> Plan:
    """Finds what `fold` would do, without doing it; the arguments are those of `fold`."""
    with torch.inference_mode(False):  # whose tensors do not tell that they were changed
        return _planned(model, inputs, run)[0]


def _planned(model: nn.Module, inputs: object, run: Run | None) -> tuple[Plan, list[Tensor] | None]:
    """The plan, and what the model gave for the inputs, or in the run."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module\n  got {type(model).__name__}')
    if inputs is not None and run is not None:
        raise ValueError('give inputs or run, not both')
    if not any(isinstance(m, (WeightStandardized, BatchChannelNorm)) for m in model.modules()):
        return Plan((), {}), None  # nothing to look for, however large the model
    work = _evaluating_copy(model)
    referred = module_replacement.modules_in_attributes(work)
    evidence = Evidence()
    twins = evidence.put_twins(work)
    work = twins.get(work, work)
    names = {module: name for name, module in work.named_modules()}
    expected = None
    if inputs is not None:
        arguments = _arguments(inputs)
        expected = results.tensors_of(
            evidence.add(work, results.seeded(lambda module: module(*arguments)))
        )
        evidence.add_other_sizes(work, arguments)
    elif run is not None:
        expected = results.tensors_of(evidence.add(work, results.seeded(run)))
    evidence.explore(work)
    fixed = _fixed(work, evidence)
    for layer, where in referred.items():
        if layer in twins:
            fixed[twins[layer]] = f'{where} refers to it as well'
    return _decide(work, names, evidence, fixed), expected


def _arguments(inputs: object) -> tuple[object, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _conv_at(model: nn.Module, name: str) -> _ConvNd:
    conv = model.get_submodule(name)
    assert is_conv(conv)
    return conv


def _evaluating_copy(model: nn.Module) -> nn.Module:
    model = copied(model)
    model.eval()  # OpenMMLab's backbones answer None
    return model


# ----------------------------------------------------------------------------------------------
# Decisions

_HOLDS = 'no run calls it; something else reads its weight, without Weight Standardization'


Names = Mapping[nn.Module, str]


def _decide(
    root: nn.Module, names: Names, evidence: Evidence, fixed: Mapping[nn.Module, str]
) -> Plan:
    holders = holders_of(root)
    folds: list[Fold] = []
    left: dict[str, str] = {}
    done: set[nn.Module] = set()
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
            # Every call is one of a convolution, or there would be a reason; those that are shared
            # have holders.
            places = dict.fromkeys((c.conv, c.holder) for c in calls if c is not None)
            paths = (
                f'{names[holder]}.{attribute}'.lstrip('.')
                for conv, holder in places
                if holder is not None
                for attribute, child in holder.named_children()
                if child is conv
            )
            folds.append(Fold(tuple(paths), name, shared=True))
        elif ours:
            left[name] = reason or next(why for why in whole if why is not None)
    for conv, name in names.items():
        if isinstance(conv, WeightStandardized) and conv not in done:
            if conv in fixed:
                left[name] = fixed[conv]
            else:
                folds.append(Fold((name,), None))
    immovable = {name for layer, name in names.items() if fixed.get(layer, _HOLDS) != _HOLDS}
    return Plan(tuple(folds), left, frozenset(immovable), tuple(evidence.refused_sizes))


def _why_not_at_all(
    norm: nn.Module,
    calls: Sequence[Call | None],
    convs: Sequence[_ConvNd],
    names: Names,
    evidence: Evidence,
    fixed: Mapping[nn.Module, str],
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
    if isinstance(norm, _BatchNorm) and not normalises_as_its_kind(norm, activation=False):
        return f'a {type(norm).__name__} does more than a BatchNorm'
    for conv in convs:
        if conv in fixed:
            return f'{names[conv]} cannot be replaced: {fixed[conv]}'
        kind = type(conv).__name__
        if not isinstance(conv, _ConvNd):
            return f'{names[conv]}, a {kind}, is a class of its own that may take no bias'
        if not new_layers.is_linear_in_its_weight(conv):
            return f'{names[conv]}, a {kind}, computes with something else than its weight'
    return None


def _why_not_whole(
    norm: nn.Module, conv: nn.Module, names: Names, evidence: Evidence
) -> str | None:
    """Where an output of the convolution goes, if not to the norm alone."""
    for call in evidence.calls[conv]:
        if call.readers != [norm]:
            others = [r for r in call.readers if r is not norm]
            other = others[0] if others else 'nothing' if not call.readers else 'it a second time'
            other = names.get(other, other) if isinstance(other, nn.Module) else other
            return f'the output of {names[conv]} also goes to {other}'
    return None


def _splits(
    norm: nn.Module,
    conv: nn.Module,
    evidence: Evidence,
    holders: Mapping[nn.Module, list[nn.Module]],
) -> bool:
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


def _fixed(root: nn.Module, evidence: Evidence) -> dict[nn.Module, str]:
    """Layers that cannot be replaced without changing what happens around them."""
    found = {
        layer: _HOLDS
        if isinstance(layer, WeightStandardized) and layer not in evidence.calls
        else 'something else reads its parameters or statistics'
        for layer in evidence.leaks
    }
    for module in root.modules():
        ours = isinstance(module, (BatchChannelNorm, WeightStandardized))
        child = isinstance(module, BatchChannelNorm) and module.bn
        if watched(module) and (_hooks(module) or (child and _hooks(child))):
            found[module] = 'it has hooks, which a new layer would not have'
        elif ours and has_own_forward(module):
            found[module] = f'a {type(module).__name__} has a forward pass of its own'
    found.update((layer, 'not only the module tree leads to it') for layer in evidence.beside)
    return found


def _hooks(module: nn.Module) -> bool:
    kinds = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return any(getattr(module, kind) for kind in kinds)
