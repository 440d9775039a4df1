"""Folding: the same results from plain torch layers, and nothing folded that must not be."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
    fold,
    folding,
)

CONVS = (WSConv1d, WSConv2d, WSConv3d, WSConvTranspose2d)
OURS = (*CONVS, BatchChannelNorm1d, BatchChannelNorm2d, BatchChannelNorm3d)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained(model):
    """Statistics and affines as after a training: far from their initial values."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 2)
            module.running_var.uniform_(0.1, 9)
        if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 1, 0.5)
    return model.double()


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def left_in(model):
    """Layers of this package, in the tree or in an attribute of one of its modules."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__module__.startswith('wsbcn_mm')
        or any(type(v).__module__.startswith('wsbcn_mm') for v in vars(module).values())
    ]


def check_fold(model, x, left=(), **kwargs):
    """Folds; compares in evaluation; the original keeps state and mode. Returns the new model."""
    model = trained(model)
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        folded = fold(model, **kwargs)
    assert [str(w.message).partition(' is not folded: ')[0] for w in caught] == list(left)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in folded.modules())
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        assert relative(folded(x), expected) < 1e-12
    if not left:
        assert left_in(folded) == []
    return folded


# ----------------------------------------------------------------------------------------------
# Every kind of pair

SIZES = {1: (9,), 2: (7, 9), 3: (5, 6, 7)}
KINDS = {
    1: (nn.Conv1d, WSConv1d, BatchChannelNorm1d),
    2: (nn.Conv2d, WSConv2d, BatchChannelNorm2d),
    3: (nn.Conv3d, WSConv3d, BatchChannelNorm3d),
}


@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('ws', [True, False])
@pytest.mark.parametrize('affine', ['group', 'channel', None])
def test_convolution_and_bcn(dims, ws, affine):
    plain, standardized, norm = KINDS[dims]
    x = torch.randn(2, 4, *SIZES[dims]).double() + 1
    kinds = itertools.product((True, False), ('zeros', 'reflect'), (1, 2), ('paper', 'std_eps'))
    for bias, padding_mode, groups, formula in kinds:
        arguments = dict(bias=bias, padding=1, padding_mode=padding_mode, groups=groups)
        if ws:
            conv = standardized(4, 8, 3, formula=formula, eps=1e-3, **arguments)
        else:
            conv = plain(4, 8, 3, **arguments)
        model = nn.Sequential(conv, norm(8, 2, eps=1e-2, affine=affine), nn.ReLU())
        folded = check_fold(model, x)
        assert [type(m) for m in folded] == [plain, nn.GroupNorm, nn.ReLU]
        assert folded[0].padding_mode == padding_mode
        assert (folded[1].weight is None) == (affine is None)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('kind', [nn.ConvTranspose2d, WSConvTranspose2d])
def test_transposed_convolution_and_bcn(kind, groups):
    conv = kind(4, 12, 3, stride=2, padding=1, output_padding=1, groups=groups, dilation=2)
    folded = check_fold(
        nn.Sequential(conv, BatchChannelNorm2d(12, 3)), torch.randn(2, 4, 7, 6).double()
    )
    assert [type(m) for m in folded] == [nn.ConvTranspose2d, nn.GroupNorm]


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_ws_and_batch_norm(norm, affine):
    model = nn.Sequential(WSConv2d(4, 8, 3), norm(8, affine=affine), nn.ReLU())
    folded = check_fold(model, torch.randn(2, 4, 7, 7).double())
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]


def test_ws_and_group_norm_or_nothing():
    model = nn.Sequential(WSConv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), WSConv2d(8, 2, 1))
    norm = model[1]
    folded = check_fold(model, torch.randn(2, 4, 7, 7).double())
    assert [type(m) for m in folded] == [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.Conv2d]
    assert folded[1] is not norm


def test_batch_norm_of_others_is_not_touched():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), WSConv2d(8, 4, 3))
    folded = check_fold(model, torch.randn(2, 4, 7, 7).double())
    assert [type(m) for m in folded] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]


def test_batch_norm_without_statistics_cannot_be_folded():
    model = nn.Sequential(WSConv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).double()
    x = torch.randn(2, 4, 7, 7).double()
    folded = fold(model)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.BatchNorm2d]
    assert relative(folded(x), model.eval()(x)) < 1e-12


@pytest.mark.parametrize('model', [WSConv2d(3, 8, 3), WSConvTranspose2d(3, 8, 3)])
def test_a_single_layer(model):
    folded = check_fold(model, torch.randn(2, 3, 7, 7).double())
    assert type(folded) in (nn.Conv2d, nn.ConvTranspose2d)


def test_batch_mode_folds_its_running_statistics():
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2, mode='batch'))
    check_fold(model, torch.randn(2, 4, 7, 7).double())


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_dtype_and_layout_stay(dtype, bound):
    model = trained(nn.Sequential(WSConv2d(16, 32, 3), BatchChannelNorm2d(32, 4))).eval()
    x = torch.randn(2, 16, 9, 9)
    expected = model(x.double())
    model = model.to(dtype, memory_format=torch.channels_last)
    folded = fold(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert relative(folded(x.to(dtype)).double(), expected) < bound


def test_folding_keeps_what_is_frozen():
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))
    assert all(p.requires_grad for p in fold(model).parameters())
    assert not any(p.requires_grad for p in fold(model.requires_grad_(False)).parameters())


def test_the_result_is_saved_without_this_package():
    model = trained(nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2), WSConv2d(8, 8, 1)))
    file = io.BytesIO()
    torch.save(fold(model), file)
    assert b'wsbcn_mm' not in file.getvalue()
    assert b'wsbcn_mm' not in pickle.dumps(fold(model))


# ----------------------------------------------------------------------------------------------
# How layers are used


class Block(nn.Module):
    """A residual block, norms as attributes, in another order than they are used."""

    def __init__(self):
        super().__init__()
        self.norm2 = BatchChannelNorm2d(8, 2)
        self.norm1 = BatchChannelNorm2d(8, 2)
        self.conv2 = WSConv2d(8, 8, 3, padding=1, bias=False)
        self.conv1 = WSConv2d(4, 8, 3, padding=1, stride=2, bias=False)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True), WSConv2d(4, 8, 1), BatchChannelNorm2d(8, 4)
        )

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.downsample(x)
        return F.relu(y)


def test_pairs_are_found_by_what_runs_not_by_order():
    folded = check_fold(Block(), torch.randn(2, 4, 9, 11).double())
    assert type(folded.norm1) is nn.GroupNorm


class Tower(nn.Module):
    """A head that is shared by the levels of a pyramid, and takes a list of them."""

    def __init__(self, norms=1):
        super().__init__()
        self.conv = WSConv2d(4, 8, 3, padding=1)
        self.norms = nn.ModuleList(BatchChannelNorm2d(8, 2) for _ in range(norms))
        self.block = nn.Sequential(WSConv2d(8, 8, 3), BatchChannelNorm2d(8, 2))

    def forward(self, levels):
        ys = [self.norms[i % len(self.norms)](self.conv(x)) for i, x in enumerate(levels)]
        return torch.cat([self.block(y).flatten(1) for y in ys], 1)


LEVELS = [torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 5, 5).double()]


def test_a_module_used_several_times_is_folded_once():
    check_fold(Tower(), LEVELS, inputs=(LEVELS,))
    check_fold(Tower(), LEVELS, run=lambda model: model(LEVELS))


def test_norms_of_levels_behind_one_convolution_are_left():
    """One convolution, another norm on every level: two different maps on one weight."""
    folded = check_fold(Tower(norms=2), LEVELS, ['norms.0', 'norms.1'], inputs=(LEVELS,))
    assert type(folded.conv) is nn.Conv2d  # its own standardization is the same on every level
    assert type(folded.block[1]) is nn.GroupNorm
    steps = folding.plan(folded, inputs=(LEVELS,))
    assert left_in(steps.apply(folded, plain=True)) == []


class Levels(nn.Module):
    """Modules that share a convolution and have norms of their own, as RetinaSepBN's levels."""

    def __init__(self, conv):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(conv, BatchChannelNorm2d(8, 2), nn.ReLU()) for _ in range(2)
        )

    def forward(self, levels):
        return torch.cat([f(x).flatten(1) for f, x in zip(self.levels, levels)], 1)


@pytest.mark.parametrize('kind', [nn.Conv2d, WSConv2d])
def test_holders_of_a_shared_convolution_get_their_own(kind):
    folded = check_fold(Levels(kind(4, 8, 3)), LEVELS, inputs=(LEVELS,))
    assert folded.levels[0][0] is not folded.levels[1][0]
    assert type(folded.levels[0][0]) is nn.Conv2d


def test_a_shared_convolution_with_an_unseen_holder_is_not_split():
    """Somebody else refers to it, and nobody knows which norm is behind it there."""
    model = Levels(WSConv2d(4, 8, 3))
    model.other = nn.ModuleList([model.levels[0][0]])
    check_fold(model, LEVELS, ['levels.0.1', 'levels.1.1'], inputs=(LEVELS,))


def test_a_holder_that_uses_the_output_otherwise_keeps_its_norm():
    class Both(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y) + y

    model = Levels(WSConv2d(4, 8, 3))
    model.levels[1] = Both(*model.levels[1])
    folded = check_fold(model, LEVELS, ['levels.1.1'], inputs=(LEVELS,))
    assert type(folded.levels[0][1]) is nn.GroupNorm
    assert type(folded.levels[1][0]) is nn.Conv2d


def test_plain_gives_the_same_without_a_layer_of_this_package():
    for affine in ('group', 'channel', None):
        norm = BatchChannelNorm2d(4, 2, eps=0.1, affine=affine)
        model = trained(nn.Sequential(norm, nn.ReLU(), WSConv2d(4, 8, 3)))
        x = torch.randn(2, 4, 6, 6).double()
        with pytest.warns(UserWarning, match='0 is not folded: its input is not the output of a'):
            folded = fold(model, plain=True)
        assert left_in(folded) == []
        assert relative(folded(x), model.eval()(x)) < 1e-12


class Decomposition(nn.Module):
    """As in TOOD: the weight of a convolution is used, the convolution itself is never run."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = WSConv2d(4, 8, 1, bias=False), BatchChannelNorm2d(8, 2)

    def forward(self, x):
        weight = self.conv.weight.flatten(1) * x.mean((0, 2, 3))
        return self.norm(torch.einsum('oi,bihw->bohw', weight, x))


def test_a_weight_that_is_used_without_its_convolution():
    x = torch.randn(2, 4, 5, 5).double()
    model = trained(Decomposition()).eval()
    check_fold(model, x, ['norm', 'conv'], inputs=x)
    steps = folding.plan(model, inputs=x)
    assert steps.left['conv'].startswith('no run calls it')
    folded = steps.apply(model, plain=True)
    assert left_in(folded) == [] and type(folded.conv) is nn.Conv2d
    assert torch.equal(folded.conv.weight, model.conv.weight)  # not the standardized one
    assert relative(folded(x), model(x)) < 1e-12


def test_plain_replaces_nothing_that_others_refer_to():
    """Whoever holds the norm, or reads its scale, would go on with another one."""
    x = torch.randn(2, 4, 5, 5).double()
    for change in (
        lambda m: setattr(m, 'also', [m.norm]),
        lambda m: m.norm.register_forward_hook(lambda *a: None),
    ):
        model = trained(Decomposition()).eval()
        change(model)
        steps = folding.plan(model, inputs=x)
        assert 'norm' in steps.fixed and 'conv' not in steps.fixed
        folded = steps.apply(model, plain=True)
        assert type(folded.norm) is BatchChannelNorm2d and type(folded.conv) is nn.Conv2d


def test_without_inputs_a_model_is_confirmed_part_by_part():
    """The tower takes a list: only its parts run on one tensor. What joins them is not seen."""
    steps = folding.plan(Tower())
    assert folding.Fold(('block.0',), 'block.1') in steps.folds
    assert folding.Fold(('conv',), None) in steps.folds
    assert list(steps.left) == ['norms.0']
    assert 'no run reached it' in steps.left['norms.0']


def test_parts_that_the_run_does_not_reach_are_confirmed_on_their_own():
    class WithAuxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = Block(), Block()

        def forward(self, x):
            return self.main(x)

    x = torch.randn(2, 4, 9, 9).double()
    folded = check_fold(WithAuxiliary(), x, inputs=x)
    assert type(folded.auxiliary.norm2) is nn.GroupNorm


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = WSConv2d(4, 8, 3), WSConv2d(4, 8, 3)
        self.norm = BatchChannelNorm2d(8, 2)

    def forward(self, x):
        return self.norm(self.a(x)) - self.norm(self.b(x))


def test_one_norm_behind_two_convolutions_goes_into_both():
    model = SharedNorm()
    check_fold(model, torch.randn(2, 4, 9, 9).double())
    assert folding.plan(model).folds == (folding.Fold(('a', 'b'), 'norm'),)


def test_a_module_with_two_names_stays_one():
    model = nn.Module()
    model.first = nn.Sequential(WSConv2d(4, 4, 3, padding=1), BatchChannelNorm2d(4, 2))
    model.second = model.first
    model.forward = lambda x: model.second(model.first(x))
    folded = fold(model.double())
    assert folded.first is folded.second
    assert left_in(folded) == []
    net = nn.Sequential(model.first, nn.ReLU(), model.first)
    check_fold(net, torch.randn(2, 4, 9, 9).double())


# ----------------------------------------------------------------------------------------------
# What must not be folded


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


def test_layers_that_an_attribute_refers_to_are_left():
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))
    model.favourites = [model[0]]
    left = folding.plan(model).left
    assert "attribute 'favourites' of a Sequential" in left['0']
    assert 'cannot be replaced' in left['1']


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
