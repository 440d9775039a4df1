"""Maps of any size: a pass over x that reduces, the algebra, a pass that writes."""

import triton
from torch import Tensor

from wsbcn_mm.backends.carriers import Affine, AffineGradients, Statistics
from wsbcn_mm.backends.triton import cuts, device
from wsbcn_mm.backends.triton.device import bits, dense, repeat, stride
from wsbcn_mm.backends.triton.jit import backward, forward
from wsbcn_mm.backends.triton.work import Results, Stage1, written

MOST_IN_Y = 65535
"""Programs in y of a grid, which CUDA allows."""


def moments(x: Tensor, m: Tensor, q: Tensor) -> tuple[cuts.Cut, tuple[Tensor, ...] | None]:
    """The first pass: how x was cut, and the chunks that are left to be merged into m and q.

    Behind the chunks lies room for the two coefficients of each row.
    """
    cut = cuts.reducing(x)
    size = chunks_of(x, cut)
    chunks = device.scratch(x, size, size, m.numel(), m.numel()) if size else None
    device.start(
        forward.moments,
        cut.grid,
        x,
        *(chunks[:2] if chunks else (m, q)),
        x.size(1),
        cut.length,
        cut.tiles,
        **cut.layout,
    )
    return cut, chunks


def merge(chunks: tuple[Tensor, ...], m: Tensor, q: Tensor, cut: cuts.Cut) -> None:
    """The moments of the rows from those of their chunks."""
    blocks = cuts.merge_blocks(m.numel(), cut.splits)
    device.start(
        forward.merge_moments,
        (triton.cdiv(m.numel(), blocks['BLOCK_R']),),
        *chunks[:2],
        m,
        q,
        *m.shape,
        cut.length,
        cut.tiles,
        cut.splits,
        BLOCK_L=cut.layout['BLOCK_L'],
        **blocks,
        num_warps=cuts.warps(cuts.TILE),
    )


def chunks_of(x: Tensor, cut: cuts.Cut) -> int:
    """Of what a reducing pass leaves to be merged, values of each kind; 0: it writes whole rows."""
    return x.size(0) * x.size(1) * cut.splits if cut.splits > 1 else 0


def normalize(
    x: Tensor,
    results: Results,
    stage_1: Stage1,
    affine: Affine,
    eps: float,
    chunks: tuple[Tensor, ...] | None = None,
) -> None:
    """The algebra and the last pass; merges the chunks first."""
    y, m, q, mean, var, group_mean, inv_group_std = results
    assert m is not None and group_mean is not None
    (samples, channels), num_groups = m.shape, group_mean.size(1)
    running_mean, running_var, *counters = stage_1.running or (None, None, None, None)
    scale, shift = chunks[2:] if chunks else device.scratch(x, m.numel(), m.numel())
    cut = cuts.reducing(x)
    constants = cuts.algebra_constants(samples, channels // num_groups, cut.splits)
    # An update needs all samples of a group in one program; otherwise there may be many.
    shares = min(triton.cdiv(samples, constants['BLOCK_N']), MOST_IN_Y)
    if stage_1.needs_all_samples:
        shares = 1
    device.start(
        forward.forward_algebra,
        (num_groups, shares),
        *(chunks[:2] if chunks else (None, None)),
        m,
        q,
        running_mean,
        running_var,
        stage_1.rate_tensor,
        *counters,
        mean,
        var,
        *dense(*affine),
        group_mean,
        inv_group_std,
        scale,
        shift,
        samples,
        channels,
        num_groups,
        cut.length,
        cut.tiles,
        cut.splits,
        stride(running_mean),
        stride(running_var),
        bits(stage_1.rate),
        bits(eps),
        STATISTICS=stage_1.source,
        WEIGHT_REPEAT=repeat(affine.weight, channels),
        BIAS_REPEAT=repeat(affine.bias, channels),
        BLOCK_L=cut.layout['BLOCK_L'],
        **constants,
    )
    cut = cuts.applying(x)
    device.start(
        forward.forward_apply,
        cut.grid,
        x,
        y,
        m,
        scale,
        shift,
        channels,
        cut.length,
        cut.tiles,
        **cut.layout,
    )


def gradients_of(
    tensors: tuple[Tensor, Tensor, Tensor],
    statistics: Statistics,
    affine: Affine,
    gradients: AffineGradients,
    eps: float,
    through_statistics: bool,
) -> None:
    """Writes dx, the last of the tensors (grad, x, dx), and the gradients of the parameters."""
    grad, x, dx = tensors
    m = statistics.m
    (samples, channels), num_groups = m.shape, statistics.group_mean.size(1)
    rows, groups = samples * channels, samples * num_groups
    cut = cuts.reducing(x)
    size = chunks_of(x, cut)
    sum_g, sum_gx, mean_h, mean_hz, *coefficients, first, second = device.scratch(
        x, rows, rows, groups, groups, rows, rows, rows, size, size
    )
    device.start(
        backward.backward_sums,
        cut.grid,
        grad,
        x,
        m,
        *((first, second) if size else (sum_g, sum_gx)),
        channels,
        cut.length,
        cut.tiles,
        **cut.layout,
    )
    device.start(
        backward.backward_algebra,
        (num_groups,),
        *((first, second) if size else (None, None)),
        sum_g,
        sum_gx,
        *statistics,
        *dense(*affine[:3]),
        mean_h,
        mean_hz,
        *written(gradients),
        *coefficients,
        samples,
        channels,
        num_groups,
        cut.length,
        cut.splits,
        bits(eps),
        WEIGHT_REPEAT=repeat(affine.weight, channels),
        PER_CHANNEL=gradients.weight.numel() == channels,
        THROUGH_STATISTICS=through_statistics,
        **cuts.algebra_constants(samples, channels // num_groups, cut.splits),
    )
    cut = cuts.applying(x)
    device.start(
        backward.backward_apply,
        cut.grid,
        grad,
        x,
        dx,
        m,
        *coefficients,
        channels,
        cut.length,
        cut.tiles,
        **cut.layout,
    )
