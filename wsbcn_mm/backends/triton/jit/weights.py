"""Weight Standardization: one output channel per program, of one weight or of many.

The second read of a row comes from the cache.
"""

import triton
import triton.language as tl

from wsbcn_mm.backends.triton.jit.tiles import (
    SIZES,
    multiple,
    number,
    union,
    welford,
)


@triton.jit
def denominator_of(sigma, eps, FORMULA: tl.constexpr):
    if FORMULA == 'std_eps':
        denominator = sigma + eps
    else:
        denominator = sigma
    return denominator


@triton.jit
def freedom_of(length, FORMULA: tl.constexpr):
    """By what the sum of squares is divided."""
    if FORMULA == 'paper':
        freedom = length
    else:
        freedom = length - 1
    return freedom


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """To float32 first, as torch does it: Triton 3.2 makes no bfloat16 of float64."""
    if dtype == tl.bfloat16:
        result = value.to(tl.float32).to(dtype)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def standardize_row(
    weight,  # (O, L)
    w_hat,  # (O, L)
    mean,  # place of this row's
    sigma,
    o,
    length,
    eps,
    FORMULA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = mean.dtype.element_ty
    length = multiple(length, VECTOR)
    lane = tl.arange(0, BLOCK)
    # Around the first value: where the mean is large, its own rounding would be seen.
    origin = tl.load(weight + o * length).to(ACC)

    lane_mean = tl.zeros([BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    seen = tl.zeros([1], ACC)
    for start in range(0, length, BLOCK):
        mask = start + lane < length
        value = tl.load(weight + o * length + start + lane, mask, other=0.0).to(ACC)
        seen += 1.0
        lane_mean, squares = welford(value - origin, mask, seen, lane_mean, squares)
    count = ((length - lane + BLOCK - 1) // BLOCK).to(ACC)  # that a lane has seen
    values = length.to(ACC)
    centre, variance = union(tl.zeros([], ACC), values, count, lane_mean, squares, 0)
    variance *= values / freedom_of(length, FORMULA).to(ACC)
    if FORMULA == 'std_eps':
        deviation = tl.sqrt(variance)
    else:
        deviation = tl.sqrt(variance + eps)
    tl.store(mean, origin + centre)
    tl.store(sigma, deviation)

    factor = 1.0 / denominator_of(deviation, eps, FORMULA)
    for start in range(0, length, BLOCK):
        mask = start + lane < length
        place = o * length + start + lane
        value = tl.load(weight + place, mask, other=0.0).to(ACC)
        value = (value - origin - centre) * factor
        tl.store(w_hat + place, rounded(value, w_hat.dtype.element_ty), mask)


@triton.jit
def standardize_row_backward(
    grad,  # (O, L)
    weight,  # (O, L)
    dw,  # (O, L), may be grad
    mean,  # place of this row's
    sigma,
    o,
    length,
    eps,
    FORMULA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = mean.dtype.element_ty
    length = multiple(length, VECTOR)
    centre = tl.load(mean)
    deviation = tl.load(sigma)
    denominator = denominator_of(deviation, eps, FORMULA)
    lane = tl.arange(0, BLOCK)

    sum_g = tl.zeros([BLOCK], ACC)
    sum_w = tl.zeros([BLOCK], ACC)
    sum_gw = tl.zeros([BLOCK], ACC)
    for start in range(0, length, BLOCK):
        mask = start + lane < length
        place = o * length + start + lane
        g = tl.load(grad + place, mask, other=0.0).to(ACC)
        value = tl.load(weight + place, mask, other=0.0).to(ACC)
        value = tl.where(mask, value - centre, 0.0)
        sum_g += g
        sum_w += value
        sum_gw += g * value
    mean_g = tl.sum(sum_g, 0) / length.to(ACC)
    rest = tl.sum(sum_w, 0) / length.to(ACC)  # what the mean lost when it was rounded
    freedom = freedom_of(length, FORMULA).to(ACC)
    k = 1.0 / (freedom * deviation * denominator * denominator)
    k = tl.where(deviation > 0, k, 0.0)  # a constant row's standard deviation has no gradient
    slope = k * (tl.sum(sum_gw, 0) - rest * tl.sum(sum_g, 0))

    for start in range(0, length, BLOCK):
        mask = start + lane < length
        place = o * length + start + lane
        g = tl.load(grad + place, mask, other=0.0).to(ACC)
        value = tl.load(weight + place, mask, other=0.0).to(ACC)
        result = (g - mean_g) / denominator - slope * (value - centre - rest)
        tl.store(dw + place, result.to(dw.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES)
def standardize(
    weight,  # (O, L)
    w_hat,  # (O, L)
    mean,  # (O,)
    sigma,  # (O,)
    length,
    eps,
    FORMULA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One weight."""
    o = tl.program_id(0).to(tl.int64)
    eps = number(eps, mean.dtype.element_ty)
    standardize_row(weight, w_hat, mean + o, sigma + o, o, length, eps, FORMULA, VECTOR, BLOCK)


@triton.jit(do_not_specialize=SIZES)
def standardize_backward(
    grad,  # (O, L)
    weight,  # (O, L)
    dw,  # (O, L)
    mean,  # (O,)
    sigma,  # (O,)
    length,
    eps,
    FORMULA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one weight."""
    o = tl.program_id(0).to(tl.int64)
    eps = number(eps, mean.dtype.element_ty)
    standardize_row_backward(
        grad, weight, dw, mean + o, sigma + o, o, length, eps, FORMULA, VECTOR, BLOCK
    )


# ----------------------------------------------------------------------------------------------
# Many weights


@triton.jit
def chosen(tensors, k, COUNT: tl.constexpr):
    """tensors[k] of a tuple, for a k that only this program knows."""
    tensor = tensors[0]
    for i in tl.static_range(1, COUNT):
        tensor = tl.where(k == i, tensors[i], tensor)
    return tensor


@triton.jit
def row_of_program(table, COUNT: tl.constexpr):
    """Which weight and which of its rows is this program's; length and place of the row.

    table (3, COUNT): the first program of every weight, the length of its rows, and where its first
    row stands among the rows of all weights.
    """
    index = tl.arange(0, COUNT)
    program = tl.program_id(0)
    k = tl.sum((tl.load(table + index) <= program).to(tl.int32), 0) - 1
    o = program - tl.load(table + k)
    return k, o, tl.load(table + COUNT + k), tl.load(table + 2 * COUNT + k) + o


@triton.jit(do_not_specialize=SIZES)
def standardize_many(
    weights,  # tuple of (O, L)
    w_hats,  # tuple of (O, L)
    table,  # see `row_of_program`
    mean,  # (rows of all weights,)
    sigma,
    eps,
    FORMULA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Many weights, one program per row of any of them."""
    k, o, length, row = row_of_program(table, COUNT)
    weight = chosen(weights, k, COUNT)
    w_hat = chosen(w_hats, k, COUNT)
    eps = number(eps, mean.dtype.element_ty)
    if length % VECTOR == 0:
        standardize_row(
            weight, w_hat, mean + row, sigma + row, o, length, eps, FORMULA, VECTOR, BLOCK
        )
    else:
        standardize_row(weight, w_hat, mean + row, sigma + row, o, length, eps, FORMULA, 1, BLOCK)


@triton.jit(do_not_specialize=SIZES)
def standardize_many_backward(
    grads,  # tuple of (O, L)
    weights,  # tuple of (O, L)
    dws,  # tuple of (O, L)
    table,  # see `row_of_program`
    mean,  # (rows of all weights,)
    sigma,
    eps,
    FORMULA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Of many weights, one program per row of any of them."""
    k, o, length, row = row_of_program(table, COUNT)
    grad = chosen(grads, k, COUNT)
    weight = chosen(weights, k, COUNT)
    dw = chosen(dws, k, COUNT)
    eps = number(eps, mean.dtype.element_ty)
    if length % VECTOR == 0:
        standardize_row_backward(
            grad, weight, dw, mean + row, sigma + row, o, length, eps, FORMULA, VECTOR, BLOCK
        )
    else:
        standardize_row_backward(
            grad, weight, dw, mean + row, sigma + row, o, length, eps, FORMULA, 1, BLOCK
        )
