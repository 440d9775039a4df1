"""What the tests of folding share: models as after a training, and the comparison."""

import copy
import warnings

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
)

CONVS = (WSConv1d, WSConv2d, WSConv3d, WSConvTranspose2d)
OURS = (*CONVS, BatchChannelNorm1d, BatchChannelNorm2d, BatchChannelNorm3d)


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
