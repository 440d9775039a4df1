"""The BCN layers: parameters, buffers, state dict, training and evaluation. The math is elsewhere.

Why the classes are built as they are (each point is a test in tests/openmmlab):

- They derive **directly** from nn.GroupNorm (a mixin supplies the rest), because OpenMMLab's
  initialisation and weight-decay rules look at direct base classes.
- `BatchChannelNorm2d` is an `nn.GroupNorm` holding its channel stage as child ``bn``, a BatchNorm
  (`wsbcn_mm.layers.channel_stage`), so that ``norm_eval``, SyncBN conversion, weight-decay rules
  and all that is done to the BatchNorms of a model reach the right part, and nothing takes the
  layer for a BatchNorm that it could fuse away.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from wsbcn_mm import distributed
from wsbcn_mm.backends import autograd, synchronised
from wsbcn_mm.backends.carriers import Affine, Rate, Running
from wsbcn_mm.checks import (
    MODES,
    auto_groups,
    check_choice,
    check_eps,
    check_floating,
    check_groups,
    checked_rate,
)
from wsbcn_mm.layers import channel_stage, recomputation

AFFINES = ('group', 'channel', None)
SYNCS = (None, 'step', 'forward')
DEFAULT_MOMENTUM = {'estimate': 0.01, 'batch': 0.1}


Self = TypeVar('Self', bound='BatchChannelNorm')

# What the mixin stands in front of, for the type checker.
if TYPE_CHECKING:
    _Base = nn.GroupNorm
else:
    _Base = object


class BatchChannelNorm(_Base):
    """What the Batch-Channel Normalization layers share; a mixin in front of nn.GroupNorm."""

    _version = 1
    _abbr_ = 'bcn'  # attribute name in OpenMMLab's modules (`bcn1`); 'bn' would collide with BN's
    _bn_class: type[nn.modules.batchnorm._BatchNorm]
    _stage_class: type[channel_stage.ChannelStage]
    _dims: tuple[int, ...]
    affine: Any  # 'group', 'channel' or None; a bool in nn.GroupNorm
    bn: Any  # a ChannelStage, or what a host converts BatchNorms to (SyncBatchNorm)
    batch_weight: nn.Parameter
    batch_bias: nn.Parameter

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
        groups: Any = auto_groups(num_channels) if num_groups == 'auto' else num_groups
        check_groups(num_channels, groups)
        check_eps(eps)
        check_choice(affine, AFFINES, 'affine')
        check_choice(mode, MODES, 'mode')
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
        self._counts: Tensor | None = None
        self._history = recomputation.StatisticsHistory()
        self.affine = affine
        self.mode = mode
        self.sync = sync
        self.momentum = DEFAULT_MOMENTUM[mode] if momentum is None else momentum

    @property
    def momentum(self) -> float | str:
        """Rate of the running statistics: a number in [0, 1] or ``'cumulative'``; settable.

        Kept in ``bn.momentum`` (None there means cumulative, as in torch), so that whatever sets
        the momentum of every BatchNorm of a model reaches this layer too.
        """
        return 'cumulative' if self.bn.momentum is None else self.bn.momentum

    @momentum.setter
    def momentum(self, value: float | str) -> None:
        if value == 'cumulative':
            self.bn.momentum = None
        elif isinstance(value, str):
            raise ValueError(
                f"momentum must be a number in [0, 1] or 'cumulative'\n  got {value!r}"
            )
        else:
            self.bn.momentum = checked_rate(value)

    @property
    def counts(self) -> Tensor:
        """(2, C), int64: samples since the estimates were synchronised, updates left out.

        Of this process alone, and no part of the model's state: not a buffer, because what is done
        to buffers would spoil them (DistributedDataParallel sends those of the first rank to all,
        ``to_empty`` leaves what the memory held, a model made on the meta device and loaded with
        ``assign=True`` keeps them there). They follow the running statistics to their device.
        """
        statistics, counts = self.bn.running_mean, self._counts
        if counts is None or counts.is_meta or type(counts) is not type(statistics):
            counts = torch.zeros(2, self.num_channels, dtype=torch.int64, device=statistics.device)
            self._counts = counts
        elif counts.device != statistics.device:
            counts = self._counts = counts.to(statistics.device)
        return counts

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: bool, **kwargs: bool) -> nn.Module:
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.bn.running_mean is not None:
            self.counts  # noqa: B018  they move now, not within somebody's CUDA graph
        return self

    def apply(self: Self, fn: Callable[[nn.Module], None]) -> Self:
        """Calls ``fn`` with the child and the layer, as any module does.

        A host that zeroes every ``weight`` below a normalisation, for residual branches that start
        as nothing, means one scale. With both at 0 the branch would never learn: the one of the
        channel stage then stays.
        """
        before = self.batch_weight.detach().clone()
        super().apply(fn)
        outer = self.weight
        if before.is_meta or outer is None or not before.any():
            return self
        if not outer.any() and not self.batch_weight.any():
            with torch.no_grad():
                self.batch_weight.copy_(before)
        return self

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

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input``; see the class for shapes and what each mode does."""
        # Every line here is paid once per layer and step: what is looked up twice is kept.
        bn = self.bn
        if not self._fits(input, bn.running_mean):
            self._refuse(input)
        # norm_eval and frozen stages call eval() on BatchNorm instances only: the child obeys.
        training = self.training and bn.training
        if not training:
            return self._normalize(input, Running(bn.running_mean, bn.running_var), None)
        if self.sync == 'forward' or self.mode == 'batch':
            ranks = self._ranks()
            if ranks is not None:
                # Also with an empty input: the other ranks wait for this one's share.
                return self._forward_over_ranks(input, ranks)
        # What updates: batch mode does not from a single value per channel.
        updates = input.numel() // self.num_channels > (1 if self.mode == 'batch' else 0)
        if updates and recomputation.is_repeated():
            return self._forward_repeated(input)
        rate, running = self._rate(updates), Running(bn.running_mean, bn.running_var, self.counts)
        output = self._normalize(input, running, rate)
        if updates and recomputation.may_be_repeated():
            self._history.remember(input, running.mean, running.var)
        return output

    def _rate(self, updates: bool) -> float | Tensor:
        """Counts an update; the weight of its observation: what users set as momentum."""
        bn = self.bn
        momentum = bn.momentum
        # A 0-d tensor is what a schedule sets in compiled code, where every new number would be
        # compiled anew. What a child became (SyncBatchNorm) takes anything.
        if momentum is not None and not isinstance(bn, channel_stage.ChannelStage):
            momentum = checked_rate(momentum)
        if updates:
            bn.num_batches_tracked.add_(1)
            if momentum is None:
                return bn.num_batches_tracked.to(torch.float64).reciprocal()
        return 0.0 if momentum is None else momentum

    def _ranks(self) -> distributed.Ranks | None:
        """Those whose samples the statistics are of, where there are others than this one."""
        converted = self.mode == 'batch' and isinstance(self.bn, nn.SyncBatchNorm)
        if not converted and self.sync != 'forward':
            return None
        group = self.bn.process_group if converted else None
        return distributed.Ranks(group) if distributed.world_size(group) > 1 else None

    def _affine(self) -> Affine:
        return Affine(self.batch_weight, self.batch_bias, self.weight, self.bias)

    def _normalize(self, input: Tensor, running: Running, rate: Rate) -> Tensor:
        # Not through `functional`: its checks were made when the layer was, and take as long as a
        # small map.
        return autograd.batch_channel_norm(
            input, self.num_groups, running, self._affine(), rate, self.eps, self.mode
        )

    def _forward_repeated(self, input: Tensor) -> Tensor:
        """The same result as in the run that checkpointing repeats; the estimates stay."""
        used = self._history.recall(input)
        if used is None:  # a first run, inside somebody's backward pass
            used = self.bn.running_mean, self.bn.running_var
        # Batch mode: rate 0 keeps the copies, the statistics of the batch are computed again.
        running = Running(*(value.clone() for value in used))
        return self._normalize(input, running, 0.0 if self.mode == 'batch' else None)

    def _forward_over_ranks(self, input: Tensor, ranks: distributed.Ranks) -> Tensor:
        """As in one process with the samples of all ranks."""
        bn, repeated = self.bn, recomputation.is_repeated()
        running = Running(bn.running_mean, bn.running_var, self.counts)
        if self.mode == 'batch':
            rate = 0.0 if repeated else self._rate(True)
            if repeated:  # the statistics of the batch are computed again, the buffers stay
                running = Running(*(value.clone() for value in running))
            return synchronised.batch_norm_over_ranks(
                input, self.num_groups, running, self._affine(), rate, self.eps, ranks
            )
        if repeated:
            return self._forward_repeated(input)
        synchronised.update_estimates(input, running, self._rate(True), ranks)
        if input.numel() and recomputation.may_be_repeated():
            self._history.remember(input, running.mean, running.var)
        # With the new estimates as constants: what evaluation does.
        return self._normalize(input, running, None)

    def _fits(self, input: Tensor, mean: Tensor | None) -> bool:
        if not isinstance(input, Tensor) or not input.is_floating_point() or mean is None:
            return False
        shape = input.shape
        return (
            len(shape) in self._dims
            and shape[1] == self.num_channels
            and input.device == mean.device
        )

    def _refuse(self, input: Tensor) -> None:
        check_floating(input, 'input')
        name, mean = type(self).__name__, self.bn.running_mean
        if mean is None:
            raise RuntimeError(
                f'{name}: its child bn has no running statistics (track_running_stats=False)\n'
                "  they are a part of this layer; mode='batch' trains with those of the batch"
            )
        if len(input.shape) in self._dims and input.shape[1] == self.num_channels:
            raise RuntimeError(
                f'{name}: the input is on {input.device}, the running statistics on {mean.device}\n'
                '  move the layer or the input; a layer made on the meta device has no values '
                'before to_empty(), or load_state_dict(assign=True), and loading'
            )
        expected = ' or '.join(f'{d}-d' for d in self._dims)
        raise ValueError(
            f'{name} expects a {expected} input (N, {self.num_channels}, ...)\n'
            f'  got shape {tuple(input.shape)}'
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
      statistics, frozen.

    Args:
        num_channels: C.
        num_groups: G, a divisor of C. ``'auto'``: 32, or the largest divisor below it that leaves
            two channels per group (`wsbcn_mm.checks.auto_groups`), for networks of odd widths.
        eps: Added to both variances, >= 0.
        momentum: Rate r of the running statistics in [0, 1] (the weight of the new observation);
            None: 0.01 in estimate mode, 0.1 in batch mode; ``'cumulative'``: 1/t at step t, the
            average over all steps.
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
    bfloat16 are computed in float32. N = 0 gives an empty result and touches nothing.

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
    _stage_class = channel_stage.ChannelStage1d
    _dims = (2, 3)


class BatchChannelNorm2d(BatchChannelNorm, nn.GroupNorm):
    __doc__ = _NORM_DOC.format(shape='(N, C, H, W)')
    _bn_class = nn.BatchNorm2d
    _stage_class = channel_stage.ChannelStage2d
    _dims = (4,)


class BatchChannelNorm3d(BatchChannelNorm, nn.GroupNorm):
    __doc__ = _NORM_DOC.format(shape='(N, C, D, H, W)')
    _bn_class = nn.BatchNorm3d
    _stage_class = channel_stage.ChannelStage3d
    _dims = (5,)
