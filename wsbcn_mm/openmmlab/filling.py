"""What a checkpoint fills of a model: one rule, over all parameters and buffers.

Where results are computed a model must be filled completely (`load`); where training starts, it is
said what was not (`wsbcn_mm.openmmlab.hooks.loading`).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.checkpoints import CheckpointMismatch, is_dense, meta_of, without_wrappers

# What torch.compile, activation checkpointing and FSDP put into names.
WRAPPERS_OF_PARTS = ('_orig_mod.', '_checkpoint_wrapped_module.', '_fsdp_wrapped_module.')


@dataclass
class Comparison:
    """What a state dict fills of a model's parameters and buffers.

    BatchNorm's counters (``num_batches_tracked``) are left out: no result depends on them.

    Attributes:
        filled: Names of tensors that it fills.
        missing: Names that it does not have.
        other_shape: Names that it has in another shape, with the shape there and the model's.
        no_values: Names that it has without numbers that can be copied (meta device, sparse).
        left_over: Names in the state dict that the model has no place for.
        not_numbers: Parameters that it fills with NaN or infinity, statistics with what is none.
        unlike: What is wrong where the checkpoint records other settings of the layers, with the
            lines of a config that mend it.
    """

    filled: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    other_shape: dict[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    no_values: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    not_numbers: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the model computes what the checkpoint's model did."""
        unfilled = self.missing or self.other_shape or self.no_values
        return not (unfilled or self.not_numbers or self.unlike)

    def __str__(self) -> str:
        unfilled = len(self.missing) + len(self.other_shape) + len(self.no_values)
        total = len(self.filled) + unfilled
        if unfilled:
            share = f'({100 * unfilled / total:.0f} %)'
            lines = [f'does not fill {unfilled} of the {total} tensors of this model {share}']
        else:
            lines = [f'fills all {total} tensors of this model']
        if self.missing:
            lines.append(f'not in the file: {_some(self.missing)}')
        for name, (found, wanted) in list(self.other_shape.items())[:4]:
            lines.append(f'of another shape: {name}: {tuple(found)} for {tuple(wanted)}')
        if len(self.other_shape) > 4:
            lines.append(f'  and {len(self.other_shape) - 4} more')
        if self.no_values:
            what = 'without values, or not dense (saved on the meta device, sparse, quantized)'
            lines.append(f'{what}: {_some(self.no_values)}')
        if self.left_over:
            lines.append(f'left over in the file: {_some(self.left_over)}')
        if self.missing or self.other_shape:
            asked = 'is it the checkpoint of another config (classes, norm, layers)?'
            named = _prefixed(self.missing, self.left_over) or _wrapped_inside(self.left_over)
            lines.append(named or asked)
        if self.not_numbers:
            lines.append(f'NaN, infinite, a variance below 0: {_some(self.not_numbers)}')
            lines.append('did its training diverge? take an earlier one')
        return '\n  '.join([*lines, *self.unlike])


def _prefixed(missing: list[str], left_over: list[str]) -> str | None:
    """What names begin with, where that is all: a wrapper's name, or a part's."""
    left = [name for name in left_over if not name.endswith('num_batches_tracked')]
    for longer, shorter in ((left, missing), (missing, left)):
        for name in longer if shorter else ():
            prefix = name.removesuffix(shorter[0])
            if prefix == name or not {prefix + other for other in shorter} <= {*longer}:
                continue
            if longer is missing:
                return f'it is the checkpoint of a part of the model alone ({prefix!r})'
            if all(name.startswith(prefix) for name in left):
                return f'all names in the file begin with {prefix!r}, a wrapper: save what it wraps'
            return (
                f'the file is of a whole model, and this is its {prefix!r}: '
                f"dict(type='Pretrained', checkpoint=..., prefix={prefix!r})"
            )
    return None


def _wrapped_inside(left_over: list[str]) -> str | None:
    """A wrapper of a part of the model, whose name stands in the middle of those of its tensors."""
    for wrapper in WRAPPERS_OF_PARTS:
        if any(wrapper in name for name in left_over):
            return f'names in the file hold {wrapper!r}, of a wrapper: take that out of them'
    return None


def _some(names: list[str], at_most: int = 4) -> str:
    rest = len(names) - at_most
    return ', '.join(names[:at_most]) + (f' and {rest} more' if rest > 0 else '')


def compare(
    model: nn.Module, state_dict: dict[str, Tensor], checkpoint: dict | None = None
) -> Comparison:
    """What a state dict would fill of a model; the model stays as it is.

    The model itself is asked, as when it loads: parts that take tensors under other names (older
    versions, student and teacher) are judged by what they make of them.

    Args:
        model: The model, not wrapped.
        state_dict: Tensors by name; leading ``module.`` are passed over.
        checkpoint: Where they are from; its ``meta`` may hold ``formula`` and ``affine``.
    """
    return _load(model, state_dict, checkpoint or {}, copy=False)


def load(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    checkpoint: dict | None = None,
    strict: bool = True,
    source: str | Path = 'the checkpoint',
) -> Comparison:
    """Copies a state dict into a model, and says what it filled.

    Args:
        model: See `compare`.
        state_dict: See there.
        checkpoint: See there.
        strict: All of the model must be filled.
        source: Names the checkpoint in the error.

    Raises:
        CheckpointMismatch: it is not; nothing was copied.
    """
    if strict:
        found = compare(model, state_dict, checkpoint)
        if not found.complete:
            raise CheckpointMismatch(f'{source} {found}')
    return _load(model, state_dict, checkpoint or {}, copy=True)


def _load(
    model: nn.Module, state_dict: dict[str, Tensor], checkpoint: dict, copy: bool
) -> Comparison:
    names = defaultdict(list)
    shapes, on_meta = {}, set()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):  # a module may have other things to save
            names[name.rpartition('.')[0]].append(name)
            shapes[name] = value.shape
            on_meta |= {name} if value.is_meta else set()
    found = Comparison(unlike=settings_unlike(model, checkpoint))
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def look(_module: nn.Module, state: dict, prefix: str, *_: object) -> None:
        # Called for every module in turn, after whatever renames tensors for it. What is taken out
        # of `state` here is not copied.
        for name in names[prefix[:-1]]:
            value = state.get(name)
            if not isinstance(value, Tensor):  # torch passes over what is none
                found.missing.append(name)
            elif value.shape != shapes[name]:
                found.other_shape[name] = (value.shape, shapes[name])
            elif (value.is_meta and name not in on_meta) or not is_dense(value):
                found.no_values.append(name)
            else:
                found.filled.append(name)
                statistic = 'running_' in name  # infinite ones, of dead channels, are about
                least = 0 if name.endswith('running_var') else -torch.inf
                right = value >= least if statistic else value.isfinite()
                if (statistic or name in learned) and not value.is_meta and not right.all():
                    found.not_numbers.append(name)
                if copy:
                    continue
            state.pop(name, None)

    handles = [module.register_load_state_dict_pre_hook(look) for module in model.modules()]
    state = OrderedDict((without_wrappers(k), v) for k, v in state_dict.items())
    try:
        found.left_over = list(model.load_state_dict(state, strict=False).unexpected_keys)
    finally:
        for handle in handles:
            handle.remove()
    for listed in (found.filled, found.missing):
        listed[:] = [name for name in listed if not name.endswith('num_batches_tracked')]
    return found


def settings_unlike(model: nn.Module, checkpoint: dict) -> list[str]:
    """What is wrong where a checkpoint records other settings than the layers of the model have.

    Args:
        model: The model.
        checkpoint: Its ``meta`` may hold ``formula`` and ``affine``, as our converter writes them.

    Returns:
        For each of them a sentence, with the config line that mends it.
    """
    meta = meta_of(checkpoint)
    found = []
    for name, kind, layer, place in (
        ('formula', WeightStandardized, 'WSConv2d', 'conv_cfg'),
        ('affine', BatchChannelNorm, 'BCN', 'norm_cfg'),
    ):
        if meta.get(name) is None:
            continue
        others = {getattr(m, name) for m in model.modules() if isinstance(m, kind)} - {meta[name]}
        if others:
            found.append(
                f'the checkpoint is for {name} {meta[name]!r}, layers of this model have '
                f'{", ".join(sorted(map(repr, others)))}\n'
                f'  set {place}=dict(type={layer!r}, {name}={meta[name]!r})'
            )
    return found
