"""The running statistics of a whole model: the same on every rank, and never poisoned.

`synchronize_estimates` is what training with several processes needs after every step. A hook calls
it under OpenMMLab (`EstimatesHook`); a training loop of one's own calls it itself.
"""

import functools

import torch
from torch import distributed as dist
from torch import nn

from wsbcn_mm import distributed
from wsbcn_mm.layers import BatchChannelNorm


@torch.no_grad()
def synchronize_estimates(model: nn.Module, group: dist.ProcessGroup | None = None) -> int:
    """Makes the running statistics of layers with ``sync='step'`` the same on all ranks.

    To be called by every rank after every training step (with gradient accumulation: after every
    forward pass). They become the mean over the ranks, each weighted with the number of samples
    that it took in since the last call: all ranks start from the same estimates, and the second
    moment is taken around that common mean, so the mean of the ranks' updates **is** the update
    with one batch of all their samples. A rank without images, or with values that are not finite
    in some channel, has weight 0 there. Layers that are frozen or took nothing in stay as they are.
    Where layers average (`BatchChannelNorm.averages`) each rank's variance is around its own mean,
    and how far the ranks' means lie apart is added.

    One all-reduce of 12 bytes per channel (fp32) for the whole model, a second one of 4 for the
    layers that average; nothing waits for the device.

    Args:
        model: The same on every rank.
        group: The ranks; None: all.

    Returns:
        Bytes of the all-reduces; 0 where there is nothing to do, such as with one rank.
    """
    layers = [
        layer
        for layer in layers_of(model).values()
        # What a host froze a BatchNorm by may train, and has no rate.
        if layer.sync == 'step' and (bn := layer.bn).training and hasattr(bn, 'momentum')
    ]
    if not layers:
        return 0
    taken_in = [layer.counts.select(0, 0) for layer in layers]
    if distributed.world_size(group) == 1:
        torch._foreach_zero_(taken_in)
        return 0
    means, variances = zip(*(layer.running_statistics() for layer in layers))
    buffers = [*means, *variances]
    # Sums of half-precision buffers would lose digits.
    dtype = functools.reduce(torch.promote_types, {b.dtype for b in buffers}, torch.float32)
    old = torch.cat(distributed.on_one_device(buffers)).to(dtype)
    weights = torch.cat(distributed.on_one_device(taken_in)).to(dtype)
    sums, totals = distributed.sum_over_ranks([old * weights.repeat(2), weights], group)
    size = sums.numel() + totals.numel()
    # A sum may overflow where no summand has: as an update that is not finite, it is left out.
    mean_over_ranks = sums / totals.repeat(2)
    new = torch.where(mean_over_ranks.isfinite(), mean_over_ranks, old)
    channels = [len(samples) for samples in taken_in]
    by_layer = [
        values.split(channels) for values in (*old.chunk(2)[:1], *new.chunk(2), weights, totals)
    ]
    apart, added_to = [], []
    for layer, own, mean, var, samples, total in zip(layers, *by_layer):
        if layer.averages:
            apart.append(samples * (own - mean).square())
            added_to.append((var, total))
        if layer.bn.momentum is None:  # cumulative
            of_others = (total > 0) & (samples == 0)
            layer.note_inputs_of_others(of_others.to(layer.counts.device))
    for (var, total), square in zip(added_to, distributed.sum_over_ranks(apart, group)):
        var += square / total.clamp_min(1)
        size += square.numel()
    torch._foreach_copy_(buffers, list(new.split(channels * 2)))
    torch._foreach_zero_(taken_in)
    return size * sums.element_size()


def layers_of(model: nn.Module) -> dict[str, BatchChannelNorm]:
    """The BatchChannelNorm layers of a model by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BatchChannelNorm)}


def skipped_updates(model: nn.Module) -> dict[str, int]:
    """By layer name: how many updates were left out, in the channel that left out most.

    An update is left out where it is not finite: after an overflow in an activation, as in steps
    that loss scaling repeats. Counted since the model was made. Waits for the device, once.

    Args:
        model: Any.

    Returns:
        The layers that left out some.
    """
    layers = layers_of(model)
    if not layers:
        return {}
    counts = [layer.counts for layer in layers.values()]
    left_out = torch.cat(distributed.on_one_device(counts), 1).select(0, 1).cpu()
    if not left_out.any():
        return {}
    by_layer = left_out.split([values.size(1) for values in counts])
    most = [int(values.max()) for values in by_layer]
    return {name: count for name, count in zip(layers, most) if count}


def rate_of_step(
    rate: float, images: float = 1, seen: int | None = None, lr_ratio: float = 1.0
) -> float:
    """The rate of one step: a memory measured in images, whatever the number of images per step.

    ``r = 1 - (1 - rate lr_ratio)^images``: an average with rate r forgets as much in one step of
    ``images`` images as one with ``rate`` in that many steps of one image; about 1 / ``rate``
    images are remembered. Ours: the papers do not say how the rate was set.

    Args:
        rate: The weight of a single image, in [0, 1].
        images: Images per step, over all ranks that share their estimates.
        seen: Steps that the estimates have seen; with it the rate is at least 1 / (seen + 1), the
            average over all steps so far, so that the initial values (mean 0, variance 1) count for
            nothing. None: without.
        lr_ratio: Learning rate over its initial value, to which the rate is tied: as the weights
            move more slowly, more images are remembered.

    Returns:
        The rate, in [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f'rate must lie in [0, 1]\n  got {rate!r}')
    if images < 1:
        raise ValueError(f'images must be at least 1\n  got {images!r}')
    scaled = 1 - (1 - min(1.0, rate * lr_ratio)) ** images
    return scaled if seen is None else max(scaled, 1 / (seen + 1))
