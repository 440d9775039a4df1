"""Precision and dtypes of `batch_channel_norm`."""

import pytest
import torch
import torch.nn.functional as F

from tests.functional.cases import (
    PARAMETERS,
    assert_at_most_twice,
    assert_equal,
    fast,
    gradients,
    make_buffers,
    make_input,
    make_parameters,
    rand,
    spec,
)
from wsbcn_mm import weight_standardize

pytestmark = pytest.mark.usefixtures('backend')  # every test, on every backend


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('training, mode', [(True, 'batch'), (True, 'estimate'), (False, 'batch')])
def test_bcn_errs_at_most_twice_as_much_as_plain_torch(training, mode, dtype):
    shape, groups = (2, 16, 13, 11), 4
    x, grad_y = make_input(shape, dtype=dtype), rand(*shape, dtype=dtype)
    parameters = make_parameters(16, groups, 'channel', dtype)
    buffers = make_buffers(16, dtype)
    settings = dict(training=training, mode=mode, momentum=0.25)

    def plain(x, groups, mean, var, parameters, **_):
        """F.batch_norm, then F.group_norm, with the statistics that the mode asks for."""
        new = spec(x.double(), groups, mean.double(), var.double(), {}, **settings)[1:]
        if mode == 'estimate' and training:
            mean, var = (t.to(dtype) for t in new)
        inner = parameters['batch_weight'], parameters['batch_bias']
        outer = parameters['weight'], parameters['bias']
        use_batch = training and mode == 'batch'
        x1 = F.batch_norm(x, mean.clone(), var.clone(), *inner, training=use_batch)
        return F.group_norm(x1, groups, *outer), *new

    oracle = gradients(
        spec,
        x.double(),
        {k: v.double() for k, v in parameters.items()},
        grad_y.double(),
        groups,
        *[b.double() for b in buffers],
        **settings,
    )
    ours = gradients(fast, x, parameters, grad_y, groups, *buffers, **settings)
    theirs = gradients(plain, x, parameters, grad_y, groups, *buffers)
    assert all(v.dtype == dtype for v in ours.values())  # gradients and buffers included
    assert_at_most_twice(ours, theirs, oracle, summed=x.numel() // 16)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('training, mode', [(True, 'batch'), (True, 'estimate'), (False, 'batch')])
def test_bcn_stays_accurate_in_float32_at_mean_1000(training, mode, layout):
    """E[x^2] - E[x]^2 would be wrong by a quarter here; centred sums keep four digits."""
    shape = (2, 8, 12, 10)
    x = 1000 + rand(*shape, dtype=torch.float32)
    if layout == 'channels_last':
        x = x.to(memory_format=torch.channels_last)
    buffers = torch.full((8,), 1000.1), torch.full((8,), 0.9)
    grad_y, parameters = rand(*shape, dtype=torch.float32), make_parameters(8, 4, dtype=x.dtype)
    settings = dict(training=training, mode=mode)
    oracle = gradients(
        spec,
        x.double(),
        {k: v.double() for k, v in parameters.items()},
        grad_y.double(),
        4,
        *[b.double() for b in buffers],
        **settings,
    )
    actual = gradients(fast, x, parameters, grad_y, 4, *buffers, **settings)
    assert_equal({k: v.double() for k, v in actual.items()}, oracle, 1e-3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_autocast_does_not_change_the_dtype(dtype):
    x = make_input((2, 8, 5, 5), dtype=dtype)
    parameters = make_parameters(8, 4, dtype=torch.float32)
    buffers, grad_y = make_buffers(8, torch.float32), rand(2, 8, 5, 5, dtype=dtype)
    settings = dict(training=True)
    expected = gradients(fast, x, parameters, grad_y, 4, *buffers, **settings)
    with torch.autocast(x.device.type, torch.bfloat16):
        actual = gradients(fast, x, parameters, grad_y, 4, *buffers, **settings)
        w_hat = weight_standardize(parameters['weight'].view(1, -1))
    assert actual['y'].dtype == actual['grad_x'].dtype == dtype
    assert w_hat.dtype == torch.float32
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name  # computed in float32 inside, too


def test_gradients_have_the_dtype_of_what_they_belong_to():
    x = make_input((2, 8, 5), dtype=torch.bfloat16)
    parameters = make_parameters(8, 4, dtype=torch.float32)
    buffers, grad_y = make_buffers(8, torch.float32), rand(2, 8, 5, dtype=torch.bfloat16)
    found = gradients(fast, x, parameters, grad_y, 4, *buffers, training=True)
    assert found['y'].dtype == found['grad_x'].dtype == torch.bfloat16
    assert found['running_mean'].dtype == found['running_var'].dtype == torch.float32
    for name in PARAMETERS:
        assert found[f'grad_{name}'].dtype == torch.float32
    # Parameters and buffers in float32 are used as they are, not rounded to bfloat16 first.
    oracle = gradients(
        spec,
        x.double(),
        {k: v.double() for k, v in parameters.items()},
        grad_y.double(),
        4,
        *[b.double() for b in buffers],
        training=True,
    )
    for name in ('running_mean', 'running_var', 'grad_batch_weight', 'grad_weight'):
        torch.testing.assert_close(found[name].double(), oracle[name], rtol=1e-4, atol=1e-4)
