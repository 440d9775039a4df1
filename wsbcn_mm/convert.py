"""Turns Conv + BatchNorm (or GroupNorm) of any torch model into WS + BCN, in place.

Which convolutions are meant is decided by `wsbcn_mm.structure`: only those that a normalisation
follows, because a standardized convolution without one multiplies activations by sqrt(fan-in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from wsbcn_mm import layers
from wsbcn_mm.checks import FORMULAS, MODES, auto_groups, check_choice
from wsbcn_mm.layers.fusing import refuse_to_fuse, turn_off_shortcuts
from wsbcn_mm.layers.subclasses import standardized_copy
from wsbcn_mm.networks import handover, module_replacement
from wsbcn_mm.networks.layer_kinds import NORMS, fan_in, is_conv, is_norm, num_channels, torch_class
from wsbcn_mm.networks.own_classes import (
    ACTIVATION,
    computes_with_its_weight,
    normalises_as_its_kind,
)
from wsbcn_mm.networks.trials import called, input_axes, run_on
from wsbcn_mm.structure import Follower, dims_of_norms, followers

STANDARDIZED = {
    nn.Conv1d: layers.WSConv1d,
    nn.Conv2d: layers.WSConv2d,
    nn.Conv3d: layers.WSConv3d,
    nn.ConvTranspose2d: layers.WSConvTranspose2d,
}
BATCH_CHANNEL_NORM = {
    1: layers.BatchChannelNorm1d,
    2: layers.BatchChannelNorm2d,
    3: layers.BatchChannelNorm3d,
}


_UNSEEN = 'something runs it that does not go by the modules and attributes of the model'


@dataclass(frozen=True)
class Changed:
    """A layer that was replaced: its name, what it was, what it is."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Left:
    """A convolution or normalisation that stays as it is, and why."""

    name: str
    layer: str
    reason: str


@dataclass
class ConversionReport:
    """What `convert_model` did; ``str()`` is a table.

    Attributes:
        changed: The layers that were replaced.
        left: The convolutions and normalisations that were not, with the reason.
    """

    changed: list[Changed] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f'changed: {len(self.changed)} layers']
        lines += [f'  {c.name}: {c.before} -> {c.after}' for c in self.changed]
        lines.append(f'left as they are: {len(self.left)} layers')
        lines += [f'  {item.name}: {item.layer}: {item.reason}' for item in self.left]
        return '\n'.join(lines)


def convert_model(
    model: nn.Module,
    example_input: object = None,
    *,
    standardize: bool = True,
    deformable: bool = True,
    num_groups: int | str | Callable[[int], int] = 'auto',
    mode: str = 'estimate',
    momentum: float | str | None = None,
    formula: str = 'paper',
) -> ConversionReport:
    """Replaces conv -> norm pairs of a model by WS convolutions and BCN, in place.

    - A BatchNorm, SyncBatchNorm, GroupNorm or FrozenBatchNorm2d behind a convolution becomes a
      `BatchChannelNorm1d/2d/3d` of its width; a BatchNorm2d or 3d elsewhere does, too, and with
      ``example_input``, which shows how many axes its inputs have, any of them that sees more than
      vectors. Its scale and shift are kept: those of a BatchNorm become ``batch_weight``,
      ``batch_bias``; those of a GroupNorm become the outer ``weight``, ``bias`` with
      ``affine='channel'``, so that nothing of it is lost.
    - Its convolution becomes the WS convolution of its kind, with its weight and bias. One of a
      class of its own (that pads in another way, that is deformable) keeps its ``forward``, as long
      as it computes with its own ``weight``.
    - Methods by which the model's library folds Conv + BatchNorm by itself (``model.fuse()``) end
      in an error that points to `wsbcn_mm.fold`, before anything is changed.
    - With ``example_input``, a layer that still runs when a new one stands in its place everywhere
      (a list of a class refers to it, an object in another language) is put back, and left.
    - Parameters stay the same objects (an optimizer that holds them, or layers that share them,
      still do). Running statistics are kept where the convolution stays as it is, and start anew
      where it is standardized: they describe the outputs of the raw weight.

    This is the start of a training, not an equal network: for a function-preserving start estimate
    the statistics first (`tools/model_converters/recalibrate.py`).

    Args:
        model: Changed in place; mode, device, dtype, ``requires_grad`` and hooks stay.
        example_input: What to call the model with (a tensor, or a tuple of arguments), in eval mode
            without gradients, before and after. What is seen decides what follows what; without it
            the structure does, see `wsbcn_mm.structure`, which knows no order in a ModuleList.
        standardize: Whether convolutions become WS; False: norms alone.
        deformable: Whether deformable ones do, too, and others that do not derive from torch's.
        num_groups: G of every layer, ``'auto'`` (see `BatchChannelNorm2d`), or a function of the
            width.
        mode: As in `BatchChannelNorm2d`.
        momentum: As in `BatchChannelNorm2d`.
        formula: As in `WSConv2d`; convolutions that are mmcv's ConvWS keep their own, 'std_eps',
            and their eps.

    Returns:
        What changed, and what was left and why. Converting a second time changes nothing.

    Raises:
        TypeError: ``model`` is not a module, or one of TorchScript, whose layers are fixed.
        ValueError: the model is itself a single convolution or normalisation, an unknown mode or
            formula, groups that do not divide a width, a model that runs with ``example_input``
            before and not afterwards. Nothing is changed then.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 2, 1))
        >>> report = convert_model(model)
        >>> [c.after for c in report.changed]
        ['WSConv2d', 'BatchChannelNorm2d']
        >>> report.left[0].reason
        'no normalisation follows, by the structure alone'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module\n  got {type(model).__name__}')
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError('the layers of a TorchScript model are fixed: convert it before scripting')
    if is_norm(model) or is_conv(model):
        raise ValueError(
            f'model must hold the layers that are to be replaced\n  got a {type(model).__name__} '
            'itself\n  put it into a torch.nn.Sequential'
        )
    check_choice(mode, MODES, 'mode')
    check_choice(formula, FORMULAS, 'formula')
    run = None if example_input is None else lambda *also: run_on(model, example_input, also)
    with input_axes(m for m in model.modules() if is_norm(m)) as axes:
        found = followers(model, run)
    modules = dict(model.named_modules(remove_duplicate=False))
    norms = _NormSettings(num_groups, mode, momentum)
    convs = _ConvSettings(
        standardize, deformable, formula, _tied_to_bare(found), ran=run is not None
    )
    unseen: set[int] = set()
    while True:
        # Everything is made before anything is replaced: an error leaves the model as it was.
        try:
            report, replacement = _decided(model, modules, found, axes, norms, convs, unseen)
        except BaseException:
            for module in modules.values():
                handover.belong_to(module)
            raise
        still = _put(model, modules, replacement, run)
        if not still:
            break
        unseen |= still
    for follower in found:  # statistics of a raw weight's outputs say nothing about the new ones
        if id(follower.conv) in replacement:
            for name in follower.norms:
                norm = replacement.get(id(modules[name]), modules[name])
                if isinstance(norm, layers.BatchChannelNorm):
                    norm.bn.reset_running_stats()
    refuse_to_fuse(model)
    return report


def _decided(
    model: nn.Module,
    modules: dict[str, nn.Module],
    found: list[Follower],
    axes: dict[int, set[int]],
    norms: _NormSettings,
    convs: _ConvSettings,
    unseen: set[int],
) -> tuple[ConversionReport, dict[int, nn.Module]]:
    """What changes, and the new layers by the id of the old one.

    ``unseen``: ids of layers that something runs where no new one can be put.
    """
    report = ConversionReport()
    replacement: dict[int, nn.Module] = {}
    dims = dims_of_norms(model, found, axes)
    # A parameter of the convolution in front of a normalisation.
    like: dict[int, Tensor | None] = {
        id(modules[name]): next(follower.conv.parameters(), None)
        for follower in found
        for name in follower.norms
    }
    lines = _convert_norms(model, modules, dims, like, replacement, norms, unseen)
    lines += [_convert_conv(follower, modules, replacement, convs, unseen) for follower in found]
    order = {name: i for i, name in enumerate(modules)}
    for line in sorted(lines, key=lambda line: order[line.name]):
        if isinstance(line, Changed):
            report.changed.append(line)
        else:
            report.left.append(line)
    return report, replacement


def _put(
    model: nn.Module,
    modules: dict[str, nn.Module],
    replacement: dict[int, nn.Module],
    run: Callable[..., object] | None,
) -> set[int]:
    """Puts the new layers into the model, unless an old one still runs then: returns their ids."""
    originals = {id(m): m for m in modules.values()}

    def put_back(shortcuts: list[nn.Module]) -> None:
        for key in replacement:
            handover.belong_to(originals[key])
        back = {id(new): originals[key] for key, new in replacement.items()}
        module_replacement.replace(model, back)
        for module in shortcuts:
            module.turn_on_efficient_conv_bn_eval(True)  # type: ignore[operator]

    shortcuts: list[nn.Module] = []
    try:
        module_replacement.replace(model, replacement)
        shortcuts = turn_off_shortcuts(model)
    except BaseException:
        put_back(shortcuts)
        raise
    if run is None:
        return set()
    try:
        old = [originals[key] for key in replacement]
        with called(old) as still:
            run(*old)
    except Exception as error:
        put_back(shortcuts)
        raise ValueError(
            f'the model runs as it is, but not converted: {type(error).__name__}: {error}\n'
            '  does its forward read tensors of a layer instead of calling it? nothing was changed'
        ) from error
    if still:
        put_back(shortcuts)
    return still


# ---- normalisations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _NormSettings:
    """What the user chose for every new normalisation."""

    num_groups: int | str | Callable[[int], int]
    mode: str
    momentum: float | str | None


def _convert_norms(
    model: nn.Module,
    modules: dict[str, nn.Module],
    dims: dict[int, int],
    like: dict[int, Tensor | None],
    replacement: dict[int, nn.Module],
    settings: _NormSettings,
    unseen: set[int],
) -> list[Changed | Left]:
    lines: list[Changed | Left] = []
    of_model = next(model.parameters(), None)
    for name, norm in model.named_modules():
        if isinstance(norm, torch.jit.ScriptModule):
            outer = isinstance(modules[name.rpartition('.')[0]], torch.jit.ScriptModule)
            kinds = {str(getattr(part, 'original_name', '')) for part in norm.modules()}
            if not outer and any('Conv' in kind or 'Norm' in kind for kind in kinds):
                lines.append(Left(name, type(norm).__name__, 'TorchScript: its layers are fixed'))
            continue
        if not is_norm(norm) or isinstance(norm, layers.BatchChannelNorm):
            continue
        parent = modules[name.rpartition('.')[0]]
        if is_norm(parent):  # the statistics of a BatchChannelNorm
            continue
        kind = type(norm).__name__
        reason = _UNSEEN if id(norm) in unseen else _why_not_norm(norm, dims)
        if reason is not None:
            lines.append(Left(name, kind, reason))
            continue
        try:
            new = _batch_channel_norm(norm, dims[id(norm)], settings, like.get(id(norm), of_model))
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None
        replacement[id(norm)] = _with_activation(norm, new)
        lines.append(Changed(name, kind, type(new).__name__))
    return lines


def _why_not_norm(norm: nn.Module, dims: dict[int, int]) -> str | None:
    if isinstance(norm, nn.LayerNorm):
        return 'normalises each position by itself; batch size does not matter to it'
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        return 'normalises each sample by itself; batch size does not matter to it'
    reason = handover.why_not(norm)
    if reason is not None:
        return reason
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin) and norm.has_uninitialized_params():
        return 'has no width yet: run the model once before'
    if id(norm) not in dims:
        return 'no convolution was found before it, and its kind does not tell the number of axes'
    if dims[id(norm)] not in BATCH_CHANNEL_NORM:
        return f'no BCN for {dims[id(norm)]}-d convolutions'
    if isinstance(norm, NORMS) and not normalises_as_its_kind(norm):
        return 'computes something else than the kind of normalisation it derives from'
    return None


def _batch_channel_norm(
    norm: Any, dim: int, settings: _NormSettings, like: Tensor | None
) -> layers.BatchChannelNorm:
    """With the values of a norm; where it has none, on the device and in the dtype of ``like``."""
    width = num_channels(norm)
    assert width is not None  # LayerNorm, which does not say, stays
    groups = settings.num_groups
    if callable(groups):
        groups = groups(width)
    elif groups == 'auto':
        # A GroupNorm's own groups are part of what it learned.
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else auto_groups(width)
    grouped = isinstance(norm, nn.GroupNorm)
    scale, shift = norm.weight, norm.bias  # None without affine
    tensors = (scale, norm._buffers.get('running_mean'), like)
    reference = next((t for t in tensors if t is not None), None)
    new = BATCH_CHANNEL_NORM[dim](
        width,
        groups,
        eps=norm.eps,
        momentum=settings.momentum,
        mode=settings.mode,
        affine='channel' if grouped and scale is not None else 'group',
        device=None if reference is None else reference.device,
        dtype=None if reference is None else reference.dtype,
    )
    names = ('weight', 'bias') if grouped else ('batch_weight', 'batch_bias')
    for target, value in zip(names, (scale, shift)):
        if isinstance(value, nn.Parameter):
            setattr(new, target, value)
        elif value is not None:  # FrozenBatchNorm2d keeps buffers
            getattr(new, target).data.copy_(value)
    if getattr(norm, 'running_mean', None) is not None:
        new.bn.running_mean.copy_(norm.running_mean)
        new.bn.running_var.copy_(norm.running_var)
    frozen = [not p.requires_grad for p in norm.parameters()]
    if frozen and all(frozen):
        new.requires_grad_(False)
    handover.take_over(norm, new)
    return new


def _with_activation(norm: nn.Module, new: nn.Module) -> nn.Module:
    """The norm followed by what a norm-with-activation (timm's BatchNormAct2d) does after it."""
    rest = {name: norm._modules[name] for name in ACTIVATION if name in norm._modules}
    if not rest:
        return new
    both = nn.Sequential()
    both.add_module('norm', new)
    for name, module in rest.items():
        both.add_module(name, module)
    handover.pass_on_calls(new, both)
    return both.train(norm.training)


# ---- convolutions ------------------------------------------------------------------------------


def _tied_to_bare(found: list[Follower]) -> set[int]:
    """Weights that some convolution uses without a normalisation behind it, by id."""
    return {id(f.conv.weight) for f in found if not f.normalised}


@dataclass(frozen=True)
class _ConvSettings:
    """For every convolution: what the user chose, ``tied`` weights, whether the model was run."""

    standardize: bool
    deformable: bool
    formula: str
    tied: set[int]
    ran: bool


def _convert_conv(
    follower: Follower,
    modules: dict[str, nn.Module],
    replacement: dict[int, nn.Module],
    settings: _ConvSettings,
    unseen: set[int],
) -> Changed | Left:
    conv, name = follower.conv, follower.names[0]
    kind = type(conv).__name__
    reason = _why_not_conv(follower, modules, replacement, settings)
    if reason is None and id(conv) in unseen:
        reason = _UNSEEN
    if reason is not None:
        return Left(name, kind, reason)
    standardizes = kind == 'ConvWS2d'  # mmcv's
    own = 'std_eps' if standardizes else settings.formula
    torchs = torch_class(conv)
    if torchs is None:  # a class of its own keeps its way to convolve
        copied = standardized_copy(conv, own)
        handover.belong_to(copied)
        replacement[id(conv)] = copied
        return Changed(name, kind, type(copied).__name__)
    target = STANDARDIZED[torchs]
    arguments: dict[str, Any] = dict(
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device='meta',  # its parameters are replaced below
    )
    if conv.transposed:
        arguments['output_padding'] = conv.output_padding
    if standardizes:
        arguments['eps'] = conv.eps
    new = target(conv.in_channels, conv.out_channels, conv.kernel_size, formula=own, **arguments)
    new.weight, new.bias = conv.weight, conv.bias
    handover.take_over(conv, new)
    replacement[id(conv)] = new
    return Changed(name, kind, target.__name__)


def _why_not_conv(
    follower: Follower,
    modules: dict[str, nn.Module],
    replacement: dict[int, nn.Module],
    settings: _ConvSettings,
) -> str | None:
    conv = follower.conv
    if isinstance(conv, layers.WeightStandardized):
        return 'is standardized already'
    if not follower.norms:
        return 'no normalisation follows' + ('' if settings.ran else ', by the structure alone')
    if follower.unnormalised:
        return f'not only a normalisation follows: also {", ".join(follower.unnormalised)}'
    left = [n for n in follower.norms if id(modules[n]) not in replacement]
    left = [n for n in left if not isinstance(modules[n], layers.BatchChannelNorm)]
    if left:
        return f'the normalisation behind it, {left[0]}, stays as it is'
    if not settings.standardize:
        return 'standardize=False'
    if not settings.deformable and not isinstance(conv, _ConvNd):
        return 'deformable=False'
    reason = handover.why_not(conv)
    if reason is not None:
        return reason
    if id(conv.weight) in settings.tied:
        return 'shares its weight with a convolution that no normalisation follows'
    if torch_class(conv) is None:
        if not computes_with_its_weight(conv):
            return f'{type(conv).__name__} computes with something else than its weight'
        own = vars(conv).keys() & {'eps', 'formula'}
        if own:
            return f'has an attribute {min(own)!r} of its own, which WS would take for its setting'
    return None if fan_in(conv) > 1 else 'a fan-in of 1 has no variance'
