"""The BCN layers: what they hold and save, training and evaluation; the maths is `reference`'s."""

import copy
import fractions
import pickle

import numpy
import pytest
import torch
from torch import nn

from tests.layers.doubles import F64, assert_close, rand
from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
    batch_channel_norm,
    reference,
)

MODES = ('estimate', 'batch')
NORMS = {
    BatchChannelNorm1d: (3, 8, 7),
    BatchChannelNorm2d: (2, 8, 5, 4),
    BatchChannelNorm3d: (2, 8, 3, 4, 2),
}
CASES = [*NORMS.items(), (BatchChannelNorm1d, (5, 8))]


def make_norm(norm_class=BatchChannelNorm2d, **settings):
    """A norm of 8 channels and 4 groups with nothing at its initial value."""
    norm = norm_class(8, 4, **F64, **settings)
    with torch.no_grad():
        for value in norm.parameters():
            value.copy_(rand(*value.shape) + 1)
        norm.bn.running_mean.copy_(rand(8))
        norm.bn.running_var.copy_(rand(8).exp())
    return norm


def spec(norm, x, momentum, average=False):
    """(y, running_mean, running_var) by the specification, from the state that the norm is in."""
    return reference.batch_channel_norm(
        x,
        norm.num_groups,
        norm.bn.running_mean.clone(),
        norm.bn.running_var.clone(),
        norm.batch_weight,
        norm.batch_bias,
        norm.weight,
        norm.bias,
        norm.training,
        norm.mode,
        momentum,
        norm.eps,
        average,
    )


@pytest.mark.parametrize('affine', ['group', 'channel', None])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('norm_class, shape', CASES)
def test_norm_equals_function_and_reference(norm_class, shape, mode, affine):
    norm = make_norm(norm_class, mode=mode, affine=affine, momentum=0.3, eps=1e-3)
    for training in (True, True, False):
        norm.train(training)
        x = (2 * rand(*shape) + 1).requires_grad_()
        expected, mean, var = spec(norm, x, 0.3)
        buffers = norm.bn.running_mean.clone(), norm.bn.running_var.clone()
        function = batch_channel_norm(
            x,
            4,
            *buffers,
            norm.batch_weight,
            norm.batch_bias,
            norm.weight,
            norm.bias,
            training,
            mode,
            0.3,
            1e-3,
        )
        wanted, grad_y = [x, *norm.parameters()], rand(*shape)
        expected_grads = torch.autograd.grad(expected, wanted, grad_y)
        y = norm(x)
        assert torch.equal(y, function)
        assert torch.equal(norm.bn.running_mean, buffers[0])
        assert_close(y, expected)
        assert_close(norm.bn.running_mean, mean)
        assert_close(norm.bn.running_var, var)
        grads = torch.autograd.grad(y, wanted, grad_y)
        for actual, grad in zip(grads, expected_grads, strict=True):
            assert_close(actual, grad)


@pytest.mark.parametrize('norm_class', NORMS)
def test_norm_state_dict(norm_class):
    norm = norm_class(8, 4)
    state = norm.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        'weight': (4,),
        'bias': (4,),
        'batch_weight': (8,),
        'batch_bias': (8,),
        'bn.running_mean': (8,),
        'bn.running_var': (8,),
        'bn.num_batches_tracked': (),
    }
    assert state._metadata['']['version'] == 1
    assert norm_class(8, 4, affine='channel').state_dict()['weight'].shape == (8,)
    assert 'weight' not in norm_class(8, 4, affine=None).state_dict()


def test_norm_is_what_hosts_must_take_it_for():
    """A GroupNorm (not decayed as a conv, not fused as a BatchNorm) that holds a BatchNorm."""
    for norm_class, bn in zip(NORMS, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), strict=True):
        norm = norm_class(8, 4)
        assert nn.GroupNorm in norm_class.__bases__ and norm_class.__doc__
        assert not isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert isinstance(norm.bn, bn) and not norm.bn.affine
        assert not list(norm.bn.parameters())
        assert len(list(norm.parameters())) == 4
        assert norm.num_features == norm.num_channels == 8  # asked of a BatchNorm by some blocks


def test_norm_initial_values_and_reset():
    for affine in ('group', 'channel', None):
        fresh = BatchChannelNorm2d(8, 4, affine=affine, **F64)
        used = make_norm(affine=affine)
        used(rand(2, 8, 3, 3))
        used.reset_parameters()
        for state in (fresh.state_dict(), used.state_dict()):
            for name, value in state.items():
                ones = name in ('weight', 'batch_weight', 'bn.running_var')
                assert torch.equal(value, torch.ones_like(value) * ones), name


@pytest.mark.parametrize('mode, default', [('estimate', 0.01), ('batch', 0.1)])
def test_norm_default_momentum(mode, default):
    norm = make_norm(mode=mode)
    assert norm.momentum == norm.bn.momentum == default
    x = rand(2, 8, 3, 3)
    _, mean, var = spec(norm, x, default)
    norm(x)
    assert_close(norm.bn.running_mean, mean)
    assert_close(norm.bn.running_var, var)
    assert BatchChannelNorm2d(32).mode == 'estimate'
    assert BatchChannelNorm2d(64).num_groups == 32 and BatchChannelNorm2d(64).eps == 1e-5


@pytest.mark.parametrize('mode', MODES)
def test_cumulative_momentum_is_1_over_t(mode):
    norm = make_norm(mode=mode, momentum='cumulative')
    assert norm.momentum == 'cumulative' and norm.bn.momentum is None
    inputs = [rand(2, 8, 3, 3) + t for t in range(4)]
    for t, x in enumerate(inputs, start=1):
        expected, mean, var = spec(norm, x, 1 / t, average=True)
        assert_close(norm(x), expected)
        assert_close(norm.bn.running_mean, mean)
        assert_close(norm.bn.running_var, var)
    # ... which makes the mean the average over all steps, whatever it started from,
    everything = torch.cat(inputs)
    assert_close(norm.bn.running_mean, everything.mean((0, 2, 3)))
    if mode == 'estimate':  # and the variance that of all of them together.
        assert_close(norm.bn.running_var, everything.var((0, 2, 3), correction=0))
    norm.eval()
    assert_close(norm(inputs[0]), spec(norm, inputs[0], None)[0])


def test_momentum_is_settable_on_the_layer_and_on_its_bn():
    """mmengine and user hooks set `momentum` on every BatchNorm of a model."""
    norm = make_norm()
    norm.momentum = 0.5
    assert norm.bn.momentum == 0.5
    norm.bn.momentum = 0.2
    assert norm.momentum == 0.2
    x = rand(2, 8, 3, 3)
    expected, mean, _ = spec(norm, x, 0.2)
    assert_close(norm(x), expected)
    assert_close(norm.bn.running_mean, mean)
    norm.momentum = 'cumulative'
    assert norm.bn.momentum is None


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('freeze', ['layer', 'bn'])
def test_eval_of_the_layer_or_of_its_bn_freezes_the_statistics(freeze, mode):
    norm = make_norm(mode=mode)
    (norm if freeze == 'layer' else norm.bn).eval()
    x, before = rand(2, 8, 3, 3), copy.deepcopy(norm.bn.state_dict())
    y = norm(x)
    for name, value in norm.bn.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert_close(
        y,
        reference.batch_channel_norm(
            x,
            4,
            before['running_mean'],
            before['running_var'],
            norm.batch_weight,
            norm.batch_bias,
            norm.weight,
            norm.bias,
        )[0],
    )
    norm.train()
    norm(x)
    assert norm.bn.num_batches_tracked == 1
    assert not torch.equal(norm.bn.running_mean, before['running_mean'])


@pytest.mark.parametrize('dtype', [torch.int64, torch.float32])  # what a kernel counts in, or not
@pytest.mark.parametrize('momentum', ['cumulative', 0.3])
@pytest.mark.parametrize('mode', MODES)
def test_num_batches_tracked_counts_updates_only(mode, momentum, dtype):
    norm = make_norm(mode=mode, momentum=momentum)
    norm.bn.num_batches_tracked = norm.bn.num_batches_tracked.to(dtype)
    version = norm.bn.num_batches_tracked._version
    norm(rand(0, 8, 3, 3))  # an empty batch
    norm(rand(2, 8, 0, 3))
    norm.eval()(rand(2, 8, 3, 3))
    norm.train()
    assert norm.bn.num_batches_tracked == 0
    norm(rand(1, 8, 1, 1))  # one value per channel: no update in batch mode
    assert norm.bn.num_batches_tracked == (1 if mode == 'estimate' else 0)
    norm.reset_parameters()
    x = rand(2, 8, 3, 3)
    norm(rand(0, 8, 3, 3))
    norm(x)
    assert norm.bn.num_batches_tracked == 1 and norm.bn.num_batches_tracked._version > version
    if momentum == 'cumulative':
        assert_close(norm.bn.running_mean, x.mean((0, 2, 3)))  # a whole step, not half of one


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('norm_class, shape', CASES)
def test_norm_of_an_empty_batch(norm_class, shape, mode):
    norm = make_norm(norm_class, mode=mode)
    before = copy.deepcopy(norm.state_dict())
    x = rand(0, *shape[1:]).requires_grad_()
    y = norm(x)
    assert y.shape == x.shape
    y.backward(torch.zeros_like(y))
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in norm.named_parameters():
        assert torch.equal(value.grad, torch.zeros_like(value)), name


def test_norm_takes_integers_of_numpy():
    norm = BatchChannelNorm2d(numpy.int64(8), numpy.int32(4))
    assert type(norm.num_channels) is type(norm.num_groups) is int


def test_norm_repr_names_every_setting():
    norm = BatchChannelNorm2d(8, 4, 1e-3, 0.2, 'channel', 'batch')
    assert repr(norm).startswith(
        "BatchChannelNorm2d(\n  8, num_groups=4, eps=0.001, momentum=0.2, affine='channel', "
        "mode='batch'"
    )
    assert "momentum='cumulative'" in repr(BatchChannelNorm2d(8, 4, momentum='cumulative'))


@pytest.mark.parametrize('affine', ['group', 'channel', None])
def test_norm_state_dict_round_trip(affine):
    norm, other = make_norm(affine=affine), make_norm(affine=affine)
    norm(rand(2, 8, 3, 3))
    other.load_state_dict(norm.state_dict(), strict=True)
    x = rand(2, 8, 3, 3)
    assert torch.equal(other.eval()(x), norm.eval()(x))
    assert other.bn.num_batches_tracked == 1
    incomplete = norm.state_dict()
    del incomplete['bn.running_var'], incomplete['batch_bias']
    with pytest.raises(RuntimeError, match='batch_bias.*bn.running_var'):
        other.load_state_dict(incomplete)


def test_norm_does_not_load_a_weight_of_the_other_affine():
    per_channel = make_norm(affine='channel')
    with pytest.raises(RuntimeError, match='size mismatch for weight'):
        make_norm(affine='group').load_state_dict(per_channel.state_dict())


@pytest.mark.parametrize('norm_class, shape', CASES)
def test_norm_survives_deepcopy_and_pickle(norm_class, shape):
    norm = make_norm(norm_class, mode='batch', momentum='cumulative')
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        x, own = rand(*shape), copy.deepcopy(norm)
        assert torch.equal(other(x), own(x))
        assert repr(other) == repr(norm)
        assert torch.equal(other.bn.running_mean, own.bn.running_mean)
        assert not torch.equal(other.bn.running_mean, norm.bn.running_mean)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_norm_in_half_precision(dtype, mode):
    norm, x = make_norm(mode=mode, momentum=0.5), rand(2, 8, 6, 5)
    expected = spec(copy.deepcopy(norm), x, 0.5)
    cast = norm.half() if dtype == torch.float16 else norm.bfloat16()
    y = cast(x.to(dtype))
    assert y.dtype == cast.weight.dtype == cast.bn.running_mean.dtype == dtype
    assert cast.bn.num_batches_tracked.dtype == torch.int64
    # Inputs and parameters were rounded, too: some units in the last place.
    tolerance = 16 * torch.finfo(dtype).eps * expected[0].abs().max()
    assert (y.double() - expected[0]).abs().max() < tolerance
    torch.testing.assert_close(
        cast.bn.running_var.double(), expected[2], rtol=8 * torch.finfo(dtype).eps, atol=0
    )


def test_norm_keeps_the_memory_format():
    norm = make_norm().to(memory_format=torch.channels_last)
    x = rand(2, 8, 5, 4).to(memory_format=torch.channels_last)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    norm = make_norm(BatchChannelNorm3d)
    x = rand(2, 8, 3, 5, 4).to(memory_format=torch.channels_last_3d)
    assert norm(x).is_contiguous(memory_format=torch.channels_last_3d)


def test_norm_device_and_dtype():
    norm = BatchChannelNorm2d(8, 4, device='meta', dtype=torch.float64)
    for name, value in norm.state_dict().items():
        assert value.is_meta, name
        assert value.dtype == (torch.int64 if 'num_batches' in name else torch.float64), name


@pytest.mark.parametrize(
    'settings, error, message',
    [
        (dict(num_channels=30, num_groups=32), ValueError, 'num_groups=30 would fit'),
        (dict(num_channels=0), ValueError, 'num_channels must be at least 1'),
        (dict(num_channels=8.0), TypeError, 'num_channels must be an int'),
        (dict(affine=True), ValueError, "affine must be one of 'group', 'channel', None"),
        (dict(affine='both'), ValueError, 'affine must be one of'),
        (dict(mode='sync'), ValueError, "mode must be one of 'estimate', 'batch'"),
        (dict(eps=-1e-5), ValueError, 'eps must be finite and >= 0'),
        (dict(eps='1e-5'), TypeError, 'eps must be a number'),
        (dict(momentum=2), ValueError, r'momentum must lie in \[0, 1\]'),
        (dict(momentum='auto'), ValueError, "momentum must be a number .* or 'cumulative'"),
        (dict(momentum=True), TypeError, 'momentum must be a number'),
        (dict(groups=4), TypeError, 'groups'),
    ],
)
@pytest.mark.parametrize('norm_class', NORMS)
def test_norm_errors(norm_class, settings, error, message):
    with pytest.raises(error, match=message):
        norm_class(**dict(num_channels=8, num_groups=4) | settings)


@pytest.mark.parametrize('value', [-0.1, 1.1, float('nan')])
def test_norm_rejects_a_wrong_momentum_later_too(value):
    norm = BatchChannelNorm2d(8, 4, momentum=0.3)
    with pytest.raises(ValueError, match=r'momentum must lie in \[0, 1\]'):
        norm.momentum = value
    assert norm.momentum == 0.3


@pytest.mark.parametrize(
    'norm_class, shapes',
    [
        (BatchChannelNorm1d, [(8,), (2, 8, 3, 3), (2, 4, 3), (4, 4)]),
        (BatchChannelNorm2d, [(2, 8), (8, 3, 3), (2, 8, 3, 3, 3), (2, 4, 3, 3)]),
        (BatchChannelNorm3d, [(2, 8, 3, 3), (2, 4, 3, 3, 3), (8, 3, 3)]),
    ],
)
def test_norm_rejects_inputs_of_another_rank_or_width(norm_class, shapes):
    norm = norm_class(8, 4)
    before = copy.deepcopy(norm.state_dict())
    for shape in shapes:
        with pytest.raises(ValueError) as caught:
            norm(torch.zeros(shape))
        assert norm_class.__name__ in str(caught.value)
        assert '(N, 8, ...)' in str(caught.value) and str(shape) in str(caught.value)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name  # a rejected input counts as no batch
    with pytest.raises(TypeError, match='input must be a floating-point tensor'):
        norm(torch.zeros(NORMS[norm_class], dtype=torch.int64))


@pytest.mark.parametrize('momentum', [0.3, 'cumulative'])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('norm_class, shape', CASES)
def test_sync_batch_norm_conversion(norm_class, shape, mode, momentum):
    """Only the child is converted; without a process group nothing changes, on the CPU either."""
    model = nn.Sequential(make_norm(norm_class, mode=mode, momentum=momentum))
    original = copy.deepcopy(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is norm_class and isinstance(converted[0].bn, nn.SyncBatchNorm)
    assert list(converted.state_dict()) == list(original.state_dict())
    for training in (True, True, False):
        converted.train(training), original.train(training)
        x = rand(*shape)
        assert torch.equal(converted(x), original(x))
    for name, value in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value), name


@pytest.mark.parametrize('value', [-0.1, 1.5])
def test_norm_rejects_a_wrong_momentum_set_on_its_bn(value):
    """Past the setter, as a hook that sets every BatchNorm's momentum does; nothing is updated."""
    norm = BatchChannelNorm2d(4, 2)
    with pytest.raises(ValueError, match='momentum must lie in'):
        norm.bn.momentum = value
    assert norm.momentum == 0.01
    norm.bn.momentum = torch.tensor(value)  # which may change, and is looked into when it is used
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    with pytest.raises(ValueError, match='momentum must lie in'):
        converted(torch.randn(1, 4, 3, 3))
    assert converted.bn.num_batches_tracked == 0 and converted.bn.running_mean.abs().max() == 0
    converted.eval()(torch.randn(1, 4, 3, 3))  # no rate is used


@pytest.mark.parametrize(
    'value',
    [numpy.float32(0.25), numpy.float64(0.25), fractions.Fraction(1, 4), torch.tensor(0.25)],
)
def test_momentum_is_any_real_number(value):
    norm, x = make_norm(), rand(2, 8, 3, 3)
    _, mean, var = spec(norm, x, 0.25)
    norm.bn.momentum = value
    norm(x)
    assert_close(norm.bn.running_mean, mean)
    assert_close(norm.bn.running_var, var)
    assert isinstance(norm.momentum, float) or norm.momentum is value


@pytest.mark.parametrize('value', ['0.1', True, torch.ones(2), torch.tensor(1), 1j])
def test_what_is_no_rate_is_refused(value):
    norm = BatchChannelNorm2d(4, 2)
    with pytest.raises(TypeError, match='momentum must be a number'):
        norm.bn.momentum = value
    assert norm.momentum == 0.01
