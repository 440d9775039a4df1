"""The schemas of the operators: what compiled kernels must have been compiled for.

`ops` says what the names mean. Without torch, because setup.py reads this file: the compiled
kernels carry a `mark` of the schemas that they implement, and are not loaded for others. To
register a kernel under another schema would end the process.
"""

import hashlib

_RUNNING = (
    'Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? counts, '
    'Tensor(d!)? num_batches_tracked'
)
_AFFINE = 'Tensor? batch_weight, Tensor? batch_bias, Tensor? weight, Tensor? bias'
_RATE = 'float? rate, Tensor? rate_tensor'
_STATISTICS = 'Tensor m, Tensor q, Tensor mean, Tensor var, Tensor group_mean, Tensor inv_group_std'

_OPERATORS = (
    'row_moments(Tensor x) -> (Tensor m, Tensor q)',
    # Estimate mode and evaluation, in one call. With a rate r the running statistics are updated
    # first, in place:
    #   running_mean <- (1 - r) running_mean + r mean(x)
    #   running_var  <- (1 - r) running_var + r mean((x - old running_mean)^2)
    # A channel in which one of them would not be finite, in the dtype of the buffers, keeps both;
    # `counts` say so without anybody having to wait for it. The update is counted in
    # `num_batches_tracked`, what was left out or not. `mean` and `var` are copies of what was then
    # used.
    (
        f'normalize_with_estimates(Tensor x, int num_groups, {_RUNNING}, {_AFFINE}, {_RATE}, '
        f'float eps) -> (Tensor y, {_STATISTICS})'
    ),
    # The same without an update, for code that a compiler makes: it writes nothing.
    (
        f'normalize_with_given(Tensor x, int num_groups, Tensor mean, Tensor var, {_AFFINE}, '
        f'float eps) -> (Tensor y, {_STATISTICS})'
    ),
    # Batch mode: the statistics of x itself, with two values per channel at least; the running ones
    # move towards them at the rate, as BatchNorm's do, with the unbiased variance.
    (
        f'normalize_with_batch(Tensor x, int num_groups, {_RUNNING}, {_AFFINE}, {_RATE}, '
        f'float eps) -> (Tensor y, {_STATISTICS})'
    ),
    # Evaluation when nothing is differentiated: the same without an update, y alone.
    (
        'evaluate(Tensor x, int num_groups, Tensor running_mean, Tensor running_var, '
        f'Tensor? counts, Tensor? num_batches_tracked, {_AFFINE}, float eps) -> Tensor'
    ),
    # The update alone, from the moments, for backends without a kernel of their own; returns
    # copies. An operator, because a compiler may compute again for the backward pass what it can
    # see into, and would do so with running statistics that have changed by then.
    (f'update_estimates(Tensor m, Tensor q, {_RUNNING}, {_RATE}) -> (Tensor mean, Tensor var)'),
    # The second half of batch mode, after the moments were combined over samples (and ranks).
    (
        'normalize(Tensor x, int num_groups, Tensor m, Tensor q, Tensor mean, Tensor var, '
        f'{_AFFINE}, float eps) -> (Tensor y, Tensor group_mean, Tensor inv_group_std)'
    ),
    # grad has the shape of x, in any layout and floating dtype. Gradients of x, like x, and of the
    # parameters (`AffineGradients`). With `through_statistics` mean and var are those of x itself
    # (batch mode) and the gradient flows through them too.
    (
        f'normalize_backward(Tensor grad, Tensor x, int num_groups, {_STATISTICS}, {_AFFINE}, '
        'float eps, bool through_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
    ),
    # weight (O, *), contiguous or channels_last: rows standardized into `dtype`, in the same
    # layout. `mean`, `sigma` (O,): the row's mean and, by formula, 'paper' sqrt(var_biased + eps),
    # 'var_eps' sqrt(var_unbiased + eps), 'std_eps' std_unbiased, to which eps is added before
    # dividing.
    (
        'standardize(Tensor weight, float eps, str formula, ScalarType dtype) -> '
        '(Tensor w_hat, Tensor mean, Tensor sigma)'
    ),
    # grad has the shape of weight, in any layout and floating dtype.
    # dw = (g - mean(g)) / d - k (w - mean) sum((w - mean) g), d the denominator and, by formula,
    # k = 1 / (n d^3), 1 / ((n - 1) d^3), 1 / ((n - 1) std d^2), the last one 0 where std is 0.
    (
        'standardize_backward(Tensor grad, Tensor weight, Tensor mean, Tensor sigma, float eps, '
        'str formula) -> Tensor'
    ),
    # The same for many weights of one dtype and device at once, into memory that the caller brings:
    # `out[k]` lies as `weights[k]` does; `mean` and `sigma` hold the rows of all weights one after
    # the other. Backward, `offsets[k]` is the place of the first row of `weights[k]` in them, and
    # `out[k]` may be `grads[k]`.
    (
        'standardize_all(Tensor[] weights, float eps, str formula, Tensor(a!)[] out, '
        'Tensor(b!) mean, Tensor(c!) sigma) -> ()'
    ),
    (
        'standardize_all_backward(Tensor[] grads, Tensor[] weights, int[] offsets, Tensor mean, '
        'Tensor sigma, float eps, str formula, Tensor(a!)[] out) -> ()'
    ),
    # The two operations as a whole, differentiable, for a backend that brings nodes of autograd's
    # graph of its own (the CPU's, in C++): of a dense x that is not empty, and of a dense weight.
    # The others are differentiated by `autograd`.
    (
        f'batch_channel_norm(Tensor x, int num_groups, {_RUNNING}, {_AFFINE}, {_RATE}, float eps, '
        'bool from_batch) -> Tensor'
    ),
    ('weight_standardize(Tensor weight, float eps, str formula, ScalarType dtype) -> Tensor'),
    # Many weights by one call, and their gradients: see `together`.
    (
        'weight_standardize_all(Tensor[] weights, float eps, str formula, ScalarType dtype) -> '
        'Tensor[]'
    ),
    # Where it is counted how often such a node has computed gradients, in the whole process.
    'backward_calls_address() -> int',
    # Frees the memory that a backend keeps for its next results.
    'release_memory() -> ()',
    # The width of the registers of this machine that the kernels of a CPU compute in.
    'register_bytes() -> int',
    # How kernels of a GPU are launched without Python. Makes the launcher's operators those of CUDA
    # tensors; of CPU tensors, to measure it.
    'register_launcher(bool cpu) -> ()',
    # What it asks Python for at its first use: see `triton.variants`. And anew after a reset.
    'launcher() -> int[]',
    'reset_launcher() -> ()',
    # How many kernels it has launched in this process.
    'launches() -> int',
    # What it asks Python for: a kernel by name, for arguments like these. The first pointers are
    # so many tuples of so many. Returns the function, its threads, its shared memory in bytes, and
    # how many null pointers it takes behind its arguments.
    (
        'compile_kernel(str kernel, Tensor?[] pointers, int[] tuples, int[] numbers, '
        'str[] names, int[] constants) -> int[]'
    ),
    # What such nodes call to be differentiated again: differentiable gradients of those inputs that
    # require one, in order; without mean and var, those of x are differentiated too.
    (
        'normalize_twice(Tensor grad, Tensor x, int num_groups, Tensor? mean, Tensor? var, '
        f'{_AFFINE}, float eps) -> Tensor[]'
    ),
    'standardize_twice(Tensor grad, Tensor weight, float eps, str formula) -> Tensor',
)


DIFFERENTIATED = (
    'standardize',
    'normalize_with_estimates',
    'normalize_with_given',
    'normalize_with_batch',
    'evaluate',
)
"""What a compiler writes down of a layer; see `exported`."""

SCHEMAS = _OPERATORS + tuple(
    # What is called in its place where its results are to be differentiated.
    schema.replace('(', '_differentiated(', 1)
    for schema in _OPERATORS
    if schema.partition('(')[0] in DIFFERENTIATED
)

ENTRIES = (
    'batch_channel_norm(x, num_groups, running_mean, running_var, counts, num_batches_tracked, '
    'batch_weight, batch_bias, weight, bias, rate, eps, from_batch, least_dim, most_dim)',
    'weight_standardize(weight, eps, formula)',
    'weight_standardize_all(weights, eps, formula, dtype, one_pass) -> StandardizedWeights',
    'StandardizedWeights.take(index, weight)',
    'StandardizedWeights.use(index)',
    'get_usual(held, used, frame, order, left_out, open_table, one_pass, layer)',
    'note_change()',
    'state(weight, one_pass)',
    'survey(layers, below, opener)',
    'gather(order, place, left_out, layer, weight, most_bytes)',
)
"""What layers call directly; see nodes/python.h and nodes/standardized_weights.cpp.

`batch_channel_norm` asks itself whether activation checkpointing may be at work.
"""


def mark() -> bytes:
    """What compiled kernels of these operators and entries contain."""
    text = '\n'.join(SCHEMAS + ENTRIES).encode()
    return b'wsbcn_mm schemas ' + hashlib.sha256(text).hexdigest().encode()
