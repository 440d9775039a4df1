"""wsbcn_mm.recalibration: the running statistics are those of what evaluation feeds the layers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.ranks import in_two_ranks
from wsbcn_mm import BatchChannelNorm1d, BatchChannelNorm2d, WSConv2d
from wsbcn_mm.recalibration import recalibrate, set_statistics

CHANNELS = 8


class Net(nn.Module):
    """Blocks of WS convolution, BCN, ReLU; statistics that fit nothing, as after a conversion."""

    def __init__(self, depth=4, seed=0, mode='estimate'):
        super().__init__()
        torch.manual_seed(seed)
        self.convs = nn.ModuleList(
            WSConv2d(3 if i == 0 else CHANNELS, CHANNELS, 3, padding=1) for i in range(depth)
        )
        self.norms = nn.ModuleList(BatchChannelNorm2d(CHANNELS, 2, mode=mode) for _ in range(depth))
        for norm in self.norms:
            nn.init.normal_(norm.batch_weight)
            nn.init.normal_(norm.batch_bias)
            nn.init.normal_(norm.bn.running_mean)
            nn.init.uniform_(norm.bn.running_var, 0.1, 5)
        self.double()

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x)).relu()
        return x


def images(count=12, batch=1, seed=1):
    """Each image with its own size, light and contrast."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, 3, 5 + i % 3, 6, generator=g, dtype=torch.float64) * (1 + i % 4) + i % 5
        for i in range(count)
    ]


def statistics_of(xs):
    """Mean and biased variance per channel, every sample with the same weight."""
    samples = [sample.flatten(1) for x in xs for sample in x]
    mean = torch.stack([s.mean(1) for s in samples]).mean(0)
    var = torch.stack([(s - mean[:, None]).square().mean(1) for s in samples]).mean(0)
    return mean, var


def layer_by_layer(net, batches):
    """The oracle: one layer after the other, each from inputs made with final statistics."""
    net.eval()
    xs = batches
    with torch.no_grad():
        for conv, norm in zip(net.convs, net.norms):
            xs = [conv(x) for x in xs]
            mean, var = statistics_of(xs)
            norm.bn.running_mean.copy_(mean)
            norm.bn.running_var.copy_(var)
            xs = [norm(x).relu() for x in xs]
    return buffers(net)


def buffers(net):
    return {name: value.clone() for name, value in net.named_buffers()}


def assert_equal(found, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **tolerance, msg=lambda text, name=name: f'{name}: {text}'
        )


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_every_layer_gets_the_statistics_of_what_it_gets_in_evaluation(mode, backend):
    """A deep net with statistics that fit nothing: the result of layer after layer, exactly."""
    batches = [*images(), torch.cat(images(3, seed=5)[:1] * 2)]
    expected = layer_by_layer(Net(mode=mode), batches)
    net = Net(mode=mode)
    done = recalibrate(net, batches, passes=6, tolerance=0)
    assert_equal(buffers(net), expected, rtol=1e-9, atol=1e-9)
    assert done.passes == 6 or done.drift == 0
    assert done.drift < 1e-9
    assert done.samples == {f'norms.{i}': 14 for i in range(4)}
    assert done.unreached == []


def test_few_passes_are_near_in_a_deep_net():
    """From statistics that fit nothing, 24 layers deep, where errors grow from layer to layer."""
    batches = images(40)
    expected = layer_by_layer(Net(24), batches)
    net = Net(24)
    done = recalibrate(net, batches, passes=6)
    assert done.passes < 6
    assert done.drift <= 0.01
    found = buffers(net)
    for i in range(24):
        mean, var = (expected[f'norms.{i}.bn.running_{kind}'] for kind in ('mean', 'var'))
        assert ((found[f'norms.{i}.bn.running_mean'] - mean).abs() < 0.01 * var.sqrt()).all()
        assert ((found[f'norms.{i}.bn.running_var'] - var).abs() < 0.01 * var).all()


def test_passes_of_different_length():
    """A loader that drops images the second time: what is gone does not count."""

    class Shrinking(list):
        def __iter__(self):
            yield from list(super().__iter__())[: 5 if self.pop is None else 3]
            self.pop = 0

    batches = Shrinking(images(5))
    batches.pop = None
    net = Net(2)
    done = recalibrate(net, batches, passes=5, tolerance=0)
    assert done.samples == {'norms.0': 3, 'norms.1': 3}
    assert_equal(buffers(net), layer_by_layer(Net(2), images(5)[:3]), rtol=1e-9, atol=1e-9)


def test_it_stops_where_nothing_changes():
    net, batches = Net(2), images(5)
    recalibrate(net, batches, passes=5, tolerance=0)
    settled = buffers(net)
    done = recalibrate(net, batches, passes=50, tolerance=1e-6)
    assert done.passes == 3  # the second makes both layers exact, the third sees it
    assert_equal(buffers(net), settled, rtol=1e-9, atol=1e-9)


def test_a_single_pass_averages_as_it_goes():
    """The first layer is exact at once; the others follow it during the pass."""
    net, batches = Net(2), images(5)
    expected = layer_by_layer(Net(2), batches)
    done = recalibrate(net, batches, passes=1)
    assert (done.passes, done.drift) == (1, None)
    found = buffers(net)
    first = {name: value for name, value in expected.items() if name.startswith('norms.0')}
    assert_equal(found, first, rtol=1e-9, atol=1e-9)


def test_nothing_else_changes():
    net = Net(2)
    net.norms[1].eval()  # a mix of modes, as norm_eval leaves it
    net.norms[0].bn.num_batches_tracked.fill_(7)
    parameters = [p.clone() for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    recalibrate(net, images(3))
    assert [m.training for m in net.modules()] == modes
    for before, after in zip(parameters, net.parameters()):
        assert torch.equal(before, after)
    assert net.norms[0].bn.num_batches_tracked == 7
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_layers_can_be_chosen():
    net = Net(2)
    before = buffers(net)
    done = recalibrate(net, images(3), layers=[net.norms[1]])
    found = buffers(net)
    assert list(done.samples) == ['norms.1']
    assert torch.equal(found['norms.0.bn.running_mean'], before['norms.0.bn.running_mean'])
    assert not torch.equal(found['norms.1.bn.running_mean'], before['norms.1.bn.running_mean'])


def test_a_layer_used_twice_averages_both_uses_and_an_unused_one_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.idle = BatchChannelNorm1d(4, 2), BatchChannelNorm1d(4, 2)

        def forward(self, xs):
            return [self.norm(x) for x in xs]

    net = Twice()
    a, b, empty = torch.randn(3, 4, 5) + 2, torch.randn(1, 4, 7), torch.randn(0, 4, 5)
    done = recalibrate(net, [(a, b), (empty, a)])
    mean, var = statistics_of([a, b, a])
    torch.testing.assert_close(net.norm.bn.running_mean, mean)
    torch.testing.assert_close(net.norm.bn.running_var, var)
    assert (done.samples, done.unreached) == ({'norm': 7}, ['idle'])
    assert torch.equal(net.idle.bn.running_var, torch.ones(4))


def test_far_from_zero_and_half_precision():
    norm = BatchChannelNorm2d(4, 2)
    x = torch.randn(6, 4, 9, 9, dtype=torch.float64) + 1e4
    recalibrate(norm, [part.float() for part in x.split(2)])
    mean, var = statistics_of([x.float().double()])
    torch.testing.assert_close(norm.bn.running_mean.double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(norm.bn.running_var.double(), var, rtol=1e-4, atol=0)
    x = torch.randn(2, 4, 5, 5).bfloat16()
    recalibrate(norm, [x])
    torch.testing.assert_close(norm.bn.running_mean, statistics_of([x.float()])[0])


def test_a_forward_function_of_the_users():
    net = Net(1)
    recalibrate(net, [dict(image=x) for x in images(3)], forward=lambda b: net(b['image']))
    assert_equal(buffers(net), layer_by_layer(Net(1), images(3)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('how', ['by name', 'compiled before', 'compiled now'])
def test_every_way_to_call_a_layer_is_seen(how):
    net, expected = Net(1).eval(), layer_by_layer(Net(1), images(3))
    compiled = torch.compile(net, backend='eager')
    if how == 'compiled before':
        with torch.no_grad():
            compiled(images(1)[0])
    by_name = dict(forward=lambda x: net.norms[0](input=net.convs[0](input=x)))
    recalibrate(net, images(3), **(by_name if how == 'by name' else dict(forward=compiled)))
    assert_equal(buffers(net), expected, rtol=1e-9, atol=1e-9)
    compiled(images(1)[0] + 9)  # nothing of it is left in compiled code
    assert_equal(buffers(net), expected, rtol=1e-9, atol=1e-9)


def test_values_that_are_not_finite_are_named_and_nothing_is_written():
    net, batches = Net(2), images(3)
    with torch.no_grad():
        net.convs[1].bias[0] = torch.inf
    before = buffers(net)
    with pytest.raises(ValueError, match='norms.1 got values that are not finite'):
        recalibrate(net, batches)
    assert_equal(buffers(net), before, rtol=0, atol=0)
    assert net.training


def test_an_error_of_the_model_leaves_the_statistics():
    net = Net(2)
    before = buffers(net)
    with pytest.raises(RuntimeError):
        recalibrate(net, [*images(2), torch.zeros(1, 9, 5, 5, dtype=torch.float64)])
    assert_equal(buffers(net), before, rtol=0, atol=0)


def test_bad_arguments():
    net = Net(1)
    with pytest.raises(TypeError, match='several times'):
        recalibrate(net, iter(images(2)))
    with pytest.raises(ValueError, match='no images'):
        recalibrate(net, [])
    with pytest.raises(ValueError, match='no BatchChannelNorm layer'):
        recalibrate(nn.Conv2d(3, 3, 1), images(1))
    for passes in (0, 1.5, True):
        with pytest.raises(ValueError, match='passes'):
            recalibrate(net, images(1), passes=passes)
    with pytest.raises(ValueError, match='tolerance'):
        recalibrate(net, images(1), tolerance=-1)


def unequal_shares(rank):
    torch.distributed.init_process_group('gloo')
    batches, found = images(7), {}
    for name, share in dict(
        uneven=batches[:5] if rank == 0 else batches[5:], empty=batches if rank == 1 else []
    ).items():
        net = Net(3)
        done = recalibrate(net, share, passes=5, tolerance=0)
        found[name] = done, buffers(net)
    return found


def test_two_ranks_with_unequal_shares_equal_one_process():
    ranks = in_two_ranks(unequal_shares)
    net = Net(3)
    recalibrate(net, images(7), passes=5, tolerance=0)
    for name in ('uneven', 'empty'):
        (done, first), (_, second) = (rank[name] for rank in ranks)
        assert_equal(first, second, rtol=0, atol=0)
        assert_equal(first, buffers(net), rtol=1e-9, atol=1e-9)
        assert done.samples == {f'norms.{i}': 7 for i in range(3)}


# ---- statistics that change without the function ------------------------------------------------


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_keep_function_changes_the_statistics_alone(mode):
    """Stage 1 stays the affine map that it was, so that nothing behind it changes."""
    net, batches = Net(depth=3, mode=mode).eval(), images()
    expected = [net(x) for x in batches]
    done = recalibrate(net, batches, keep_function=True, passes=3)
    assert done.passes == 2 and done.drift < 1e-9  # what a layer gets never changed
    for got, old in zip((net(x) for x in batches), expected):
        torch.testing.assert_close(got, old, rtol=1e-11, atol=1e-11)
    # The statistics are those of what the layers get.
    x = [net.convs[0](image) for image in batches]
    mean = torch.stack([z.mean((0, 2, 3)) for z in x]).mean(0)
    var = torch.stack([(z - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3)) for z in x]).mean(0)
    torch.testing.assert_close(net.norms[0].bn.running_mean, mean)
    torch.testing.assert_close(net.norms[0].bn.running_var, var)
    assert net.norms[0].bn.num_batches_tracked == len(batches)

    # The same layers, without: another function.
    other = Net(depth=3, mode=mode).eval()
    recalibrate(other, batches, passes=2)
    assert (other(batches[0]) - expected[0]).abs().max() > 1e-2
    assert other.norms[0].bn.num_batches_tracked == 0


def test_set_statistics_keeps_extreme_channels():
    """A constant channel (variance 0) and a scale of 0 stay what they are."""
    layer = BatchChannelNorm2d(CHANNELS, 2).double().eval()
    with torch.no_grad():
        layer.batch_weight[0] = 0
        layer.bn.running_var[1] = 0
        x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64)
        before = layer(x)
        var = torch.rand(CHANNELS, dtype=torch.float64)
        var[2] = 0
        set_statistics(layer, torch.randn(CHANNELS, dtype=torch.float64), var, keep_function=True)
        torch.testing.assert_close(layer(x), before, rtol=1e-11, atol=1e-11)
    assert layer.bn.running_var[2] == 0 and layer.batch_weight[0] == 0


def test_keep_function_needs_scales_of_the_layers_own():
    net = Net()
    net.norms[2].batch_bias = net.norms[1].batch_bias
    with pytest.raises(ValueError, match='norms.2 and norms.1 share their batch_bias'):
        recalibrate(net, images(), keep_function=True)
    prune.l1_unstructured(net.norms[0], 'batch_weight', 0.25)
    with pytest.raises(ValueError, match='norms.0.batch_weight is pruned or parametrized'):
        recalibrate(net, images(), keep_function=True)


def test_what_the_channel_stage_gets_is_measured():
    class Shifted(BatchChannelNorm2d):
        def forward(self, x):
            return super().forward(x + 5)

    norm, x = Shifted(CHANNELS, 2), torch.randn(2, CHANNELS, 4, 4)
    norm.bn.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    recalibrate(norm, [x])
    torch.testing.assert_close(norm.bn.running_mean, 2 * x.mean((0, 2, 3)) + 10)


def test_statistics_that_a_buffer_cannot_hold_are_refused():
    norm, x = BatchChannelNorm2d(CHANNELS, 2).half(), torch.randn(2, CHANNELS, 4, 4).half() * 400
    with pytest.raises(ValueError, match=r'a buffer of torch\.float16 cannot hold'):
        recalibrate(norm, [x])
    assert norm.bn.running_var.eq(1).all()


def test_a_frozen_batch_norm_in_the_place_of_the_child():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('running_mean', torch.zeros(CHANNELS))
            self.register_buffer('running_var', torch.ones(CHANNELS))

    norm, x = BatchChannelNorm2d(CHANNELS, 2), torch.randn(2, CHANNELS, 4, 4)
    norm.bn, expected = Frozen(), norm.eval()(x)
    recalibrate(norm, [x], keep_function=True)
    torch.testing.assert_close(norm(x), expected)


def test_a_failure_gives_stage_1_back():
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    broken = [*images(), torch.full((1, 3, 5, 6), float('nan'), dtype=torch.float64)]
    with pytest.raises(ValueError, match='not finite'):
        recalibrate(net, broken, keep_function=True)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
