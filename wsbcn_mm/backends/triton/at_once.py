"""Maps so small that a program holds a group of a sample: one launch, or few for many samples."""

from torch import Tensor

from wsbcn_mm.backends.carriers import Affine, AffineGradients, Statistics
from wsbcn_mm.backends.triton import cuts, device
from wsbcn_mm.backends.triton.device import bits, dense, repeat, stride
from wsbcn_mm.backends.triton.jit import held
from wsbcn_mm.backends.triton.jit import statistics as kernels
from wsbcn_mm.backends.triton.work import Results, Stage1, written


def update_statistics(x: Tensor, results: Results, stage_1: Stage1, cut: cuts.Held) -> None:
    """Mean and var from m and q, where there are too many samples for one program."""
    assert stage_1.running is not None
    samples, channels = x.shape[:2]
    blocks = cuts.algebra_blocks(samples, channels // cut.num_groups)
    device.start(
        kernels.update_statistics,
        (cut.num_groups,),
        results.m,
        results.q,
        *stage_1.running[:2],
        stage_1.rate_tensor,
        *stage_1.running[2:],
        results.mean,
        results.var,
        samples,
        channels,
        cut.num_groups,
        cut.length,
        stride(stage_1.running.mean),
        stride(stage_1.running.var),
        bits(stage_1.rate),
        STATISTICS=stage_1.source,
        **blocks,
        num_warps=cuts.warps(2 * blocks['BLOCK_N'] * blocks['BLOCK_C']),
    )


def normalize(
    x: Tensor, results: Results, stage_1: Stage1, cut: cuts.Held, affine: Affine, eps: float
) -> None:
    """Everything that is not given."""
    samples, channels = x.shape[:2]
    running_mean, running_var, *counters = stage_1.running or (None, None, None, None)
    device.start(
        held.forward_held,
        (cut.num_groups, 1 if stage_1.needs_all_samples else cut.shares),
        x,
        results.y,
        results.m,
        results.q,
        running_mean,
        running_var,
        stage_1.rate_tensor,
        *counters,
        results.mean,
        results.var,
        *dense(*affine),
        results.group_mean,
        results.inv_group_std,
        samples,
        channels,
        cut.num_groups,
        cut.length,
        stride(running_mean),
        stride(running_var),
        repeat(affine.weight, channels),
        repeat(affine.bias, channels),
        bits(stage_1.rate),
        bits(eps),
        STATISTICS=stage_1.source,
        BLOCK_N=cuts.block(samples, cuts.TILE // cut.layout['BLOCK_C']),
        **cut.layout,
    )


def gradients_of(
    tensors: tuple[Tensor, Tensor, Tensor],
    cut: cuts.Held,
    statistics: Statistics,
    affine: Affine,
    gradients: AffineGradients,
    eps: float,
    through_statistics: bool,
) -> None:
    """As `passes.gradients_of`."""
    x = tensors[1]
    samples, channels = x.shape[:2]
    shares = 1 if cut.at_once else cut.shares
    parts = None
    if shares > 1:
        (parts,) = device.scratch(x, 4 * shares * channels)
    mean_h = None
    if through_statistics:
        (mean_h,) = device.scratch(x, 2 * samples * cut.num_groups)
    per_channel = gradients.weight.numel() == channels
    device.start(
        held.backward_held,
        (cut.num_groups, shares),
        *tensors,
        *statistics,
        *dense(*affine[:3]),
        parts,
        mean_h,
        *written(gradients),
        samples,
        channels,
        cut.num_groups,
        cut.length,
        repeat(affine.weight, channels),
        bits(eps),
        PER_CHANNEL=per_channel,
        THROUGH_STATISTICS=through_statistics,
        **cut.layout,
    )
    if parts is not None:
        block_c = cut.layout['BLOCK_C']
        block_k = cuts.block(shares, cuts.TILE // block_c)
        device.start(
            held.merge_shares,
            (cut.num_groups,),
            parts,
            statistics.var,
            *written(gradients),
            shares,
            channels,
            cut.num_groups,
            bits(eps),
            PER_CHANNEL=per_channel,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            num_warps=cuts.warps(block_k * block_c),
        )
