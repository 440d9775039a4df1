"""wsbcn_mm.structure: which norm follows which convolution."""

import torch
from torch import nn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.networks.watching import trace
from wsbcn_mm.structure import followers


def pairs(model, run=None):
    return {f.names[0]: (f.norms, f.normalised) for f in followers(model, run)}


class Block(nn.Module):
    """Residual, its layers registered in the order of their names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.head(x + y)


class PreActivation(nn.Module):
    """The norm of the same name comes before the convolution."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class Lists(nn.Module):
    """As in Res2Net: two lists side by side."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x):
        for conv, bn in zip(self.convs, self.bns):
            x = bn(conv(x))
        return x


class Skip(nn.Module):
    """The convolution's output is normalised, and used without the norm as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Functional(nn.Module):
    """Names and order tell nothing; only a run does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.z = nn.BatchNorm2d(4)
        self.other = nn.ReLU()

    def forward(self, x):
        return self.b(self.z(self.a(x)))


def test_by_name():
    assert pairs(Block()) == {
        'conv1': (['bn1'], True),
        'conv2': (['bn2'], True),
        'head': ([], False),
    }


def test_pre_activation_is_not_taken_for_conv_and_norm():
    assert pairs(PreActivation()) == {'conv1': (['bn2'], True), 'conv2': ([], False)}


def test_blocks_that_normalise_first():
    """A norm with a number begins a step (MMAction2's UniFormer); timm numbers norms alone."""
    block = nn.Module()
    block.pos_embed, block.norm1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    block.attn, block.norm2 = nn.Conv2d(4, 4, 5), nn.BatchNorm2d(4)
    assert [normalised for _, normalised in pairs(block).values()] == [False, False]
    block = nn.Module()
    block.norm1, block.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    block.conv2, block.attn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 5)
    block.norm2 = nn.BatchNorm2d(4)
    assert [normalised for _, normalised in pairs(block).values()] == [False] * 3
    block = nn.Module()
    block.conv_pw, block.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    block.proj, block.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    assert pairs(block) == {'conv_pw': (['bn1'], True), 'proj': (['norm'], True)}


def test_lists_side_by_side():
    assert pairs(Lists()) == {'convs.0': (['bns.0'], True), 'convs.1': (['bns.1'], True)}


def test_nested_sequentials_and_identity():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity()),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
    )
    assert pairs(model) == {'0.0': (['1'], True), '2.0': ([], False)}


def test_a_norm_of_another_width_does_not_follow():
    assert pairs(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(8)))['0'] == ([], False)


def test_a_convolution_that_is_shared_between_norms():
    conv = nn.Conv2d(4, 4, 1)
    levels = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(4)) for _ in range(2))
    (follower,) = followers(levels)
    assert follower.names == ['0.0', '1.0'] and follower.norms == ['0.1', '1.1']
    assert follower.normalised
    levels.append(nn.Sequential(conv))
    assert not followers(levels)[0].normalised


def test_ours_count():
    model = nn.Sequential(WSConv2d(3, 4, 3), BatchChannelNorm2d(4, 2))
    assert pairs(model) == {'0': (['1'], True)}


def test_a_run_overrules_the_structure():
    model, x = Functional(), torch.randn(1, 4, 5, 5)
    assert pairs(model) == {'a': ([], False), 'b': (['z'], True)}  # registered so
    found = pairs(model, lambda: model(x))
    assert found == {'a': (['z'], True), 'b': ([], False)}


def test_a_run_sees_what_else_reads_an_output():
    model, x = Skip(), torch.randn(1, 4, 5, 5)
    assert pairs(model)['conv'] == (['norm'], True)
    (follower,) = followers(model, lambda: model(x))
    assert follower.norms == ['norm'] and follower.unnormalised == ['add']


def test_a_run_leaves_nothing_behind():
    model, x = Block(), torch.randn(1, 4, 5, 5)
    trace(model, lambda: model(x))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_convolutions_that_did_not_run_keep_what_the_structure_says():
    model = nn.ModuleDict(dict(used=Block(), unused=Block()))
    x = torch.randn(1, 4, 5, 5)
    found = pairs(model, lambda: model['used'](x))
    assert found['unused.conv1'] == (['unused.bn1'], True)
