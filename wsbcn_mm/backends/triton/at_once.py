"""Maps so small that a program holds a group of a sample: one launch."""

from torch import Tensor

from wsbcn_mm.backends.carriers import Affine, AffineGradients, Statistics
from wsbcn_mm.backends.triton import cuts, device
from wsbcn_mm.backends.triton.device import bits, dense, repeat, stride
from wsbcn_mm.backends.triton.jit import held
from wsbcn_mm.backends.triton.work import Results, Stage1, written


def normalize(
    x: Tensor, results: Results, stage_1: Stage1, cut: cuts.Held, affine: Affine, eps: float
) -> None:
    """Everything that is not given."""
    samples, channels = x.shape[:2]
    running_mean, running_var, *counters = stage_1.running or (None, None, None, None)
    device.start(
        held.forward_held,
        (cut.num_groups,),
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
        bits(stage_1.rate),
        bits(eps),
        STATISTICS=stage_1.source,
        WEIGHT_REPEAT=repeat(affine.weight, channels),
        BIAS_REPEAT=repeat(affine.bias, channels),
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
    mean_h = None
    if through_statistics:
        (mean_h,) = device.scratch(x, 2 * samples * cut.num_groups)
    device.start(
        held.backward_held,
        (cut.num_groups,),
        *tensors,
        *statistics,
        *dense(*affine[:3]),
        mean_h,
        *written(gradients),
        samples,
        channels,
        cut.num_groups,
        cut.length,
        bits(eps),
        WEIGHT_REPEAT=repeat(affine.weight, channels),
        PER_CHANNEL=gradients.weight.numel() == channels,
        THROUGH_STATISTICS=through_statistics,
        **cut.layout,
    )
