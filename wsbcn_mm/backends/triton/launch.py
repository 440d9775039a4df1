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

from wsbcn_mm.backends.ops import accumulation_dtype
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
    x: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    update: bool,
    momentum: float,
    rate: Tensor | None,
    eps: float,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`."""
    if rate is not None and rate.device != x.device:
        momentum, rate = rate.item(), None  # on the host, where reading it waits for nothing
    cut, chunks, m, q = _moments(x)
    mean, var = _empty(x, m.shape[1:]), _empty(x, m.shape[1:])
    y, *group_statistics = _normalize(
        x,
        cut,
        chunks,
        m,
        q,
        (running_mean, running_var, rate, counts),
        mean,
        var,
        num_groups,
        batch_weight,
        batch_bias,
        weight,
        bias,
        update,
        momentum,
        eps,
    )
    return y, m, q, mean, var, *group_statistics


def evaluate(
    x: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """See `wsbcn_mm.backends.ops`."""
    return normalize_with_estimates(
        x,
        num_groups,
        running_mean,
        running_var,
        batch_weight,
        batch_bias,
        weight,
        bias,
        False,
        0.0,
        None,
        eps,
    )[0]


def normalize(
    x: Tensor,
    m: Tensor,
    q: Tensor,
    mean: Tensor,
    var: Tensor,
    num_groups: int,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`."""
    m, q, mean, var = _dense(m, q, mean, var)
    return _normalize(
        x,
        _cut(x, REDUCING),
        (None, None),
        m,
        q,
        (None, None, None, None),
        mean,
        var,
        num_groups,
        batch_weight,
        batch_bias,
        weight,
        bias,
        False,
        0.0,
        eps,
    )


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    m: Tensor,
    q: Tensor,
    mean: Tensor,
    var: Tensor,
    group_mean: Tensor,
    inv_group_std: Tensor,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    num_groups: int,
    affine_size: int,
    eps: float,
    through_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `wsbcn_mm.backends.ops`."""
    assert grad.is_contiguous(memory_format=_format(x)), 'grad must have the memory format of x'
    m, q, *statistics = _dense(m, q, mean, var, group_mean, inv_group_std)
    samples, channels = m.shape

    cut = _cut(x, REDUCING)
    sums = _empty(x, m.shape), _empty(x, m.shape)
    found, chunks = _chunks(x, sums, cut)
    kernels.backward_sums[cut.grid](
        grad, x, m, *found, channels, cut.length, cut.tiles, **cut.layout
    )

    inner = _empty(x, (channels,)), _empty(x, (channels,))
    outer = _empty(x, (affine_size,)), _empty(x, (affine_size,))
    group_means = _empty(x, (samples, num_groups)), _empty(x, (samples, num_groups))
    coefficients = _empty(x, m.shape), _empty(x, m.shape), _empty(x, m.shape)
    kernels.backward_algebra[(num_groups,)](
        *chunks,
        *sums,
        m,
        q,
        *statistics,
        *_dense(batch_weight, batch_bias, weight),
        *group_means,
        *inner,
        *(outer if affine_size else (None, None)),
        *coefficients,
        samples,
        channels,
        num_groups,
        cut.length,
        cut.splits,
        _repeat(weight, channels),
        _bits(eps),
        PER_CHANNEL=affine_size == channels,
        THROUGH_STATISTICS=through_statistics,
        **_algebra_blocks(samples, channels // num_groups, cut),
    )

    dx = torch.empty_like(x)
    cut = _cut(x, APPLYING)
    kernels.backward_apply[cut.grid](
        grad, x, dx, m, *coefficients, channels, cut.length, cut.tiles, **cut.layout
    )
    return dx, *inner, *outer


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
    same = grad.is_contiguous(memory_format=_format(weight))
    assert same, 'grad must have the memory format of weight'
    rows, length, blocks = _one_program_per_row(weight)
    dw = torch.empty_like(weight)
    kernels.standardize_backward[(rows,)](
        grad, weight, dw, *_dense(mean, sigma), length, _bits(eps), FORMULA=formula, **blocks
    )
    return dw


def _moments(x: Tensor) -> tuple['_Cut', tuple, Tensor, Tensor]:
    """Launches the first pass: how x was cut, what is left to be merged, and m and q."""
    m, q = _empty(x, x.shape[:2]), _empty(x, x.shape[:2])
    cut = _cut(x, REDUCING)
    found, chunks = _chunks(x, (m, q), cut)
    kernels.moments[cut.grid](x, *found, x.size(1), cut.length, cut.tiles, **cut.layout)
    return cut, chunks, m, q


def _normalize(
    x,
    cut,
    chunks,
    m,
    q,
    estimates,
    mean,
    var,
    num_groups,
    batch_weight,
    batch_bias,
    weight,
    bias,
    update,
    momentum,
    eps,
):
    """The algebra and the last pass. `chunks` are merged into m and q, and `estimates`, which are
    the running statistics and the rate, into mean and var; None: those are given.
    """
    samples, channels = m.shape
    group_mean = _empty(x, (samples, num_groups))
    inv_group_std = _empty(x, (samples, num_groups))
    scale, shift = _empty(x, m.shape), _empty(x, m.shape)
    blocks = _algebra_blocks(samples, channels // num_groups, cut)
    # An update needs all samples of a group in one program; otherwise there may be many.
    shares = 1 if update else triton.cdiv(samples, blocks['BLOCK_N'])
    running_mean, running_var, *_ = estimates
    kernels.forward_algebra[(num_groups, shares)](
        *chunks,
        m,
        q,
        *estimates,
        mean,
        var,
        *_dense(batch_weight, batch_bias, weight, bias),
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
        _repeat(weight, channels),
        _repeat(bias, channels),
        _bits(momentum),
        _bits(eps),
        UPDATE=update,
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
