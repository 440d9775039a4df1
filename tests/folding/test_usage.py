"""How layers are used: several times, from several places, in parts that no run reaches."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.folding.cases import Block, check_fold, left_in, relative, trained
from wsbcn_mm import (
    BatchChannelNorm2d,
    WSConv2d,
    fold,
    folding,
)


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


def test_a_model_that_keeps_tensors_of_its_last_pass():
    """A pruned weight has a graph, and so has a loss that a model keeps."""
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))
    prune.l1_unstructured(model[0], 'weight', 0.5)
    x = torch.randn(2, 4, 9, 9).double()
    trained(model)
    model.losses = [model(x).sum()]
    with pytest.warns(UserWarning, match='0 is not folded: it has hooks'):
        folded = fold(model, x)
    with torch.no_grad():
        assert relative(folded(x), model.eval()(x)) < 1e-12


def test_folding_draws_no_random_numbers():
    model, x = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2)), torch.randn(2, 4, 9, 9)
    state = torch.get_rng_state()
    fold(model, x)
    model[0].to_plain()
    assert torch.equal(torch.get_rng_state(), state)


def test_folding_in_inference_mode():
    model = trained(nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))).eval()
    with torch.inference_mode():
        x = torch.randn(2, 4, 9, 9).double()
        folded = fold(model, x)
        assert relative(folded(x), model(x)) < 1e-12
    assert not folded[0].weight.is_inference()
