"""One function per operator of `wsbcn_mm.backends.ops`: allocates the results, launches `_kernels`.

No function waits for the device, reads a value from it or tunes by measuring, so that all of them
can be captured in a CUDA graph. How a tensor is cut into programs depends on its shape alone.
"""

import functools
import math
import struct
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from wsbcn_mm.backends.carriers import (
    Affine,
    AffineGradients,
    Rate,
    Running,
    Statistics,
    outer_size,
)
from wsbcn_mm.backends.ops import accumulation_dtype
from wsbcn_mm.backends.running import update_from_batch
from wsbcn_mm.backends.triton import _kernels as kernels

TILE = 2048
"""Values that a program treats at a time: 16 per thread of four warps."""

REDUCING = 1024
"""Programs that keep a large GPU busy in a pass that reduces: several per multiprocessor (an H100
has 132). Not many more, for every further chunk of a row is one more partial result to merge."""

APPLYING = 16384
"""The same for a pass that writes: shorter programs, so that none is left over at the end."""


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`."""
    cut, chunks, m, q = _moments(x)
    if cut.splits > 1:
        blocks = _merge_blocks(m.numel(), cut)
        kernels.merge_moments[(triton.cdiv(m.numel(), blocks['BLOCK_R']),)](
            *chunks,
            m,
            q,
            *m.shape,
            cut.length,
            cut.tiles,
            cut.splits,
            BLOCK_L=cut.layout['BLOCK_L'],
            **blocks,
            num_warps=_warps(TILE),
        )
    return m, q


def normalize_with_estimates(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    """See `wsbcn_mm.backends.ops`."""
    if isinstance(rate, Tensor) and rate.device != x.device:
        rate = float(rate.item())  # on the host, where reading it waits for nothing
    cut, chunks, m, q = _moments(x)
    mean, var = _empty(x, m.shape[1:]), _empty(x, m.shape[1:])
    y, *group = _normalize(
        x, num_groups, (cut, chunks), (m, q, mean, var), running, affine, rate, eps
    )
    return y, Statistics(m, q, mean, var, *group)


def normalize_with_batch(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    """See `wsbcn_mm.backends.ops`."""
    m, q = row_moments(x)
    mean, var = update_from_batch(m, q, x.numel() // x.size(1), running, rate)
    y, *group = normalize(x, num_groups, m, q, mean, var, affine, eps)
    return y, Statistics(m, q, mean, var, *group)


def evaluate(x: Tensor, num_groups: int, running: Running, affine: Affine, eps: float) -> Tensor:
    """See `wsbcn_mm.backends.ops`."""
    return normalize_with_estimates(x, num_groups, running, affine, None, eps)[0]


def normalize(
    x: Tensor,
    num_groups: int,
    m: Tensor,
    q: Tensor,
    mean: Tensor,
    var: Tensor,
    affine: Affine,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`."""
    statistics = _dense(m, q, mean, var)
    work = _cut(x, REDUCING), (None, None)
    return _normalize(x, num_groups, work, statistics, None, affine, None, eps)


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    through_statistics: bool,
) -> tuple[Tensor, AffineGradients]:
    """See `wsbcn_mm.backends.ops`."""
    grad = grad.contiguous(memory_format=_format(x))
    m, q, *of_channels_and_groups = _dense(*statistics)
    batch_weight, batch_bias, weight, _ = affine
    samples, channels = m.shape

    cut = _cut(x, REDUCING)
    sums = _empty(x, m.shape), _empty(x, m.shape)
    found, chunks = _chunks(x, sums, cut)
    kernels.backward_sums[cut.grid](
        grad, x, m, *found, channels, cut.length, cut.tiles, **cut.layout
    )

    inner = _empty(x, (channels,)), _empty(x, (channels,))
    size = outer_size(affine)
    outer = _empty(x, (size,)), _empty(x, (size,))
    group_means = _empty(x, (samples, num_groups)), _empty(x, (samples, num_groups))
    coefficients = _empty(x, m.shape), _empty(x, m.shape), _empty(x, m.shape)
    kernels.backward_algebra[(num_groups,)](
        *chunks,
        *sums,
        m,
        q,
        *of_channels_and_groups,
        *_dense(batch_weight, batch_bias, weight),
        *group_means,
        *inner,
        *(outer if size else (None, None)),
        *coefficients,
        samples,
        channels,
        num_groups,
        cut.length,
        cut.splits,
        _repeat(weight, channels),
        _bits(eps),
        PER_CHANNEL=size == channels,
        THROUGH_STATISTICS=through_statistics,
        **_algebra_blocks(samples, channels // num_groups, cut),
    )

    dx = torch.empty_like(x)
    cut = _cut(x, APPLYING)
    kernels.backward_apply[cut.grid](
        grad, x, dx, m, *coefficients, channels, cut.length, cut.tiles, **cut.layout
    )
    return dx, AffineGradients(*inner, *outer)


def standardize(
    weight: Tensor, eps: float, formula: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`."""
    rows, length, blocks = _one_program_per_row(weight)
    w_hat = torch.empty_like(weight, dtype=dtype)
    mean, sigma = _empty(weight, (rows,)), _empty(weight, (rows,))
    kernels.standardize[(rows,)](
        weight, w_hat, mean, sigma, length, _bits(eps), FORMULA=formula, **blocks
    )
    return w_hat, mean, sigma


def standardize_backward(
    grad: Tensor, weight: Tensor, mean: Tensor, sigma: Tensor, eps: float, formula: str
) -> Tensor:
    """See `wsbcn_mm.backends.ops`."""
    grad = grad.contiguous(memory_format=_format(weight))
    rows, length, blocks = _one_program_per_row(weight)
    dw = torch.empty_like(weight)
    kernels.standardize_backward[(rows,)](
        grad, weight, dw, *_dense(mean, sigma), length, _bits(eps), FORMULA=formula, **blocks
    )
    return dw


def standardize_all(
    weights: list[Tensor],
    eps: float,
    formula: str,
    out: list[Tensor],
    mean: Tensor,
    sigma: Tensor,
) -> None:
    """See `wsbcn_mm.backends.ops`."""
    first = 0
    for weight, result in zip(weights, out):
        rows = slice(first, first := first + len(weight))
        w_hat, mean[rows], sigma[rows] = standardize(weight, eps, formula, result.dtype)
        result.copy_(w_hat)


def standardize_all_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    offsets: list[int],
    mean: Tensor,
    sigma: Tensor,
    eps: float,
    formula: str,
    out: list[Tensor],
) -> None:
    """See `wsbcn_mm.backends.ops`."""
    for grad, weight, first, result in zip(grads, weights, offsets, out):
        rows = slice(first, first + len(weight))
        result.copy_(standardize_backward(grad, weight, mean[rows], sigma[rows], eps, formula))


def _moments(x: Tensor) -> tuple['_Cut', tuple, Tensor, Tensor]:
    """Launches the first pass: how x was cut, what is left to be merged, and m and q."""
    m, q = _empty(x, x.shape[:2]), _empty(x, x.shape[:2])
    cut = _cut(x, REDUCING)
    found, chunks = _chunks(x, (m, q), cut)
    kernels.moments[cut.grid](x, *found, x.size(1), cut.length, cut.tiles, **cut.layout)
    return cut, chunks, m, q


def _normalize(
    x: Tensor,
    num_groups: int,
    work: tuple['_Cut', tuple],
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
    running: Running | None,
    affine: Affine,
    rate: Rate,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The algebra and the last pass.

    ``work``: how x was cut, and the chunks that are merged into m and q; (None, None): those are
    given. ``statistics``: m, q, mean, var; the last two are written, unless running is None.
    """
    (cut, chunks), (m, q, mean, var) = work, statistics
    running_mean, running_var, counts = (None, None, None) if running is None else running
    momentum, rate_tensor = (0.0, rate) if isinstance(rate, Tensor) else (rate or 0.0, None)
    samples, channels = m.shape
    group_mean = _empty(x, (samples, num_groups))
    inv_group_std = _empty(x, (samples, num_groups))
    scale, shift = _empty(x, m.shape), _empty(x, m.shape)
    blocks = _algebra_blocks(samples, channels // num_groups, cut)
    # An update needs all samples of a group in one program; otherwise there may be many.
    shares = 1 if rate is not None else triton.cdiv(samples, blocks['BLOCK_N'])
    kernels.forward_algebra[(num_groups, shares)](
        *chunks,
        m,
        q,
        running_mean,
        running_var,
        rate_tensor,
        counts,
        mean,
        var,
        *_dense(*affine),
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
        _stride(running_mean),
        _stride(running_var),
        _repeat(affine.weight, channels),
        _repeat(affine.bias, channels),
        _bits(momentum),
        _bits(eps),
        UPDATE=rate is not None,
        BLOCK_L=cut.layout['BLOCK_L'],
        **blocks,
    )

    y = torch.empty_like(x)
    cut = _cut(x, APPLYING)
    kernels.forward_apply[cut.grid](
        x, y, m, scale, shift, channels, cut.length, cut.tiles, **cut.layout
    )
    return y, group_mean, inv_group_std


# ----------------------------------------------------------------------------------------------
# Memory and arguments


def _empty(x: Tensor, shape: tuple) -> Tensor:
    return torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)


def _chunks(x: Tensor, rows: tuple, cut: '_Cut') -> tuple[tuple, tuple]:
    """Where a reducing pass writes, and what is then left to be merged: no chunks of whole rows."""
    if cut.splits == 1:
        return rows, (None,) * len(rows)
    chunks = tuple(_empty(x, (*row.shape, cut.splits)) for row in rows)
    return chunks, chunks


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _format(x: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for layout in (torch.contiguous_format, formats.get(x.dim(), torch.contiguous_format)):
        if x.is_contiguous(memory_format=layout):
            return layout
    raise ValueError(
        'expected a contiguous or channels_last tensor\n'
        f'  got shape {tuple(x.shape)} with strides {x.stride()}'
    )


def _stride(buffer: Tensor | None) -> int:
    return 0 if buffer is None else buffer.stride(0)


def _repeat(affine: Tensor | None, channels: int) -> int:
    """Channels per value of a (C,) or (G,) tensor."""
    return 1 if affine is None else channels // affine.numel()


def _bits(value: float) -> int:
    """A float as `_kernels._number` reads it."""
    return struct.unpack('<q', struct.pack('<d', value))[0]


# ----------------------------------------------------------------------------------------------
# How work is cut into programs


class _Cut(NamedTuple):
    """How a pass cuts x: ``tiles`` tiles make a chunk, ``splits`` chunks a row."""

    grid: tuple[int, int]
    length: int
    tiles: int
    splits: int
    layout: dict  # the kernels' arguments for a tile


def _cut(x: Tensor, programs: int) -> _Cut:
    """Cuts x for a pass that should have at least so many programs where x is large enough."""
    contiguous = _format(x) == torch.contiguous_format
    return _cut_shape(x.shape, contiguous, x.element_size(), programs, TILE)


@functools.lru_cache(maxsize=4096)
def _cut_shape(shape: tuple, contiguous: bool, itemsize: int, programs: int, tile: int) -> _Cut:
    samples, channels, *positions = shape
    length = math.prod(positions)
    channels_last = not contiguous or length == 1
    if channels_last:
        # At least 128 channels wide, if there are as many: segments that memory delivers whole.
        block_c = _block(channels, max(min(128, tile), tile // triton.next_power_of_2(length)))
        block_l = _block(length, tile // block_c)
    else:
        block_l = _block(length, tile)
        block_c = _block(channels, tile // block_l)
    blocks_of_channels = samples * triton.cdiv(channels, block_c)
    tiles_of_row = triton.cdiv(length, block_l)
    tiles = triton.cdiv(tiles_of_row, triton.cdiv(programs, blocks_of_channels))
    splits = triton.cdiv(tiles_of_row, tiles)
    layout = dict(
        CHANNELS_LAST=channels_last,
        VECTOR=math.gcd(channels if channels_last else length, 16 // itemsize),  # 128 bits
        BLOCK_C=block_c,
        BLOCK_L=block_l,
        num_warps=_warps(block_c * block_l),
    )
    return _Cut((blocks_of_channels, splits), length, tiles, splits, layout)


def _merge_blocks(rows: int, cut: _Cut) -> dict:
    """R rows by K chunks."""
    block_k = triton.next_power_of_2(cut.splits)
    return dict(BLOCK_R=_block(rows, TILE // block_k), BLOCK_K=block_k)


def _algebra_blocks(samples: int, width: int, cut: _Cut) -> dict:
    """N samples by C channels, for a group of ``width`` channels; and those of its merging."""
    block_c = _block(width, TILE // _block(samples, 32))
    block_n = _block(samples, TILE // block_c)
    merge = _merge_blocks(samples * width, cut)
    values = max(block_n * block_c, math.prod(merge.values()))
    # Few values per thread: this kernel waits, for one result after the other.
    return dict(BLOCK_N=block_n, BLOCK_C=block_c, **merge, num_warps=_warps(2 * values))


def _one_program_per_row(weight: Tensor) -> tuple[int, int, dict]:
    _format(weight)  # rows are dense, whatever the order inside
    rows = weight.size(0)
    length = weight.numel() // rows
    block = _block(length, 2 * TILE)
    vector = math.gcd(length, 16 // weight.element_size())
    return rows, length, dict(VECTOR=vector, BLOCK=block, num_warps=_warps(block))


def _block(size: int, limit: int) -> int:
    """The power of two that covers ``size``, up to ``limit``."""
    return max(1, min(triton.next_power_of_2(size), limit))


def _warps(values: int) -> int:
    """16 values per thread."""
    return max(1, min(values // 512, 8))
