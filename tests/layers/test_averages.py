"""Loops that average the statistics of BatchNorms leave those of all inputs together."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d, reference


def images():
    """Of different light, so that means of images lie as far apart as the values of one."""
    g = torch.Generator().manual_seed(0)
    light = torch.randn(12, 1, 3, 1, 1, generator=g) * 2
    return (torch.randn(12, 1, 3, 8, 8, generator=g) + light).double() + 5


def net(**settings):
    torch.manual_seed(1)
    return nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4, **settings)).double()


def together(model):
    y = torch.cat([model[0](x) for x in images()]).detach()
    return y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)


def precise_bn(model):
    """fvcore's update_bn_stats, mmpretrain's PreciseBNHook."""
    bns = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [bn.momentum for bn in bns]
    means, variances = ([torch.zeros_like(bn.running_mean) for bn in bns] for _ in range(2))
    for bn in bns:
        bn.momentum = 1.0
    for x in images():
        model(x)
        for bn, mean, var in zip(bns, means, variances):
            mean += bn.running_mean / len(images())
            var += bn.running_var / len(images())
    for bn, mean, var, momentum in zip(bns, means, variances, before):
        bn.running_mean, bn.running_var, bn.momentum = mean, var, momentum


LOOPS = {
    'update_bn': lambda model: update_bn(images(), model),
    'PreciseBN': precise_bn,
    'PreciseBN, in half precision before': lambda model: precise_bn(model.half().double()),
    'cumulative': lambda model: [model(x) for x in images()],
}


@pytest.mark.parametrize('loop', LOOPS)
@pytest.mark.parametrize('sync', ['step', 'forward'])
def test_the_statistics_are_those_of_all_inputs(loop, sync):
    model = net(sync=sync, momentum='cumulative' if loop == 'cumulative' else 0.01)
    before = model[1].momentum
    model(images()[0] + 50)  # began far off
    if loop == 'cumulative':
        model[1].bn.reset_running_stats()
        model[1].bn.running_mean += 1000
    LOOPS[loop](model)
    mean, var = together(model)
    torch.testing.assert_close(model[1].bn.running_mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[1].bn.running_var, var, rtol=1e-6, atol=1e-6)
    assert model[1].momentum == before


@pytest.mark.parametrize('loop', ['update_bn', 'PreciseBN'])
def test_batch_mode_is_as_any_batch_norm(loop):
    """The mean of the unbiased variances within the batches."""
    model, plain = net(mode='batch'), nn.Sequential(net()[0], nn.BatchNorm2d(8)).double()
    for each in (model, plain):
        LOOPS[loop](each)
    torch.testing.assert_close(model[1].bn.running_mean, plain[1].running_mean)
    torch.testing.assert_close(model[1].bn.running_var, plain[1].running_var)


def test_an_average_in_float32_of_values_far_from_zero():
    """A variance of 1 around 1e4: differences of squares would leave nothing of it."""
    norm = BatchChannelNorm2d(8, 4, momentum='cumulative')
    inputs = [torch.randn(1, 8, 32, 32) + 1e4 for _ in range(3)]
    for x in inputs:
        norm(x)
    var = torch.cat(inputs).double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.bn.running_var.double(), var, rtol=2e-3, atol=0)


def test_ordinary_training_is_the_papers_formula():
    norm, x = BatchChannelNorm2d(8, 4, momentum=0.3).double(), images()[0].repeat(1, 3, 1, 1)[:, :8]
    expected = reference.update_estimates(x, norm.bn.running_mean, norm.bn.running_var, 0.3)
    norm(x)
    torch.testing.assert_close((norm.bn.running_mean, norm.bn.running_var), expected)


def damaged(x):
    """Of channel 3 the update is left out."""
    x = x.clone()
    x[:, 3] = torch.nan
    return x


WIDE = [x.repeat(1, 3, 1, 1)[:, :8] for x in images()]


@pytest.mark.parametrize('at', [0, 1, 5])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('compiled', [False, True])
def test_what_was_left_out_has_no_weight_in_the_average(mode, at, compiled):
    norm, good = (BatchChannelNorm2d(8, 4, momentum='cumulative', mode=mode).double() for _ in 'ab')
    torch._dynamo.reset()
    run = torch.compile(norm, backend='eager') if compiled else norm
    for x in (*WIDE[:at], damaged(WIDE[at]), *WIDE[at:]):
        run(x)
        norm.load_state_dict(copy.deepcopy(norm.state_dict()))  # as evaluation with an EMA does
    for x in WIDE:
        good(x)
    for actual, expected in zip(norm.running_statistics(), good.running_statistics()):
        torch.testing.assert_close(actual[3], expected[3])
    assert norm.counts[1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    torch._dynamo.reset()


def test_an_average_that_was_saved_or_begun_anew_goes_on_as_one():
    first, second = (BatchChannelNorm2d(8, 4, momentum='cumulative').double() for _ in range(2))
    for x in (damaged(WIDE[0]), *WIDE[:4]):
        first(x)
    first.bn.reset_running_stats()
    for x in WIDE[:5]:
        first(x)
    second(damaged(WIDE[0]))
    second.load_state_dict(first.state_dict())
    second = copy.deepcopy(second)
    for x in WIDE[5:]:
        second(x)
    y = torch.cat(WIDE)
    torch.testing.assert_close(second.bn.running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(second.bn.running_var, y.var((0, 2, 3), correction=0))


@pytest.mark.parametrize('at', [1, 5])
def test_loops_that_average_twice_and_in_spite_of_damage(at):
    """What is left out keeps the statistics of the input before: the loop counts that one twice."""
    norm = BatchChannelNorm2d(8, 4).double()
    for inputs in ([x + 40 for x in WIDE[:4]], WIDE):
        norm.momentum = 1.0
        means, variances = [], []
        for x in (*inputs[:at], damaged(inputs[at % 4]), *inputs[at:]):
            norm(x)
            means.append(norm.bn.running_mean.clone())
            variances.append(norm.bn.running_var.clone())
        norm.momentum = 0.01
    for moments in (means, variances):  # of the channel, without the one that was left out
        del moments[at]
    y = torch.cat(WIDE)
    mean, var = torch.stack(means).mean(0)[3], torch.stack(variances).mean(0)[3]
    torch.testing.assert_close(mean, y.mean((0, 2, 3))[3])
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=0)[3])


def test_the_number_1_and_a_tensor_of_1_are_the_same():
    """A schedule 1, 1/2, 1/3 ...; the first rate forgets where the statistics began."""
    numbers, tensors = (BatchChannelNorm2d(8, 4).double() for _ in range(2))
    rate = torch.tensor(1.0)
    for step, x in enumerate(WIDE[:4]):
        numbers.momentum = 1 / (step + 1)
        tensors.momentum = rate.fill_(1 / (step + 1)).clone()
        torch.testing.assert_close(numbers(x), tensors(x), rtol=1e-6, atol=1e-6)
        if step == 0:
            alone = x.var((0, 2, 3), correction=0)
            torch.testing.assert_close(tensors.bn.running_var, alone)
    torch.testing.assert_close(tensors.bn.running_var, numbers.bn.running_var, rtol=1e-6, atol=1e-6)


def test_a_loop_around_compiled_code_gets_the_variances_within_its_inputs():
    torch._dynamo.reset()
    norm = BatchChannelNorm2d(8, 4, momentum=1.0).double()
    run = torch.compile(norm, backend='eager')
    for x in WIDE[:3]:
        run(x)
        torch.testing.assert_close(norm.bn.running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(norm.bn.running_var, x.var((0, 2, 3), correction=0))
    torch._dynamo.reset()
