"""wsbcn_mm.convert: layers are replaced, weights stay, and the report says what and why."""

import copy
import functools
import gc
import itertools

import pytest
import torch
from torch import nn

from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
    batch_channel_norm,
    weight_standardize,
)
from wsbcn_mm.checks import auto_groups
from wsbcn_mm.convert import convert_model


def left(report):
    return {item.name: item.reason for item in report.left}


def test_layers_weights_and_report():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 2, 1))
    nn.init.uniform_(model[1].weight), nn.init.normal_(model[1].bias)
    before = copy.deepcopy(model)
    report = convert_model(model)
    assert type(model[0]) is WSConv2d and type(model[1]) is BatchChannelNorm2d
    assert type(model[3]) is nn.Conv2d
    assert [(c.name, c.before, c.after) for c in report.changed] == [
        ('0', 'Conv2d', 'WSConv2d'),
        ('1', 'BatchNorm2d', 'BatchChannelNorm2d'),
    ]
    assert left(report) == {'3': 'no normalisation follows, by the structure alone'}
    assert '0: Conv2d -> WSConv2d' in str(report)
    # The result, from the old weights and the functions.
    x = torch.randn(2, 3, 9, 9)
    conv = nn.functional.conv2d(x, weight_standardize(before[0].weight), before[0].bias)
    zeros, ones = torch.zeros(64), torch.ones(64)
    normed = batch_channel_norm(
        conv, 32, zeros, ones, before[1].weight, before[1].bias, torch.ones(32), torch.zeros(32)
    )
    torch.testing.assert_close(model.eval()(x), before[3](normed.relu()))


def test_a_second_conversion_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    convert_model(model)
    layers = list(model)
    report = convert_model(model)
    assert report.changed == [] and list(model) == layers
    assert left(report) == {'0': 'is standardized already'}


@pytest.mark.parametrize(
    'conv, norm, classes, shape',
    [
        (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), (WSConv1d, BatchChannelNorm1d), (2, 4, 9)),
        (nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), (WSConv2d, BatchChannelNorm2d), (2, 4, 9, 8)),
        (nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8), (WSConv3d, BatchChannelNorm3d), (1, 4, 5, 5, 5)),
        (
            nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding_mode='reflect', padding=2),
            nn.BatchNorm2d(8),
            (WSConv2d, BatchChannelNorm2d),
            (1, 4, 9, 9),
        ),
        (
            nn.ConvTranspose2d(4, 8, 3, 2, 1, output_padding=1, groups=2),
            nn.GroupNorm(2, 8),
            (WSConvTranspose2d, BatchChannelNorm2d),
            (1, 4, 5, 5),
        ),
        (
            nn.Conv2d(4, 8, 3, bias=False),
            nn.SyncBatchNorm(8),
            (WSConv2d, BatchChannelNorm2d),
            (1, 4, 5, 5),
        ),
    ],
)
def test_every_kind_of_convolution(conv, norm, classes, shape):
    model = nn.Sequential(conv, norm)
    x = torch.randn(shape)
    expected = conv(x).shape
    convert_model(model)
    assert (type(model[0]), type(model[1])) == classes
    assert model(x).shape == expected
    for name in ('stride', 'padding', 'dilation', 'groups', 'padding_mode', 'output_padding'):
        assert getattr(model[0], name) == getattr(conv, name)


def test_parameters_stay_the_same_objects():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8)
    )
    before = {id(p) for p in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_model(model)
    assert before <= {id(p) for p in model.parameters()}
    assert model[1].batch_weight is optimizer.param_groups[0]['params'][2]


def test_group_norm_keeps_its_groups_and_its_scale_per_channel():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8, eps=1e-3))
    old = model[1]
    convert_model(model)
    new = model[1]
    assert (new.num_groups, new.affine, new.eps) == (4, 'channel', 1e-3)
    assert new.weight is old.weight and new.bias is old.bias


def test_norms_alone_are_the_same_function_in_stage_one():
    """Without WS the running statistics still fit, and are kept."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model(torch.randn(4, 3, 9, 9) * 3 + 1)
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    report = convert_model(model, standardize=False)
    assert type(model[0]) is nn.Conv2d and left(report) == {'0': 'standardize=False'}
    assert torch.equal(model[1].bn.running_mean, mean)
    assert torch.equal(model[1].bn.running_var, var)


def test_statistics_of_raw_weights_are_not_kept_for_standardized_ones():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model(torch.randn(4, 3, 9, 9) * 3 + 1)
    convert_model(model)
    assert torch.equal(model[1].bn.running_mean, torch.zeros(8))
    assert torch.equal(model[1].bn.running_var, torch.ones(8))


def test_statistics_start_anew_where_a_convolution_is_standardized_later():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(2, 3, 6, 6)
    convert_model(model, standardize=False)
    model(x)
    assert convert_model(model, standardize=False).changed == []
    assert model[1].bn.num_batches_tracked == 1
    convert_model(model)
    assert model[1].bn.num_batches_tracked == 0 and not model[1].bn.running_mean.any()


@pytest.mark.parametrize(
    'width, groups', [(64, 32), (256, 32), (48, 24), (32, 16), (18, 9), (17, 1), (2, 1), (1, 1)]
)
def test_groups_are_chosen_per_width(width, groups):
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    convert_model(model)
    assert model[1].num_groups == groups == auto_groups(width)
    assert BatchChannelNorm2d(width, 'auto').num_groups == groups


def test_groups_of_ones_own():
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12))
    convert_model(model, num_groups=lambda width: width // 4)
    assert model[1].num_groups == 3
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12))
    with pytest.raises(ValueError, match='(?s)^1: .*divisible by num_groups'):
        convert_model(model, num_groups=5)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is nn.BatchNorm2d


def test_arguments_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3))
    convert_model(model, mode='batch', momentum=0.3, formula='var_eps')
    assert (model[1].mode, model[1].momentum, model[1].eps) == ('batch', 0.3, 1e-3)
    assert model[0].formula == 'var_eps'


def test_mode_dtype_gradients_and_hooks_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(torch.float64).eval()
    model.requires_grad_(False)
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append('conv'))
    convert_model(model)
    assert not model[0].training and not model[1].training and not model[1].bn.training
    assert all(not p.requires_grad for p in model.parameters())
    assert all(
        t.dtype == torch.float64 for t in model.state_dict().values() if t.is_floating_point()
    )
    model(torch.randn(1, 3, 5, 5, dtype=torch.float64))
    assert calls == ['conv']


HOOKS = {
    'forward': lambda m, f: m.register_forward_hook(lambda *a: f()),
    'forward, keywords': lambda m, f: m.register_forward_hook(lambda *a: f(), with_kwargs=True),
    'forward, always': lambda m, f: m.register_forward_hook(lambda *a: f(), always_call=True),
    'before forward': lambda m, f: m.register_forward_pre_hook(lambda *a: f()),
    'before forward, keywords': lambda m, f: m.register_forward_pre_hook(
        lambda m, args, kwargs: f(), with_kwargs=True
    ),
    'backward': lambda m, f: m.register_full_backward_hook(lambda *a: f()),
    'before backward': lambda m, f: m.register_full_backward_pre_hook(lambda *a: f()),
    'before saving': lambda m, f: m.register_state_dict_pre_hook(lambda *a: f()),
    'before loading': lambda m, f: m.register_load_state_dict_pre_hook(lambda *a: f()),
    'after loading': lambda m, f: m.register_load_state_dict_post_hook(lambda *a: f()),
}


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


def test_hooks_of_every_kind_stay_and_can_be_removed():
    cases = []
    for kind, conv, layer in itertools.product(HOOKS, (nn.Conv2d, OwnConv), (0, 1)):
        model, calls = nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8)), []
        handle = HOOKS[kind](model[layer], functools.partial(calls.append, kind))
        convert_model(model)
        cases.append((model, kind, calls, handle))
    gc.collect()  # the old layers

    for model, kind, calls, handle in cases:
        for step in ('with the hook', 'without it'):
            model(torch.randn(1, 3, 5, 5)).sum().backward()
            model.load_state_dict(model.state_dict())
            assert calls == [kind], step
            handle.remove()


def test_shared_layers_stay_shared():
    conv = nn.Conv2d(4, 4, 1)
    model = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(4)) for _ in range(2))
    convert_model(model)
    assert type(model[0][0]) is WSConv2d and model[0][0] is model[1][0]
    assert model[0][1] is not model[1][1]


def test_weights_shared_with_a_convolution_without_a_norm_stay_plain():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    report = convert_model(model)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is BatchChannelNorm2d
    assert 'shares its weight' in left(report)['0']


def test_what_is_left_and_why():
    class Own(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.InstanceNorm2d(8),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.BatchNorm2d(8),
        Own(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.GroupNorm(2, 8),
        nn.ConvTranspose1d(8, 8, 1),
        nn.BatchNorm1d(8),
        nn.LayerNorm(8),
    )
    reasons = left(convert_model(model))
    assert 'stays as it is' in reasons['0'] and 'each sample by itself' in reasons['1']
    assert 'fan-in of 1' in reasons['2'] and type(model[3]) is BatchChannelNorm2d
    assert 'Own computes with something else than its weight' in reasons['4']
    assert 'another parametrization' in reasons['6']
    assert 'no convolution' in reasons['9']
    assert type(model[10]).__name__ == 'WSConvTranspose1d' and '10' not in reasons
    assert type(model[11]) is BatchChannelNorm1d
    assert 'each position by itself' in reasons['12']


def test_batch_norms_that_follow_no_convolution():
    """Pre-activation and pooling: their statistics are those of one image, too."""
    for norm in (nn.BatchNorm2d(8), nn.SyncBatchNorm(8)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), norm)
        report = convert_model(model)
        assert type(model[0]) is nn.Conv2d and type(model[2]) is BatchChannelNorm2d
        assert left(report) == {'0': 'no normalisation follows, by the structure alone'}
        model(torch.randn(1, 3, 9, 9))
    for norm in (nn.BatchNorm1d(8), nn.SyncBatchNorm(8)):  # of vectors
        linear = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(3, 8), norm)
        assert 'no convolution' in left(convert_model(linear))['3']


def test_a_norm_with_an_activation_of_its_own():
    """As timm's BatchNormAct2d."""

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, width):
            super().__init__(width)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8))
    convert_model(model)
    assert type(model[1].norm) is BatchChannelNorm2d and type(model[1].act) is nn.ReLU
    assert model(torch.randn(1, 3, 9, 9)).min() == 0


def test_frozen_batch_norm_of_torchvision():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.eps = 1e-5
            for name, value in (
                ('weight', 2.0),
                ('bias', 0.5),
                ('running_mean', 1.0),
                ('running_var', 4.0),
            ):
                self.register_buffer(name, torch.full((width,), value))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8))
    convert_model(model, standardize=False)
    new = model[1]
    assert torch.equal(new.batch_weight, torch.full((8,), 2.0))
    assert torch.equal(new.batch_bias, torch.full((8,), 0.5))
    assert torch.equal(new.bn.running_var, torch.full((8,), 4.0))


def test_an_example_input_decides():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.z = nn.BatchNorm2d(4)

        def forward(self, x, scale):
            return self.second(self.z(self.first(x)) * scale)

    x = torch.randn(2, 4, 5, 5)
    model = Odd().train()
    convert_model(model, (x, 2.0))
    assert type(model.first) is WSConv2d and type(model.second) is nn.Conv2d
    assert all(m.training for m in model.modules())
    assert torch.equal(model.z.bn.running_mean, torch.zeros(4))


def test_an_output_that_is_a_result_as_well_is_seen():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y, self.bn(y)

    model = Both()
    report = convert_model(model, torch.randn(2, 4, 5, 5))
    assert type(model.conv) is nn.Conv2d and type(model.bn) is BatchChannelNorm2d
    assert 'the result of the run' in report.left[0].reason


def test_training_goes_on():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1)
    )
    convert_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert int(model[1].bn.num_batches_tracked) == 20


@pytest.mark.parametrize('model', [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)])
def test_a_single_layer_cannot_replace_itself(model):
    with pytest.raises(ValueError, match='must hold the layers'):
        convert_model(model)


def test_wrong_arguments():
    with pytest.raises(TypeError, match='model must be a torch.nn.Module'):
        convert_model('resnet50')
    with pytest.raises(ValueError, match='mode'):
        convert_model(nn.Sequential(), mode='micro')
    with pytest.raises(ValueError, match='formula'):
        convert_model(nn.Sequential(), formula='timm')
    with pytest.raises(TypeError, match='before scripting'):
        convert_model(torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))))


class Lists(nn.Module):
    """A ModuleList says nothing about the order in which it is used."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
        )

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_a_run_shows_what_a_module_list_does_not():
    model = Lists()
    assert left(convert_model(copy.deepcopy(model))) == dict.fromkeys(
        ['parts.0', 'parts.2'], 'no normalisation follows, by the structure alone'
    )
    assert convert_model(model, torch.randn(1, 3, 9, 9)).left == []


class Functional(nn.Module):
    """Reads the statistics of a layer itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        n = self.norm
        return nn.functional.batch_norm(
            self.conv(x), n.running_mean, n.running_var, n.weight, n.bias
        )


def test_a_model_that_does_not_run_converted_is_left_as_it_was():
    model = Functional()
    layers, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(ValueError, match='(?s)not converted: AttributeError.*nothing was changed'):
        convert_model(model, x)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in layers.items()}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model(x)


def test_a_norm_that_two_convolutions_share():
    a, b, norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    model = nn.Sequential(a, norm, nn.ReLU(), b, norm)
    assert convert_model(model).left == []
    assert type(model[0]) is type(model[3]) is WSConv2d
    assert type(model[1]) is BatchChannelNorm2d and model[1] is model[4]


class PreNorm(nn.Module):
    """Norms behind an addition, behind a linear layer and over sequences (MetaFormer)."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 1), GroupNorm1(8), GroupNorm1(8)
        self.mlp, self.vectors = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.sequence = nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(input=x)
        return self.vectors(self.mlp(x.mean((2, 3)))), self.sequence(x.flatten(2))


class GroupNorm1(nn.GroupNorm):
    def __init__(self, num_channels):
        super().__init__(1, num_channels)


def test_a_run_shows_the_axes_of_norms_that_no_convolution_precedes():
    model, x = PreNorm().eval(), torch.randn(2, 3, 6, 6)
    kept = left(convert_model(copy.deepcopy(model)))
    assert {'second', 'sequence', 'vectors'} <= kept.keys()
    report = convert_model(model, x)
    assert {c.name: c.after for c in report.changed} == dict(
        first='BatchChannelNorm2d', second='BatchChannelNorm2d', sequence='BatchChannelNorm1d'
    )
    assert left(report)['vectors'].startswith('no convolution was found before it')
    assert model.first.num_groups == 1 and model.first.affine == 'channel'
    vectors, sequence = model.train()(x)
    assert vectors.isfinite().all() and sequence.isfinite().all()
