"""wsbcn_mm.networks.own_classes: normalisations (convolutions: tests/layers/test_subclasses.py)."""

import pytest
import torch
from torch import nn

from wsbcn_mm.convert import convert_model
from wsbcn_mm.networks.own_classes import normalises_as_its_kind


class WithActivation(nn.BatchNorm2d):
    """As timm's."""

    def __init__(self, width, **kwargs):
        super().__init__(width, **kwargs)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class WithActivationOfGroups(nn.GroupNorm):
    def __init__(self, width):
        super().__init__(2, width)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Masked(nn.BatchNorm2d):
    """As MMPretrain's sparse ones."""

    def forward(self, x):
        return super().forward(x) * (torch.arange(x.shape[-1]) % 2)


class TakesMore(nn.BatchNorm1d):
    def forward(self, x, mask):
        return super().forward(x) * mask


@pytest.mark.parametrize(
    'norm, does',
    [
        (nn.SyncBatchNorm(4), True),
        (WithActivation(4), True),
        (WithActivation(4, affine=False, track_running_stats=False), True),
        (WithActivation(4, device='meta'), True),
        (WithActivationOfGroups(4), True),
        (Masked(4), False),
        (TakesMore(4), False),
    ],
)
def test_what_normalises_as_its_kind(norm, does):
    assert normalises_as_its_kind(norm) is does


def test_what_does_something_else_is_not_replaced():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Masked(4), nn.Conv2d(4, 4, 3), WithActivation(4))
    report = convert_model(model)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is Masked
    assert [c.name for c in report.changed] == ['2', '3']
    assert 'computes something else than the kind' in report.left[1].reason


def test_trying_a_layer_calls_nobodys_hooks():
    class OwnConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    layers = OwnConv(3, 4, 3), WithActivation(4)
    calls = []
    for layer in (*layers, layers[1].act):
        layer.register_forward_hook(lambda *args: calls.append(args))
        layer.register_forward_pre_hook(lambda *args: calls.append(args))
    report = convert_model(nn.Sequential(*layers))
    assert len(report.changed) == 2 and calls == []


def test_hooks_of_a_norm_with_activation_see_what_they_saw():
    """Its outputs and the gradients of these; the place in the state dict is that of the norm."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), WithActivation(8)), torch.randn(2, 3, 6, 6)
    outputs, gradients = [], []
    handles = [
        model[1].register_forward_hook(lambda layer, args, output: outputs.append(output)),
        model[1].register_full_backward_hook(lambda layer, _, given: gradients.append(given[0])),
    ]
    convert_model(model)
    y = model(x)
    y.square().sum().backward()
    assert torch.equal(outputs.pop(), y) and torch.equal(gradients.pop(), 2 * y)
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert outputs == gradients == []
