"""A small backbone of the host, and what the tests of traps ask of it."""

import pytest
import torch
from mmdet.models.backbones import ResNet

from wsbcn_mm import BatchChannelNorm2d

BCN = dict(type='BCN', num_groups=2)
WS = dict(type='WSConv2d')
MODES = pytest.mark.parametrize('mode', ['estimate', 'batch'])


def resnet(norm_cfg=BCN, conv_cfg=WS, stages=1, **kwargs):
    """A real mmdet ResNet with bottlenecks, narrow and short."""
    arguments = dict(
        depth=50,
        base_channels=8,
        num_stages=stages,
        strides=(1, 2)[:stages],
        dilations=(1, 1)[:stages],
        out_indices=(stages - 1,),
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        norm_eval=False,
    )
    model = ResNet(**{**arguments, **kwargs})
    model.train()  # answers None
    return model


def image(n=2, size=32, channels=3):
    """Off-centre: zero means would hide wrong ones."""
    return 2 * torch.randn(n, channels, size, size) + 1


def backward(output):
    (output * torch.randn_like(output)).sum().backward()


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, BatchChannelNorm2d)]


def statistics(model):
    """Every running buffer, by name."""
    return {k: v.clone() for k, v in model.named_buffers() if 'running' in k or 'tracked' in k}


def unchanged(before, after):
    """The names of those that kept their value."""
    return {name for name in before if torch.equal(before[name], after[name])}


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()
