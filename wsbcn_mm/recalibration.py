"""Estimates the running statistics of a model again: the exact mean over given images.

The running statistics of a trained model are averages over its last steps, during which the weights
moved; those of a converted model may be unknown. Here they become what they stand for: mean and
biased variance of what each layer gets **in evaluation**, over a set of images.

What a layer gets depends on the statistics of the layers in front of it, so that they cannot all be
measured at once. Every layer therefore keeps the latest moments of every image and normalises with
their mean: in the first pass over the images with that of those so far; in every further pass each
image replaces what was measured of it before. This goes on until a pass changes nothing more: then
the statistics are those of the very inputs that they produce.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wsbcn_mm import distributed
from wsbcn_mm.backends.autograd import row_moments
from wsbcn_mm.layers import BatchChannelNorm
from wsbcn_mm.layers.standardization import weights_do_not_change
from wsbcn_mm.networks.trials import modes_kept


@dataclass
class Recalibration:
    """What `recalibrate` did.

    Attributes:
        passes: Passes over the images.
        samples: By layer name, how many samples its statistics are the mean of, over all ranks.
        drift: The largest change by the last pass, of a mean in standard deviations or of a
            variance relative to itself: how well the statistics and the inputs that they produce
            agree. None after a single pass, which has nothing to compare with.
        unreached: Names of layers that no forward call used; they keep their statistics.
    """

    passes: int
    samples: dict[str, int]
    drift: float | None
    unreached: list[str]


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], object] | None = None,
    passes: int = 4,
    tolerance: float = 0.01,
    layers: Iterable[BatchChannelNorm] | None = None,
    keep_function: bool = False,
) -> Recalibration:
    """Replaces the running statistics of BatchChannelNorm layers by those of the given batches.

    ``running_mean`` and ``running_var`` become mean and biased variance over all samples, each
    sample with the same weight whatever its size (a sample is an image, or a RoI), as measured in
    evaluation with the very statistics that come out; see the module. Sums are centred and in
    float64. The model runs in evaluation mode and without gradients, and has its own mode again
    afterwards; nothing else of it changes, ``num_batches_tracked`` included.

    With a process group every rank must call this, each with its share of the images (shares may
    differ, or be empty); all ranks end with the same statistics.

    Needs 16 bytes per channel and forward call: 0.4 MB per image for a ResNet-50.

    Args:
        model: Any model with BatchChannelNorm layers. With DistributedDataParallel: its module.
        batches: Something to iterate over several times: a DataLoader, a list. All are used; it
            converges fastest where they come in the same order each time.
        forward: Called with each batch; None: ``model``.
        passes: The most passes over the batches, at least 1.
        tolerance: Stops when a pass changes no statistic by more than this; see
            `Recalibration.drift`.
        layers: Those to treat; None: all of the model, in either mode, frozen ones too.
        keep_function: Change ``batch_weight`` and ``batch_bias`` with the statistics, so that every
            layer computes in evaluation what it did before, see `set_statistics`: for a model whose
            function is right and whose statistics are not, such as one converted from GN + WS.
            ``num_batches_tracked`` becomes the number of samples, where it was smaller: a warm-up
            of the rate then goes on from these statistics instead of forgetting them.

    Returns:
        What was done. A drift above the tolerance says that the passes ran out.

    Raises:
        TypeError: ``batches`` is an iterator, which gives its batches only once.
        ValueError: no layer, no batch on any rank, a bad ``passes`` or ``tolerance``, or a layer
            that gets values that are not finite, or has statistics that its buffers cannot hold,
            by name; with ``keep_function`` a layer whose scale is computed (pruned, parametrized)
            or another layer's as well. The statistics are then as before.
    """
    _check(batches, passes, tolerance)
    chosen = None if layers is None else {id(layer) for layer in layers}
    accounts = {
        name: _Moments(module, keep_function)
        for name, module in model.named_modules()
        if isinstance(module, BatchChannelNorm) and (chosen is None or id(module) in chosen)
    }
    if not accounts:
        raise ValueError('recalibrate: the model has no BatchChannelNorm layer')
    if keep_function:
        _check_scales(accounts)
    before = [(account.layer, _stage_1(account.layer)) for account in accounts.values()]
    drift, done = None, 0
    try:
        with modes_kept(model):
            model.eval()
            # Code that was compiled before knows nothing of the hooks.
            with weights_do_not_change(model), torch.compiler.set_stance('force_eager'):
                while done < passes and (drift is None or drift > tolerance):
                    old = [_statistics(account.layer) for account in accounts.values()]
                    _run(accounts.values(), batches, model if forward is None else forward)
                    _combine(accounts)
                    drift = _drift(accounts.values(), old) if done else None
                    done += 1
        if keep_function:
            for account in accounts.values():
                tracked = getattr(account.layer.bn, 'num_batches_tracked', None)
                if tracked is not None:  # a frozen BatchNorm that a host put there counts nothing
                    tracked.clamp_(min=account.total)
    except BaseException:
        for layer, values in before:
            for tensor, value in zip(_tensors(layer), values):
                tensor.copy_(value)
        raise
    return Recalibration(
        passes=done,
        samples={name: account.total for name, account in accounts.items() if account.total},
        drift=drift,
        unreached=[name for name, account in accounts.items() if not account.total],
    )


@torch.no_grad()
def set_statistics(
    layer: BatchChannelNorm, mean: Tensor, var: Tensor, keep_function: bool = False
) -> None:
    """Writes the running statistics of a layer.

    With ``keep_function``, ``batch_weight`` and ``batch_bias`` follow, so that stage 1 stays the
    affine map that it is in evaluation (ours)::

        batch_bias   <- batch_bias + batch_weight (mean - running_mean) / sqrt(running_var + eps)
        batch_weight <- batch_weight sqrt(var + eps) / sqrt(running_var + eps)

    Args:
        layer: Changed in place.
        mean: (C,).
        var: (C,), biased, >= 0.
        keep_function: See above.
    """
    bn = layer.bn
    layer.forget_average()  # of a host, of the statistics that were
    if keep_function:
        wide = torch.promote_types(mean.dtype, torch.float32)
        old_mean, old_var, weight, bias = (
            t.to(wide) for t in (bn.running_mean, bn.running_var, *_tensors(layer)[2:])
        )
        slope = weight / (old_var + layer.eps).sqrt()
        layer.batch_bias.copy_(bias + slope * (mean - old_mean))
        layer.batch_weight.copy_(slope * (var + layer.eps).sqrt())
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(var)


def _tensors(layer: BatchChannelNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return layer.bn.running_mean, layer.bn.running_var, layer.batch_weight, layer.batch_bias


def _stage_1(layer: BatchChannelNorm) -> list[Tensor]:
    return [tensor.clone() for tensor in _tensors(layer)]


def _check(batches: Iterable[Any], passes: int, tolerance: float) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(
            'batches must be something to iterate over several times (a DataLoader, a list)\n'
            f'  got the iterator {type(batches).__name__}'
        )
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f'passes must be an int >= 1\n  got {passes!r}')
    if not tolerance >= 0:
        raise ValueError(f'tolerance must be a number >= 0\n  got {tolerance!r}')


def _check_scales(accounts: dict[str, '_Moments']) -> None:
    """Those that `set_statistics` is to change with the statistics must be the layer's own."""
    owners: dict[Tensor, str] = {}
    for name, account in accounts.items():
        for parameter in ('batch_weight', 'batch_bias'):
            tensor = account.layer._parameters.get(parameter)
            if tensor is None:
                raise ValueError(
                    f'recalibrate: {name}.{parameter} is pruned or parametrized, and cannot be '
                    'changed with the statistics\n  make it a plain parameter first, or leave '
                    'keep_function out'
                )
            if owners.setdefault(tensor, name) != name:
                raise ValueError(
                    f'recalibrate: {name} and {owners[tensor]} share their {parameter}, which '
                    'cannot keep what both compute\n  give each its own, or leave keep_function out'
                )


def _statistics(layer: BatchChannelNorm) -> tuple[Tensor, Tensor]:
    return layer.bn.running_mean.clone(), layer.bn.running_var.clone()


def _run(
    accounts: Iterable['_Moments'], batches: Iterable[Any], forward: Callable[[Any], object]
) -> None:
    """One pass: every layer measures what it gets, and uses it at once."""
    handles = []
    try:
        for account in accounts:
            account.calls = 0
            # Of the child, behind others: what the channel stage gets.
            handles.append(account.layer.bn.register_forward_pre_hook(account.add))
        for batch in batches:
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()


def _combine(accounts: dict[str, '_Moments']) -> None:
    """Joins what all ranks measured in a pass, and writes it; two collectives for all layers."""
    measured = [account.measured() for account in accounts.values()]
    sums = distributed.sum_over_ranks(
        [torch.cat([count * mean, mean.new_tensor([count])]) for count, mean, _ in measured]
    )
    counted = distributed.on_one_device([row[-1] for row in sums])
    totals = [int(total) for total in torch.stack(counted).tolist()]
    if not any(totals):
        raise ValueError('recalibrate: no call reached a BatchChannelNorm layer (no images?)')
    means = [row[:-1] / max(total, 1) for row, total in zip(sums, totals)]
    squares = distributed.sum_over_ranks(
        [square + n * (own - mean).square() for (n, own, square), mean in zip(measured, means)]
    )
    for (name, account), total, mean, square in zip(accounts.items(), totals, means, squares):
        dtype = account.layer.bn.running_var.dtype
        if not torch.isfinite(torch.stack([mean, square / max(total, 1)]).to(dtype)).all():
            raise ValueError(
                f'recalibrate: {name} got values that are not finite, or whose statistics a buffer '
                f'of {dtype} cannot hold\n  the weights or the images are damaged, or the buffers '
                'have to be float32; the statistics were left as they were'
            )
    for account, total, mean, square in zip(accounts.values(), totals, means, squares):
        account.total = total
        if total:
            account.rebase(mean, square)
            account.write(mean, square / total)


def _drift(accounts: Iterable['_Moments'], old: list[tuple[Tensor, Tensor]]) -> float:
    """The largest change of a mean in standard deviations, or of a variance by itself."""
    changes = []
    for account, (mean, var) in zip(accounts, old):
        bn, scale = account.layer.bn, var + account.layer.eps
        changes.append(((bn.running_mean - mean).abs() / scale.sqrt()).max())
        changes.append(((bn.running_var - var).abs() / scale).max())
    return torch.stack(distributed.on_one_device(changes)).max().item()


class _Moments:
    """What a layer got: an entry per call of a pass, which the same call of the next one replaces.

    An entry holds the number of samples of a call and the sums of their values and of their squares
    around ``centre``. That is near the mean, so that nothing is lost in differences of sums.
    """

    def __init__(self, layer: BatchChannelNorm, keep_function: bool) -> None:
        self.layer, self.keep_function = layer, keep_function
        self.total = 0  # samples on all ranks in the last pass
        self.calls = 0  # in this pass
        buffer = layer.bn.running_mean
        dtype = torch.float32 if buffer.device.type == 'mps' else torch.float64
        self.centre = torch.zeros_like(buffer, dtype=dtype)
        self.entries: list[tuple[int, Tensor, Tensor]] = []
        # Over the entries, and those that other ranks had at the end of the last pass.
        self.sums = 0, torch.zeros_like(self.centre), torch.zeros_like(self.centre)

    def add(self, module: nn.Module, args: tuple[Tensor]) -> None:
        """A forward pre-hook: takes the input in and sets the statistics that the layer uses."""
        (input,) = args
        if not input.numel():
            return
        m, q = (value.to(self.centre.dtype) for value in row_moments(input))
        if not self.sums[0]:
            self.centre = m.mean(0)
        m = m - self.centre
        entry = len(m), m.sum(0), (q + m.square()).sum(0)
        if self.calls < len(self.entries):
            old = self.entries[self.calls]
            self.sums = (self.sums[0] - old[0], self.sums[1] - old[1], self.sums[2] - old[2])
            self.entries[self.calls] = entry
        else:
            self.entries.append(entry)
        self.calls += 1
        self.sums = (self.sums[0] + entry[0], self.sums[1] + entry[1], self.sums[2] + entry[2])
        count, first, second = self.sums
        offset = first / count
        self.write(self.centre + offset, (second / count - offset.square()).clamp_min_(0))

    def measured(self) -> tuple[int, Tensor, Tensor]:
        """Samples, mean and sum of squares around the mean, of this rank in this pass."""
        del self.entries[self.calls :]  # left from a longer pass
        if not self.entries:
            return 0, torch.zeros_like(self.centre), torch.zeros_like(self.centre)
        counts, firsts, seconds = zip(*self.entries)
        count, first, second = sum(counts), torch.stack(firsts).sum(0), torch.stack(seconds).sum(0)
        return count, self.centre + first / count, second - first.square() / count

    def rebase(self, mean: Tensor, squares: Tensor) -> None:
        """Makes the mean over all ranks the centre, and theirs the sums to go on from."""
        shift = self.centre - mean
        self.entries = [
            (n, first + n * shift, second + 2 * shift * first + n * shift.square())
            for n, first, second in self.entries
        ]
        self.centre, self.sums = mean, (self.total, torch.zeros_like(mean), squares)

    def write(self, mean: Tensor, var: Tensor) -> None:
        """Sets the layer's running statistics."""
        set_statistics(self.layer, mean, var, self.keep_function)
