"""WS convolutions: what they hold and save, training and evaluation; the maths is `reference`'s."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import wsbcn_mm
from tests.layers.doubles import F64, assert_close, rand
from wsbcn_mm import WSConv1d, WSConv2d, WSConv3d, WSConvTranspose2d, backends, reference

FORMULAS = ('paper', 'std_eps', 'var_eps')
CONVS = {
    WSConv1d: nn.Conv1d,
    WSConv2d: nn.Conv2d,
    WSConv3d: nn.Conv3d,
    WSConvTranspose2d: nn.ConvTranspose2d,
}
SPATIAL = {WSConv1d: (11,), WSConv2d: (9, 8), WSConv3d: (5, 6, 4), WSConvTranspose2d: (4, 5)}


def standardized(conv):
    """The weight that must convolve, by the specification."""
    if not conv.transposed:
        return reference.weight_standardize(conv.weight, conv.eps, conv.formula)
    # (C_in, C_out / groups, *k): output channel g * (C_out / groups) + o reads the input channels
    # of group g; one after the other, nothing of the layer's own reshaping.
    w_hat, (per_group, outputs) = (
        conv.weight.clone(),
        (
            conv.in_channels // conv.groups,
            conv.out_channels // conv.groups,
        ),
    )
    for g in range(conv.groups):
        rows = slice(g * per_group, (g + 1) * per_group)
        for o in range(outputs):
            row = reference.weight_standardize(conv.weight[rows, o][None], conv.eps, conv.formula)
            w_hat[rows, o] = row[0]
    return w_hat


def check_conv(conv, x, *args):
    """Output and gradients equal those of torch's own class run with the standardized weight."""
    plain_class = CONVS[type(conv)]
    arguments = dict(
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        **F64,
    )
    if conv.transposed:
        arguments['output_padding'] = conv.output_padding
    plain = plain_class(conv.in_channels, conv.out_channels, conv.kernel_size, **arguments)
    weights = {'weight': standardized(conv)} | ({} if conv.bias is None else {'bias': conv.bias})

    x.requires_grad_()
    expected = torch.func.functional_call(plain, weights, (x, *args))
    wanted, grad_y = [x, *conv.parameters()], rand(*expected.shape)
    expected_grads = torch.autograd.grad(expected, wanted, grad_y)
    y = conv(x, *args)
    assert_close(y, expected)
    for actual, grad in zip(torch.autograd.grad(y, wanted, grad_y), expected_grads, strict=True):
        assert_close(actual, grad)


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(bias=False),
        dict(stride=2, padding=1),
        dict(padding='same', dilation=2),
        dict(padding='valid'),
        dict(groups=2, padding=1, bias=False),
        dict(padding=2, padding_mode='circular'),
        dict(padding=1, padding_mode='reflect', stride=2),
        dict(padding='same', padding_mode='replicate'),
    ],
    ids=str,
)
@pytest.mark.parametrize('conv_class', [WSConv1d, WSConv2d, WSConv3d])
def test_conv_is_torchs_with_the_standardized_weight(conv_class, settings):
    conv = conv_class(4, 6, 3, **settings, **F64)
    check_conv(conv, rand(2, 4, *SPATIAL[conv_class]))


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(stride=2, padding=1, output_padding=1),
        dict(groups=2, bias=False),
        dict(groups=2, stride=(2, 1), dilation=2),
        dict(groups=4),
    ],
    ids=str,
)
@pytest.mark.parametrize('formula', FORMULAS)
def test_transposed_conv_standardizes_per_output_channel(formula, settings):
    conv = WSConvTranspose2d(8, 4, 3, formula=formula, **settings, **F64)
    check_conv(conv, rand(2, 8, 4, 5))


def test_transposed_conv_takes_an_output_size():
    conv = WSConvTranspose2d(4, 4, 3, stride=2, padding=1, **F64)
    x = rand(1, 4, 5, 5)
    assert conv(x, [9, 10]).shape == (1, 4, 9, 10)
    check_conv(conv, x, [9, 10])
    with pytest.raises(ValueError, match='output size'):
        conv(x, [20, 20])


def test_conv2d_against_the_functional_by_hand():
    conv = WSConv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), eps=1e-3, formula='var_eps', **F64)
    x = rand(2, 4, 7, 7)
    w = conv.weight.detach()
    centred = w - w.mean((1, 2, 3), keepdim=True)
    w_hat = centred / (w.var((1, 2, 3), unbiased=True, keepdim=True) + 1e-3).sqrt()
    assert_close(conv(x), F.conv2d(x, w_hat, conv.bias, (2, 1), (1, 0)))


@pytest.mark.parametrize('conv_class', CONVS)
def test_conv_is_the_same_in_training_and_evaluation_and_unbatched(conv_class):
    conv = conv_class(4, 4, 3, **F64)
    x = rand(2, 4, *SPATIAL[conv_class])
    y = conv(x)
    assert torch.equal(conv.eval()(x), y)
    assert_close(conv(x[0]), y[0])


def test_conv_defaults_are_the_papers():
    conv = WSConv2d(4, 4, 3)
    assert (conv.formula, conv.eps) == ('paper', 1e-5)
    assert 'Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1)' in repr(conv)
    assert "eps=1e-05, formula='paper'" in repr(conv)


@pytest.mark.parametrize('conv_class', CONVS)
def test_conv_derives_directly_from_torchs(conv_class):
    """Initialisation and weight-decay rules of hosts look at the direct base classes."""
    assert CONVS[conv_class] in conv_class.__bases__
    assert conv_class.__doc__


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('conv_class', CONVS)
def test_conv_state_dict_is_torchs(conv_class, bias):
    arguments = (4, 6, 3), dict(bias=bias, groups=2)
    ours = conv_class(*arguments[0], **arguments[1])
    plain = CONVS[conv_class](*arguments[0], **arguments[1])
    assert list(ours.state_dict()) == list(plain.state_dict())
    for target, source in ((ours, plain), (plain, ours)):
        nn.init.normal_(source.weight)
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize('conv_class', CONVS)
def test_conv_is_initialised_as_torchs(conv_class):
    torch.manual_seed(3)
    ours = conv_class(4, 6, 3)
    torch.manual_seed(3)
    plain = CONVS[conv_class](4, 6, 3)
    assert torch.equal(ours.weight, plain.weight) and torch.equal(ours.bias, plain.bias)


def test_conv_device_and_dtype():
    conv = WSConv2d(4, 6, 3, device='meta', dtype=torch.bfloat16)
    assert conv.weight.is_meta and conv.weight.dtype == conv.bias.dtype == torch.bfloat16
    assert conv.standardized_weight().dtype == torch.bfloat16
    x = rand(1, 4, 5, 5).to(torch.bfloat16)
    assert WSConv2d(4, 6, 3).to(torch.bfloat16)(x).dtype == torch.bfloat16


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('conv_class', CONVS)
def test_to_plain_gives_the_same_results_without_the_layer(conv_class, bias):
    settings = dict(stride=2, padding=1, groups=2, bias=bias)
    if conv_class is WSConvTranspose2d:
        settings['output_padding'] = 1
    else:
        settings['padding_mode'] = 'circular'
    conv = conv_class(4, 6, 3, formula='std_eps', **settings, **F64).eval()
    plain = conv.to_plain()
    assert type(plain) is CONVS[conv_class]
    assert not plain.training and plain.weight.dtype == torch.float64
    x = rand(2, 4, *SPATIAL[conv_class])
    assert_close(plain(x), conv(x))
    y = plain(x)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.zero_()
    assert torch.equal(plain(x), y)  # copies, shares nothing


@pytest.mark.parametrize('conv_class', CONVS)
def test_conv_survives_deepcopy_and_pickle(conv_class):
    conv = conv_class(4, 6, 3, eps=1e-3, formula='var_eps', **F64)
    x = rand(2, 4, *SPATIAL[conv_class])
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x), conv(x))
        assert other.weight is not conv.weight


@pytest.mark.parametrize('conv_class', [WSConv1d, WSConv2d, WSConv3d])
def test_conv_forward_refuses_a_foreign_weight(conv_class):
    """mmengine's efficient_conv_bn_eval folds a BatchNorm into the raw weight and calls this."""
    conv = conv_class(4, 6, 3, **F64)
    x = rand(2, 4, *SPATIAL[conv_class])
    assert torch.equal(conv._conv_forward(x, conv.weight, conv.bias), conv(x))
    for weight, bias in ((conv.weight * 2, conv.bias), (conv.weight, conv.bias + 1)):
        with pytest.raises(RuntimeError, match=r'a weight that is not its own\n(.*\n)*.*to_plain'):
            conv._conv_forward(x, weight, bias)


def test_torchs_fusion_is_refused():
    """It would fold the BatchNorm into the raw weight; into the plain convolution it is right."""
    conv, bn, x = WSConv2d(4, 6, 3, **F64).eval(), nn.BatchNorm2d(6, **F64).eval(), rand(1, 4, 5, 5)
    nn.init.normal_(bn.running_mean)
    with pytest.raises(RuntimeError, match=r'(?s)fuse_conv_bn_eval cannot.*to_plain'):
        nn.utils.fuse_conv_bn_eval(conv, bn)
    assert_close(nn.utils.fuse_conv_bn_eval(conv.to_plain(), bn)(x), bn(conv(x)))


def test_parametrized_conv_standardizes_the_parametrized_weight():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight + 1

    conv = WSConv2d(4, 6, 3, eps=0.1, **F64)
    x, w_hat = rand(2, 4, 5, 5), reference.weight_standardize(2 * conv.weight + 1, 0.1)
    parametrize.register_parametrization(conv, 'weight', Double())
    assert_close(conv(x), F.conv2d(x, w_hat, conv.bias))
    plain = conv.to_plain()
    assert type(plain) is nn.Conv2d
    assert_close(plain(x), conv(x))


@pytest.mark.parametrize(
    'settings, error, message',
    [
        (dict(formula='ws'), ValueError, 'formula must be one of'),
        (dict(formula=None), ValueError, 'formula must be one of'),
        (dict(eps=-1), ValueError, 'eps must be finite and >= 0'),
        (dict(eps='1e-5'), TypeError, 'eps must be a number'),
        (dict(kernel_size=1, groups=4), ValueError, 'at least 2 weights per output channel'),
        (dict(epsilon=1e-5), TypeError, 'epsilon'),
    ],
)
@pytest.mark.parametrize('conv_class', CONVS)
def test_conv_errors(conv_class, settings, error, message):
    with pytest.raises(error, match=message):
        conv_class(4, 8, **dict(kernel_size=3) | settings)


@pytest.mark.parametrize('layer', [WSConv2d(4, 4, 3), wsbcn_mm.BatchChannelNorm2d(4, 2)])
@pytest.mark.parametrize('name, value', [('eps', None), ('eps', -1), ('formula', 'ws')])
def test_a_setting_is_checked_when_it_is_set(layer, name, value):
    name = 'mode' if name == 'formula' and not hasattr(layer, name) else name
    before = getattr(layer, name)
    with pytest.raises((TypeError, ValueError), match=f'{name} must be'):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


@pytest.mark.parametrize('backend', [None, 'eager'])
@pytest.mark.parametrize('in_scope', [False, True])
def test_pruned_to_a_fan_in_of_one(in_scope, backend):
    layer = WSConv2d(4, 4, 1, bias=False)
    layer.weight.data = layer.weight.data[:, :1]
    block = wsbcn_mm.standardized_once(layer) if in_scope else contextlib.nullcontext()
    with block, backends.use_backend(backend) if backend else contextlib.nullcontext():
        with pytest.raises(ValueError, match='at least 2 weights per output channel'):
            layer(torch.randn(1, 1, 5, 5))


def test_a_layer_pruned_to_a_fan_in_of_one_is_refused_when_it_is_used(backend):
    model = nn.ModuleList(WSConv2d(4, 4, 1, bias=False) for _ in range(3))
    model[1].weight.data = model[1].weight.data[:, :1]
    with wsbcn_mm.standardized_once(model):
        y = model[2](model[0](torch.randn(1, 4, 5, 5)))
    y.sum().backward()


@pytest.mark.parametrize('in_scope', [False, True])
def test_a_class_may_override_the_standardized_weight(in_scope):
    class Halved(WSConv2d):
        def standardized_weight(self):
            return super().standardized_weight() / 2

    layer, x = Halved(4, 4, 3, bias=False), torch.randn(1, 4, 5, 5)
    plain = WSConv2d(4, 4, 3, bias=False)
    plain.load_state_dict(layer.state_dict())
    block = wsbcn_mm.standardized_once(layer) if in_scope else contextlib.nullcontext()
    with block:
        for _ in range(2):
            torch.testing.assert_close(layer(x), plain(x) / 2)
    with pytest.raises(TypeError, match='_conv_forward of a WS convolution'):
        type('Padded', (WSConv2d,), dict(_conv_forward=lambda *_: None))
    mixin = type('Mixin', (), dict(_conv_forward=lambda *_: None))
    with pytest.raises(TypeError, match='_conv_forward of a WS convolution'):
        type('Padded', (mixin, WSConv2d), {})
    with pytest.raises(TypeError, match='_conv_forward of a WS convolution'):
        plain._conv_forward = layer._conv_forward
    torch.testing.assert_close(layer.to_plain()(x), layer(x))


def test_the_standardized_weight_may_be_set_on_a_layer_or_in_a_class(monkeypatch):
    layer, x = WSConv2d(4, 4, 3, bias=False), torch.randn(1, 4, 5, 5)
    own, expected = WSConv2d.standardized_weight, WSConv2d.__call__(layer, x) / 2
    layer.standardized_weight = lambda: own(layer) / 2
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_plain()(x), expected)
    del layer.standardized_weight
    monkeypatch.setattr(WSConv2d, 'standardized_weight', lambda self: own(self) / 2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('kind', [WSConv2d, WSConvTranspose2d])
def test_a_parametrized_weight_is_computed_once(kind):
    class Counts(nn.Module):
        runs = 0

        def forward(self, weight):
            self.runs += 1
            return weight

    layer, counts = kind(3, 4, 3), Counts()
    nn.utils.parametrize.register_parametrization(layer, 'weight', counts)
    counts.runs = 0
    layer(torch.randn(1, 3, 5, 5))
    assert counts.runs == 1


class _PlusFive(nn.Module):
    def forward(self, bias):
        return bias + 5


@pytest.mark.parametrize('in_scope', [False, True])
def test_a_bias_that_somebody_else_computes(in_scope):
    x, layer = torch.randn(1, 4, 5, 5), WSConv2d(4, 4, 3)
    block = wsbcn_mm.standardized_once(layer) if in_scope else contextlib.nullcontext()
    with block:
        before = layer(x)
        parametrize.register_parametrization(layer, 'bias', _PlusFive())
        torch.testing.assert_close(layer(x), before + 5)
        pruned = WSConv2d(4, 4, 3)
        without = pruned(x) - pruned.bias.view(1, -1, 1, 1)
        prune.l1_unstructured(pruned, 'bias', 2)
        torch.testing.assert_close(pruned(x), without + pruned.bias.view(1, -1, 1, 1))
        assert pruned.bias.count_nonzero() == 2
