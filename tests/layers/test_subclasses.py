"""wsbcn_mm.layers.subclasses: WS for convolutions of other libraries, which keep their forward."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from wsbcn_mm import WSConv2d, WSConvTranspose2d, compat, fold, reference
from wsbcn_mm.convert import convert_model
from wsbcn_mm.layers import WeightStandardized
from wsbcn_mm.layers.subclasses import standardized_copy
from wsbcn_mm.networks.layer_kinds import is_conv
from wsbcn_mm.networks.own_classes import computes_with_its_weight


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


class Deformable(nn.Module):
    """Not of torch's classes, without a bias, with an argument more (mmcv's DeformConv2d)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, 1
        self.kernel_size, self.stride, self.padding, self.dilation = (3, 3), (1, 1), (1, 1), (1, 1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))

    def forward(self, x, offset):
        return F.conv2d(x + offset.mean(1, keepdim=True), self.weight, None, padding=1)


class Pack(Deformable):
    """Knows its offsets by itself (mmcv's DeformConv2dPack)."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels)
        self.conv_offset = nn.Conv2d(in_channels, 18, 3, padding=1)

    def forward(self, x):
        return super().forward(x, self.conv_offset(x))


def maps(conv, size=7):
    return torch.randn(2, conv.in_channels, *[size] * len(conv.kernel_size), dtype=torch.float64)


KINDS = [
    lambda: Conv2dSame(4, 6, 3, stride=2, groups=2),
    lambda: StaticSame(4, 6, 3, image_size=224),
    lambda: Conv3DSimple(4, 6),
    lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, bias=False),
    lambda: Pack(4, 6),
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


def test_what_a_forward_keeps_on_its_layer_stays():
    class Remembers(nn.Conv2d):
        def forward(self, x):
            self.last, self.padding = x.shape, (1, 1)
            return super().forward(x)

    layer = standardized_copy(Remembers(3, 4, 3))
    assert layer(torch.randn(1, 3, 6, 6)).shape[2:] == (6, 6)
    assert layer.last == (1, 3, 6, 6) and layer.padding == (1, 1)
    assert type(layer.weight) is nn.Parameter


def test_what_a_forward_removes_or_makes_is_so_for_its_layer():
    class SetsUp(nn.Conv2d):
        def forward(self, x):
            if hasattr(self, 'first'):
                del self.first
                self.scale = nn.Parameter(torch.full((4, 1, 1), 3.0))
                self.bias = None
            return super().forward(x) * self.scale

    conv = SetsUp(3, 4, 3)
    conv.first = True
    layer, x = standardized_copy(conv), torch.randn(1, 3, 6, 6)
    for _ in range(2):
        layer(x).sum().backward()
    assert not hasattr(layer, 'first') and layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ['weight', 'scale']
    assert layer.scale.grad is not None and layer.weight is conv.weight


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, w):
        self.runs += 1
        return 2 * w


@pytest.mark.parametrize(
    'change',
    [
        lambda m: prune.random_unstructured(m, 'weight', amount=0),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: nn.utils.parametrize.register_parametrization(m, 'weight', Doubled()),
        lambda m: nn.utils.parametrize.register_parametrization(m, 'bias', Doubled()),
        nn.Module._replicate_for_data_parallel,
    ],
)
def test_a_weight_that_somebody_else_computes(change):
    layer, x = standardized_copy(Conv2dSame(3, 4, 3)).eval(), torch.randn(2, 3, 6, 6)
    parameters = dict(layer.named_parameters())
    layer = change(layer) or layer
    if 'weight' not in dir(layer):  # a replica: torch sets them as attributes
        for name, value in parameters.items():
            setattr(layer, name, value.detach().clone())
    if hasattr(layer, 'parametrizations'):
        (doubled,) = (m for m in layer.modules() if isinstance(m, Doubled))
        doubled.runs = 0
    y = layer(x=x)
    assert not hasattr(layer, 'parametrizations') or doubled.runs == 1
    w_hat = reference.weight_standardize(layer.weight)
    torch.testing.assert_close(y, F.conv2d(F.pad(x, (0, 1, 0, 1)), w_hat, layer.bias))
    torch.testing.assert_close(layer.to_plain()(x), y)


def test_keywords_in_any_order():
    layer, x = standardized_copy(TakesMore(3, 4, 3)), torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer(offset=1, x=x), layer(x, 1))

    class Model(nn.Sequential):
        def forward(self, x):
            return self[0](offset=1, x=x)

    torch.testing.assert_close(torch.fx.symbolic_trace(Model(layer))(x), layer(x, 1))
    with pytest.raises(TypeError, match='missing 2 required positional arguments'):
        layer()
    with pytest.raises(ValueError, match='on the meta device, the input on cpu'):
        layer.to('meta')(offset=None, x=x)


class Masked(nn.Conv2d):
    def forward(self, x):
        self.weight.data *= torch.tensor([1.0, 1.0, 0.0])
        return super().forward(x)


@pytest.mark.parametrize(
    'kind, does',
    [
        (Masked, False),
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


@pytest.mark.parametrize('kind', [Deformable, Pack])
def test_what_holds_all_that_a_convolution_does_is_one(kind):
    assert is_conv(kind(4, 6)) and computes_with_its_weight(kind(4, 6))
    other = kind(4, 6)
    other.kernel_size = (1, 1)  # not that of its weight
    assert not is_conv(other) and not is_conv(nn.Linear(4, 6)) and not is_conv(None)


def test_a_deformable_convolution_is_standardized_and_its_norm_stays():
    model = nn.Sequential(Pack(3, 8), nn.BatchNorm2d(8)).double()
    kept = copy.deepcopy(model)
    assert [x.reason for x in convert_model(kept, deformable=False).left] == [
        'deformable=False',
        'no normalisation follows, by the structure alone',
    ]
    report = convert_model(model)
    assert [c.after for c in report.changed] == ['WSPack', 'BatchChannelNorm2d']
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model(x)
    model.eval()
    with pytest.warns(UserWarning, match='0, a WSPack, is a class of its own that may take no'):
        folded = fold(model, x)
    assert type(folded[0]) is Pack and folded[0].weight is not model[0].weight
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)


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
    # The compiler of old releases makes no objects, and runs these layers as they are.
    compiled = torch.compile(layer, backend='eager', fullgraph=compat.installed() >= (2, 13))
    torch.testing.assert_close(compiled(x), layer(x))
