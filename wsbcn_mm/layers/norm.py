"""The BCN layers: parameters, buffers, state dict, training and evaluation. The math is elsewhere.

Why the classes are built as they are (each point is a test in tests/openmmlab):

- They name nn.GroupNorm as a **direct** base, beside the class with the code, because OpenMMLab's
  initialisation and weight-decay rules look at direct base classes.
- `BatchChannelNorm2d` is an `nn.GroupNorm` holding its channel stage as child ``bn``, a BatchNorm
  (`wsbcn_mm.layers.channel_stage`), so that ``norm_eval``, SyncBN conversion, weight-decay rules
  and all that is done to the BatchNorms of a model reach the right part, and nothing takes the
  layer for a BatchNorm that it could fuse away.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from wsbcn_mm import compat
from wsbcn_mm.checks import (
    MODES,
    auto_groups,
    check_choice,
    check_eps,
    check_groups,
    checked_rate,
)
from wsbcn_mm.layers import channel_stage
from wsbcn_mm.layers.forward_passes import ForwardPasses

AFFINES = ('group', 'channel', None)
SYNCS = (None, 'step', 'forward')
DEFAULT_MOMENTUM = {'estimate': 0.01, 'batch': 0.1}

# What is checked whenever it is set.
_SETTINGS: dict[str, Callable[[Any], None]] = {
    'eps': check_eps,
    'mode': functools.partial(check_choice, choices=MODES, name='mode'),
    'sync': functools.partial(check_choice, choices=SYNCS, name='sync'),
}

Layer = TypeVar('Layer', bound='BatchChannelNorm')


class BatchChannelNorm(ForwardPasses):
    """What the Batch-Channel Normalization layers share."""

    _version = 1
    _abbr_ = 'bcn'  # attribute name in OpenMMLab's modules (`bcn1`); 'bn' would collide with BN's

    def __init__(
        self,
        num_channels: int,
        num_groups: int | str = 32,
        eps: float = 1e-5,
        momentum: float | str | None = None,
        affine: str | None = 'group',
        mode: str = 'estimate',
        sync: str | None = 'step',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        groups = auto_groups(num_channels) if num_groups == 'auto' else num_groups
        check_groups(num_channels, groups)
        num_channels, groups = int(num_channels), int(groups)  # NumPy's are none to torch
        check_eps(eps)
        check_choice(affine, AFFINES, 'affine')
        check_choice(mode, MODES, 'mode')  # before anything is made
        check_choice(sync, SYNCS, 'sync')
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(groups, num_channels, eps, affine == 'channel', **factory)
        if affine == 'group':
            self.weight = nn.Parameter(torch.ones(groups, **factory))
            self.bias = nn.Parameter(torch.zeros(groups, **factory))
        self.batch_weight = nn.Parameter(torch.ones(num_channels, **factory))
        self.batch_bias = nn.Parameter(torch.zeros(num_channels, **factory))
        self.bn = self._stage_class(num_channels, eps, affine=False, **factory)
        self.bn.belongs_to(self)
        self._counts = None
        self._average = None
        self._place()
        self.affine = affine  # type: ignore[assignment]  # nn.GroupNorm's is a bool
        self.mode = mode
        self.sync = sync
        self.momentum = DEFAULT_MOMENTUM[mode] if momentum is None else momentum

    def __setattr__(self, name: str, value: Any) -> None:
        check = _SETTINGS.get(name)
        if check is not None:
            check(value)
        if name == 'eps':
            value = float(value)
        if name == 'bn' and isinstance(value, nn.Module):
            value = channel_stage.adopted(value, self)
        super().__setattr__(name, value)
        if name == 'eps' and 'bn' in self._modules:
            self._modules['bn'].__dict__['eps'] = value

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in torch; what a conversion makes of the child becomes its channel stage again."""
        if name == 'bn' and module is not None:
            module = channel_stage.adopted(module, self)
        super().add_module(name, module)

    @property
    def num_features(self) -> int:
        """``num_channels``, by a BatchNorm's name: blocks ask their norm for it."""
        return self.num_channels

    @property
    def momentum(self) -> float | Tensor | str:
        """Rate of the running statistics: a number in [0, 1] or ``'cumulative'``; settable.

        Kept in ``bn.momentum`` (None there means cumulative, as in torch), so that whatever sets
        the momentum of every BatchNorm of a model reaches this layer too.
        """
        # Of a frozen BatchNorm, which a host may have put there: none.
        momentum = getattr(self.bn, 'momentum', 0.0)
        return 'cumulative' if momentum is None else momentum

    @momentum.setter
    def momentum(self, value: float | Tensor | str) -> None:
        if not isinstance(value, str):
            self.bn.momentum = checked_rate(value)
        elif value == 'cumulative':
            self.bn.momentum = None
        else:
            raise ValueError(
                f"momentum must be a number in [0, 1] or 'cumulative'\n  got {value!r}"
            )

    @property
    def counts(self) -> Tensor:
        """(2, C), int64: samples since the estimates were synchronised, updates left out.

        Of this process alone, and no part of the model's state: not a buffer, because what is done
        to buffers would spoil them (DistributedDataParallel sends those of the first rank to all,
        ``to_empty`` leaves what the memory held, a model made on the meta device and loaded with
        ``assign=True`` keeps them there). They follow the running statistics to their device.
        """
        return self._place()

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """The buffers ``bn.running_mean`` and ``bn.running_var``, (C,) each."""
        mean, var = self.bn.running_mean, self.bn.running_var
        assert mean is not None and var is not None
        return mean, var

    def _place(self) -> Tensor:
        """Makes or moves what goes with the running statistics without being a buffer."""
        statistics, counts = self.bn.running_mean, self._counts
        assert statistics is not None
        if (
            counts is None
            or counts.is_meta
            or counts.size(1) != statistics.numel()  # channels were pruned
            or compat.is_fake(counts) != compat.is_fake(statistics)
        ):
            size = 2, statistics.numel()
            counts = torch.zeros(size, dtype=torch.int64, device=statistics.device)
            steps = counts.new_zeros(3, statistics.numel())
        elif counts.device != statistics.device:
            counts, steps = counts.to(statistics.device), self._steps.to(statistics.device)
        else:
            return counts
        self._counts, self._steps = counts, steps
        # By which this layer is known to those who remember its runs; see `recomputation`. One that
        # torch.export made would be another one in each run of its program; of those without a
        # value, torch.export.save makes one.
        if not (compat.is_exporting() and hasattr(self, '_identity')):
            self._identity = torch.empty(1, device=counts.device)
        compat.keep_address(self._counts, self._steps, self._identity)
        return counts

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: bool, **kwargs: bool) -> nn.Module:
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if getattr(self.bn, 'running_mean', None) is not None:
            self._place()  # now, not within somebody's CUDA graph
        return self

    def apply(self: Layer, fn: Callable[[nn.Module], None]) -> Layer:
        """Calls ``fn`` with the child and the layer, as any module does.

        A host that zeroes every ``weight`` below a normalisation, for residual branches that start
        as nothing, means one scale. With both at 0 the branch would never learn: the one of the
        channel stage then stays.
        """
        before = self.batch_weight.detach().clone()
        super().apply(fn)
        outer = self.weight
        if before.is_meta or compat.is_fake(before) or outer is None or not before.any():
            return self
        if not outer.any() and not self.batch_weight.any():
            with torch.no_grad():
                self.batch_weight.copy_(before)
        return self

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in torch; not for to_mkldnn, which would take the child for a BatchNorm alone."""
        if compat.is_of(sys._getframe(1), 'torch.utils.mkldnn'):
            raise RuntimeError(
                f'to_mkldnn cannot take a {type(self).__name__}: torch has no GroupNorm of mkldnn '
                'tensors\n  use torch.compile, or the CPU kernels as they are'
            )
        return super().named_children()

    def reset_parameters(self) -> None:
        """Scales to 1, shifts to 0, running statistics to mean 0 and variance 1."""
        super().reset_parameters()
        # nn.GroupNorm's constructor calls this before the rest exists.
        if hasattr(self, 'bn'):
            nn.init.ones_(self.batch_weight)
            nn.init.zeros_(self.batch_bias)
            self.bn.reset_running_stats()
            if self._counts is not None:
                self._counts.zero_()

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first."""
        raise RuntimeError(
            f'torch.jit.script cannot take a {type(self).__name__}\n'
            '  use torch.jit.trace or torch.export'
        )

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f'{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, '
            f'momentum={self.momentum!r}, affine={self.affine!r}, mode={self.mode!r}, '
            f'sync={self.sync!r}'
        )


_NORM_DOC = """Batch-Channel Normalization over {shape} inputs (arXiv 1911.09738, equations 13-15).

    Stage 1, per channel: ``x1 = batch_weight (x - mu) / sqrt(var + eps) + batch_bias``; stage 2,
    per sample and group of channels: ``y = weight (x1 - m) / sqrt(v + eps) + bias``, m and v always
    from the sample itself (a GroupNorm). mu and var:

    - training, ``mode='estimate'`` (1-2 images per GPU): running estimates, updated with this input
      **before** they are used (second moment around the old mean); constants for the gradient.
    - training, ``mode='batch'`` (large batches): this batch's statistics, with gradient, as in
      BatchNorm. With a single value per channel the running statistics are used and not updated.
    - ``eval()``, of the layer or of its child ``bn`` alone (OpenMMLab's ``norm_eval``): the running
      statistics, frozen. It is the child's ``training`` that counts: ``bn.train()`` within a model
      that evaluates adapts its statistics. With ``bn.track_running_stats = False`` a layer trains
      as in its mode, and updates nothing.

    Args:
        num_channels: C.
        num_groups: G, a divisor of C. ``'auto'``: 32, or the largest divisor below it that leaves
            two channels per group (`wsbcn_mm.checks.auto_groups`), for networks of odd widths.
        eps: Added to both variances, >= 0.
        momentum: Rate r of the running statistics in [0, 1] (the weight of the new observation);
            None: 0.01 in estimate mode, 0.1 in batch mode; ``'cumulative'``: 1/t at step t, the
            average over all steps. Any real number, or a 0-d tensor. Where estimates are averages
            (``'cumulative'``, and 1, which hosts set to average by themselves) the second moment
            is taken around the true mean: in estimate mode ``bn.running_var`` is the variance of
            all inputs together; see `wsbcn_mm.reference.update_estimates`, `averages`.
        affine: Shape of the outer scale and shift ``weight``, ``bias``: ``'group'`` (G,) as in the
            paper, ``'channel'`` (C,) as in GroupNorm, None without. ``batch_weight`` and
            ``batch_bias`` (C,) are always there.
        mode: ``'estimate'`` or ``'batch'``.
        sync: What the processes of a distributed training share; nothing where there is one.
            ``'step'``: nothing here, but `wsbcn_mm.estimates.synchronize_estimates`, called after
            every step (by `EstimatesHook` under OpenMMLab), makes the running statistics of all
            ranks the same. ``'forward'``: the statistics of all ranks' samples are used, as in one
            process with the whole batch; a collective per layer and step (batch mode: two, as in
            SyncBN), which every rank must reach as often. None: each rank keeps its own. Batch mode
            also works as with ``'forward'`` once ``bn`` was converted to SyncBatchNorm.
        device, dtype: As in torch.

    Shape: {shape}, N >= 0; the output has shape, dtype and memory format of the input. float16 and
    bfloat16 are computed in float32. N = 0 gives an empty result and touches nothing. Where a
    network puts the frames of a clip to the batch (2d networks for video), each frame is a sample
    of stage 2; in 3d networks a sample is a clip, and its statistics are over time as well.

    A value that is not finite never enters the running statistics: that channel leaves the update
    out, and `wsbcn_mm.estimates.skipped_updates` counts it.

    State dict: ``weight, bias, batch_weight, batch_bias, bn.running_mean, bn.running_var,
    bn.num_batches_tracked``.

    Raises:
        TypeError, ValueError: an argument or an input that does not fit.
    """


class BatchChannelNorm1d(BatchChannelNorm, nn.GroupNorm):
    __doc__ = _NORM_DOC.format(shape='(N, C) or (N, C, L)')
    _bn_class = nn.BatchNorm1d
    _stage_class = channel_stage.ChannelStageBatchNorm1d
    _dims = (2, 3)


class BatchChannelNorm2d(BatchChannelNorm, nn.GroupNorm):
    __doc__ = _NORM_DOC.format(shape='(N, C, H, W)')
    _bn_class = nn.BatchNorm2d
    _stage_class = channel_stage.ChannelStageBatchNorm2d
    _dims = (4,)


class BatchChannelNorm3d(BatchChannelNorm, nn.GroupNorm):
    __doc__ = _NORM_DOC.format(shape='(N, C, D, H, W)')
    _bn_class = nn.BatchNorm3d
    _stage_class = channel_stage.ChannelStageBatchNorm3d
    _dims = (5,)
