"""wsbcn_mm.networks.handover: what a converted layer takes over, and what nothing can replace."""

import re
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from wsbcn_mm import BatchChannelNorm2d
from wsbcn_mm.convert import convert_model


def left(report):
    return {item.name: item.reason for item in report.left}


def with_method(layer, name, method):
    setattr(layer, name, types.MethodType(method, layer))
    return layer


def circular(conv, x, weight, bias):
    return F.conv2d(F.pad(x, (1, 1, 1, 1), 'circular'), weight, bias)


class HasEps(nn.Conv2d):
    eps = 1.0

    def __init__(self, *args):
        super().__init__(*args)
        self.eps = 2.0

    def forward(self, x):
        return super().forward(x / self.eps)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    'conv, reason',
    [
        (lambda c: prune.l1_unstructured(c, 'weight', 0.5), 'its weight is computed .* or pruned'),
        (lambda c: prune.l1_unstructured(c, 'bias', 0.5), 'its bias is computed'),
        (lambda c: with_method(c, '_conv_forward', circular), 'its _conv_forward was set on it'),
        (lambda c: HasEps(3, 8, 3), "an attribute 'eps' of its own"),
    ],
)
def test_convolutions_that_a_new_one_could_not_replace(conv, reason):
    model, x = nn.Sequential(conv(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)), torch.randn(2, 3, 6, 6)
    before = model[0](x)
    assert re.search(reason, left(convert_model(model))['0'])
    assert type(model[1]) is BatchChannelNorm2d and torch.equal(model[0](x), before)


@pytest.mark.parametrize(
    'norm, reason',
    [
        (lambda n: prune.l1_unstructured(n, 'weight', 0.5), 'its weight is computed'),
        (
            lambda n: with_method(n, 'forward', lambda n, x: nn.BatchNorm2d.forward(n, x).relu()),
            'its forward was set on it',
        ),
        (lambda n: with_method(n.eval(), 'train', lambda n, mode=True: n), 'its train was set'),
    ],
)
def test_norms_that_a_new_one_could_not_replace(norm, reason):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), norm(nn.BatchNorm2d(8))), torch.randn(2, 3, 6, 6)
    before = model(x)
    report = convert_model(model)
    assert reason in left(report)['1'] and not report.changed
    torch.testing.assert_close(model(x), before)


def test_what_hooks_of_others_read_stays_with_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[0].register_buffer('mask', torch.ones(8, 3, 3, 3), persistent=False)
    model[0].is_stem, model[1].level = True, 2
    model[0].extra, model[1].part = nn.Parameter(torch.ones(1)), nn.Linear(2, 2)
    model[0].register_forward_pre_hook(lambda layer, args: layer.weight.data.mul_(layer.mask))
    keys = model.state_dict().keys()
    convert_model(model)
    model(torch.randn(2, 3, 6, 6))
    assert {'0.extra', '1.part.weight'} <= model.state_dict().keys()
    assert model[0].is_stem and model[1].level == 2 and dict(model[0].named_buffers())
    assert {'0.weight', '0.bias'} <= model.state_dict().keys() and '0.mask' not in keys


def test_what_is_kept_beside_the_tree_stays_beside_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8))
    vars(model[0])['teacher'], vars(model[1])['owner'] = nn.Linear(2, 2), model
    model[0].after, model[1].process_group = (model[1],), object()
    convert_model(model)
    assert model[0].after == (model[1],) and model[1].owner is model
    assert not any('teacher' in name for name in model.state_dict())
    assert not hasattr(model[1], 'process_group')


class WithoutBias(nn.BatchNorm2d):
    def __init__(self, width):
        super().__init__(width)
        del self.bias
        self.bias = None


def test_a_norm_without_a_bias_is_not_pruned():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), WithoutBias(8))
    assert [line.after for line in convert_model(model).changed] == [
        'WSConv2d',
        'BatchChannelNorm2d',
    ]


def test_a_norm_without_any_tensor_is_like_its_convolution():
    norm = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 8, 3).double(), norm)
    convert_model(model)
    assert model[2].batch_weight.dtype == torch.float64


def test_parts_of_torch_script_are_left():
    part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model = nn.Sequential(part, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    report = convert_model(model, torch.randn(1, 3, 8, 8))
    assert left(report) == {'0': 'TorchScript: its layers are fixed'}
    assert [line.name for line in report.changed] == ['1', '2']


@pytest.mark.parametrize('fails', [False, True])
def test_hooks_are_given_the_layer_that_is_there(fails):
    """The new one, and the old one where the conversion fails."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), OwnConv(8, 7, 1))
    model.append(nn.BatchNorm2d(7))
    given = []
    for layer in model:
        layer.register_load_state_dict_pre_hook(lambda layer, *args: given.append(layer))
    if fails:
        with pytest.raises(ValueError, match='3: num_channels must be'):
            convert_model(model, num_groups=4)
    else:
        assert len(convert_model(model).changed) == 4
    model.load_state_dict(model.state_dict())
    assert given == [*model]
