"""wsbcn_mm.layers.subclasses: WS for convolutions of other libraries, which keep their forward."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wsbcn_mm import WSConv2d, WSConvTranspose2d, fold, reference
from wsbcn_mm.convert import convert_model
from wsbcn_mm.layers import WeightStandardized
from wsbcn_mm.layers.subclasses import standardized_copy
from wsbcn_mm.structure import computes_with_its_weight


class Conv2dSame(nn.Conv2d):
    """Pads as TensorFlow does, in its forward (timm)."""

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StaticSame(nn.Conv2d):
    """Pads by a child, and takes an argument that torch's class does not know (efficientnet)."""

    def __init__(self, *args, image_size=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((1, 1, 1, 1))

    def forward(self, x):
        return self._conv_forward(self.static_padding(x), self.weight, self.bias)


class Conv3DSimple(nn.Conv3d):
    """Only its constructor differs (torchvision)."""

    def __init__(self, in_planes, out_planes):
        super().__init__(in_planes, out_planes, (3, 3, 3), padding=1, bias=False)


class Standardizes(nn.Conv2d):
    """Computes its weight: WS of its own (timm's StdConv2d)."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class IgnoresBias(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


class TakesMore(nn.Conv2d):
    def forward(self, x, offset):
        return super().forward(x + offset)


def maps(conv, size=7):
    return torch.randn(2, conv.in_channels, *[size] * len(conv.kernel_size), dtype=torch.float64)


KINDS = [
    lambda: Conv2dSame(4, 6, 3, stride=2, groups=2),
    lambda: StaticSame(4, 6, 3, image_size=224),
    lambda: Conv3DSimple(4, 6),
    lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, bias=False),
]


@pytest.mark.parametrize('make', KINDS)
def test_the_forward_is_kept_and_the_weight_is_standardized(make):
    conv = make().double()
    layer, x = standardized_copy(conv), maps(conv)
    plain = copy.deepcopy(conv)
    rows = layer.filters(conv.weight)
    expected = reference.weight_standardize(rows)
    filters = layer.filters(layer.standardized_weight())
    torch.testing.assert_close(filters, expected, rtol=1e-12, atol=1e-12)
    plain.weight = nn.Parameter(layer.standardized_weight().detach())
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    # The same parameter under the same name: optimizers and checkpoints do not notice.
    assert layer.weight is conv.weight and list(layer.state_dict()) == list(conv.state_dict())
    assert isinstance(layer, WeightStandardized) and isinstance(layer, type(conv))
    cotangent = torch.randn_like(layer(x))

    def loss(weight):
        return (torch.func.functional_call(layer, {'weight': weight}, (x,)) * cotangent).sum()

    assert torch.autograd.gradcheck(loss, conv.weight.detach().requires_grad_())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to_plain()):
        torch.testing.assert_close(other(x), layer(x), rtol=1e-12, atol=1e-12)
    assert type(layer.to_plain()) is type(conv)


@pytest.mark.parametrize('groups', [1, 2])
def test_it_is_the_ws_convolution_where_there_is_one(groups):
    for plain, ws in ((nn.Conv2d, WSConv2d), (nn.ConvTranspose2d, WSConvTranspose2d)):
        conv = plain(4, 6, 3, groups=groups).double()
        same = ws(4, 6, 3, groups=groups).double()
        same.load_state_dict(conv.state_dict())
        layer, x = standardized_copy(conv), maps(conv)
        torch.testing.assert_close(layer(x), same(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.denominators(), same.denominators())


@pytest.mark.parametrize(
    'kind, does',
    [
        (Conv2dSame, True),
        (StaticSame, True),
        (nn.Conv2d, True),
        (Standardizes, False),
        (IgnoresBias, False),
        (TakesMore, False),
    ],
)
def test_what_computes_with_its_weight(kind, does):
    assert computes_with_its_weight(kind(4, 6, 3)) is does


def test_a_model_of_such_layers_is_converted_trained_and_folded():
    model = nn.Sequential(
        Conv2dSame(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        StaticSame(8, 8, 3),
        nn.BatchNorm2d(8),
        Standardizes(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 8, 2, 2),
        nn.BatchNorm2d(8),
    ).double()
    names, parameters = list(model.state_dict()), list(model.parameters())
    report = convert_model(model)
    assert [c.after for c in report.changed][:4] == [
        'WSConv2dSame',
        'BatchChannelNorm2d',
        'WSStaticSame',
        'BatchChannelNorm2d',
    ]
    assert [(x.name, x.reason) for x in report.left] == [
        ('5', 'Standardizes computes with something else than its weight')
    ]
    assert {n for n in names if n.endswith('.weight')} <= set(model.state_dict())
    assert model[0].weight is parameters[0] and model[3].weight is parameters[4]
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    model.eval()
    with pytest.warns(UserWarning, match='6 is not folded: 5, a Standardizes, computes'):
        folded = fold(model, x)
    assert type(folded[0]) is Conv2dSame and folded[0].bias is not None
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)


def test_a_fan_in_of_one_is_refused():
    with pytest.raises(ValueError, match='at least 2 weights per output channel'):
        standardized_copy(Conv2dSame(4, 4, 1, groups=4))


def test_a_compiled_layer():
    layer = standardized_copy(Conv2dSame(3, 4, 3))
    x = torch.randn(1, 3, 8, 8)
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
