"""What must not be folded stays, and is said."""

import copy
import threading
import types

import pytest
import torch
from torch import nn

from tests.folding.cases import Block, check_fold, relative, trained
from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    WSConv2d,
    fold,
    folding,
)


class Wrong(nn.Module):
    """A convolution and a norm between which something happens."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.norm = WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2)
        self.between = between

    def forward(self, x):
        return self.between(self, x)


def also_used_later(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def also_used_before(m, x):
    y = m.conv(x)
    z = y.mean((2, 3), keepdim=True)
    return m.norm(y) * z


def also_returned(m, x):
    y = m.conv(x)
    return m.norm(y), y


class Features(list):
    """A result that torch does not look into."""


def returned_in_a_class_of_its_own(m, x):
    y = m.conv(x)
    return Features([m.norm(y), y])


def kept_by_the_model(m, x):
    m.features = m.conv(x)
    return m.norm(m.features)


def changed_in_place(m, x):
    return m.norm(m.conv(x).relu_())


def sometimes_without(m, x):
    return m.norm(m.conv(x)) + m.conv(x)


def sometimes_with_another_input(m, x):
    return m.norm(m.conv(x)) + m.norm(x.repeat(1, 2, 1, 1)[..., 2:, 2:])


def through_a_view(m, x):
    return m.norm(m.conv(x).flip(3))


def weight_used_elsewhere(m, x):
    return m.norm(m.conv(x)) + m.conv.weight.mean()


@pytest.mark.parametrize(
    'between, reason',
    [
        (also_used_later, 'the output of conv also goes to aten.add'),
        (also_used_before, 'the output of conv also goes to aten.mean'),
        (also_returned, 'the output of conv also goes to the result of the run'),
        (returned_in_a_class_of_its_own, 'the output of conv also goes to the result of the run'),
        (kept_by_the_model, 'the output of conv also goes to the result of the run'),
        (changed_in_place, 'not the output of a convolution'),
        (sometimes_without, 'the output of conv also goes to aten.add'),
        (sometimes_with_another_input, 'not the output of a convolution'),
        (through_a_view, 'not the output of a convolution'),
        (weight_used_elsewhere, 'something else reads its parameters'),
    ],
)
def test_pairs_that_are_none(between, reason):
    model, x = trained(Wrong(between)).eval(), torch.randn(2, 4, 9, 9).double()
    steps = folding.plan(model)
    assert reason in steps.left['norm']
    folded = steps.apply(model)
    assert type(folded.norm) is BatchChannelNorm2d
    with torch.no_grad():
        for got, expected in zip(folded(x), model(x)):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def another_way_if_small(m, x):
    return m.norm(m.conv(x)) if x.shape[-1] > 12 else m.conv(x).relu()


def another_way_if_large(m, x):
    return m.norm(m.conv(x)) if x.shape[-1] < 20 else m.norm(m.conv(x).relu())


@pytest.mark.parametrize('between', [another_way_if_small, another_way_if_large])
def test_a_way_that_other_sizes_take(between):
    model = trained(Wrong(between)).eval()
    small, given, large = (torch.randn(1, 4, size, size).double() for size in (8, 16, 32))
    with pytest.warns(UserWarning, match='norm is not folded: '):
        folded = fold(model, given)
    for x in (small, given, large):
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_model_that_takes_one_size_alone_is_folded():
    head = nn.Flatten(), nn.Linear(8 * 7 * 7, 3)
    x = torch.randn(2, 4, 9, 9).double()
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2), *head)
    check_fold(model, x, inputs=x)
    report = str(folding.plan(trained(model), x))
    assert 'does not run in 0.5 times the size: RuntimeError: mat1 and mat2' in report
    assert 'does not run in 2 times the size: RuntimeError: mat1 and mat2' in report


def test_normalization_in_front_of_a_convolution_is_not_folded():
    """Zero padding comes after the norm: the map would not hold at the border."""
    model = nn.Sequential(
        BatchChannelNorm2d(4, 2),
        nn.ReLU(),
        WSConv2d(4, 8, 3, padding=1),
        BatchChannelNorm2d(8, 2),
        nn.ReLU(),
        WSConv2d(8, 4, 3, padding=1),
    )
    folded = check_fold(model, torch.randn(2, 4, 9, 9).double(), ['0'])
    assert type(folded[0]) is BatchChannelNorm2d
    assert type(folded[3]) is nn.GroupNorm


def test_a_linear_layer_in_front_is_not_a_convolution():
    model = nn.Sequential(nn.Linear(4, 8), BatchChannelNorm1d(8, 2))
    check_fold(model, torch.randn(2, 4).double(), ['1'], inputs=torch.randn(2, 4).double())


def test_layers_with_hooks_are_left():
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    check_fold(model, torch.randn(2, 4, 9, 9).double(), ['1', '0'])
    model[0]._forward_hooks.clear()
    model[1].bn.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    check_fold(model, torch.randn(2, 4, 9, 9).double(), ['1'])


class WithActivation:
    def forward(self, x):
        return super().forward(x).relu()


class WSConvWithActivation(WithActivation, WSConv2d):
    pass


class BCNWithActivation(WithActivation, BatchChannelNorm2d):
    pass


class BatchNormWithActivation(WithActivation, nn.BatchNorm2d):
    pass


class OfTheBatch(nn.BatchNorm2d):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)


@pytest.mark.parametrize(
    'model, left',
    [
        ((WSConvWithActivation(4, 8, 3), BatchChannelNorm2d(8, 2)), ['1', '0']),
        ((WSConv2d(4, 8, 3), BCNWithActivation(8, 2)), ['1']),
        ((WSConv2d(4, 8, 3), BatchNormWithActivation(8)), []),
        ((WSConv2d(4, 8, 3), OfTheBatch(8)), []),
    ],
)
def test_layers_that_do_more_than_their_kind_are_left(model, left):
    check_fold(nn.Sequential(*model), torch.randn(2, 4, 9, 9).double(), left)
    with pytest.raises(TypeError, match='forward pass of its own'):
        WSConvWithActivation(4, 8, 3).to_plain()


@pytest.mark.parametrize('place', [0, 1])
@pytest.mark.parametrize('conv', [WSConv2d, nn.Conv2d])
def test_layers_with_methods_of_their_own_are_left(conv, place):
    model = nn.Sequential(conv(4, 8, 3), BatchChannelNorm2d(8, 2))
    model[place].forward = types.MethodType(_magnitude(type(model[place])), model[place])
    left = ['1', '0'] if conv is WSConv2d and place == 0 else ['1']
    check_fold(model, torch.randn(2, 4, 9, 9).double(), left)


def _magnitude(kind):
    return lambda layer, x: kind.forward(layer, x).abs()


def test_layers_that_an_attribute_refers_to_are_left():
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))
    model.favourites = [model[0]]
    left = folding.plan(model).left
    assert "attribute 'favourites' of a Sequential" in left['0']
    assert 'cannot be replaced' in left['1']


def test_layers_that_something_unseen_runs_are_left():
    """The attribute of a class is looked for nowhere; the copy that is planned with shares it."""

    class Steps(nn.Sequential):
        def forward(self, x):
            for step in self.steps.layers:
                x = step(x)
            return x

    class Unseen(threading.local):
        def __deepcopy__(self, memo):
            new = Unseen()
            new.layers = copy.deepcopy(self.layers, memo)
            return new

    model = Steps(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))
    model.steps = Unseen()
    model.steps.layers = [*model]
    x = torch.randn(2, 4, 9, 9).double()
    check_fold(model, x, ['1', '0'], inputs=x)
    assert 'not only the module tree leads to it' in str(folding.plan(model, x))


class AsksForTheClass(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if isinstance(self[1], BatchChannelNorm2d) else y


class ReadsASetting(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * self[1].bn.num_features


class ReadsStatistics(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * self[1].bn.running_var.mean()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_forward_that_asks_what_a_layer_is(dtype):
    layers = WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2)
    x = torch.randn(2, 4, 9, 9, dtype=dtype)
    with pytest.raises(ValueError, match='computes something else: its results differ by 0.5 of'):
        fold(trained(AsksForTheClass(*layers)).to(dtype), x)
    for how in (dict(inputs=x), dict(run=lambda model: model(x))):
        with pytest.raises(ValueError, match="not folded: AttributeError: 'GroupNorm' object has"):
            fold(trained(ReadsASetting(*layers)).to(dtype), **how)
    check_fold(ReadsStatistics(*layers), x.double(), ['1'], inputs=x.double())


class AsksInFloat32(AsksForTheClass):
    def forward(self, x):
        return super().forward(x.float())


class DrawsAWay(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y.flip(-1) if torch.rand(()) > 0.5 else y


def test_what_can_be_compared():
    """The same random numbers for both; a model's own dtype; nothing where a run is for once."""
    layers = WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2)
    x = torch.randn(2, 4, 9, 9)
    with pytest.raises(ValueError, match='computes something else: its results differ by 0.5 of'):
        fold(AsksInFloat32(*layers), x)
    for seed in range(4):
        torch.manual_seed(seed)
        fold(DrawsAWay(*layers), x)
    for count in (1, 9):
        batches = iter(torch.randn(count, *x.shape))
        fold(nn.Sequential(*layers), run=lambda model, it=batches: model(next(it)))


def test_a_container_that_holds_itself():
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))
    model.cache = {}
    model.cache['itself'] = model.cache
    fold(model, torch.randn(2, 4, 9, 9))


class Chaos(nn.Module):
    def forward(self, x):
        return torch.sin(1e3 * x)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_networks_that_enlarge_rounding_without_bounds_are_folded(dtype):
    steps = [(WSConv2d(8, 8, 1), BatchChannelNorm2d(8, 4), Chaos()) for _ in range(9)]
    model = trained(nn.Sequential(*[layer for step in steps for layer in step])).eval().to(dtype)
    x = torch.randn(2, 8, 4, 4, dtype=dtype)
    assert relative(fold(model, x)(x), model(x)) > 0.1  # and no error


class ComputesItsWeight(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class SameConv(nn.Conv2d):
    """A subclass that is the same convolution, as mmcv's wrapper `Conv`."""


def test_convolutions_of_others_are_tried():
    x = torch.randn(2, 4, 9, 9).double()
    norm = BatchChannelNorm2d(8, 2)
    folded = check_fold(nn.Sequential(SameConv(4, 8, 3), norm), x)
    assert [type(m) for m in folded] == [SameConv, nn.GroupNorm]
    check_fold(nn.Sequential(ComputesItsWeight(4, 8, 3), norm), x, ['1'])


@pytest.mark.parametrize('kind', [WSConv2d, nn.Conv2d])
def test_parametrized_convolutions(kind):
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    conv = kind(4, 8, 3)
    nn.utils.parametrize.register_parametrization(conv, 'weight', Double())
    model = nn.Sequential(conv, BatchChannelNorm2d(8, 2))
    folded = check_fold(model, torch.randn(2, 4, 9, 9).double(), [] if kind is WSConv2d else ['1'])
    if kind is WSConv2d:
        assert type(folded[0]) is nn.Conv2d


def test_errors():
    with pytest.raises(TypeError, match='model must be a torch.nn.Module'):
        fold('model')
    with pytest.raises(ValueError, match='inputs or run, not both'):
        fold(Block(), torch.zeros(1), lambda m: m)
    with pytest.raises(RuntimeError, match='channels'):  # what the model itself says
        fold(Block(), torch.zeros(1, 3, 8, 8))
