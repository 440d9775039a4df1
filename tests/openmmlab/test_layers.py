"""MicroBN: BatchNorm, except where BatchNorm raises."""

import pytest

pytest.importorskip('mmcv', reason='the norm is built by mmcv')

import torch
from mmcv.cnn import build_norm_layer
from torch import nn

from wsbcn_mm.openmmlab.layers import MicroBatchNorm2d


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(1, 8, 3, 3), (2, 8, 1, 1), (2, 8, 3, 4)])
def test_it_is_batch_norm(size, training):
    name, norm = build_norm_layer(dict(type='MicroBN'), 8, postfix=1)
    assert (name, type(norm)) == ('bn1', MicroBatchNorm2d)
    plain = nn.BatchNorm2d(8)
    plain.load_state_dict(norm.state_dict())
    norm.train(training), plain.train(training)
    x = torch.randn(size)
    assert torch.equal(norm(x), plain(x))
    for key, value in plain.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value)


def test_a_single_value_uses_the_running_statistics_and_leaves_them():
    norm = build_norm_layer(dict(type='MicroBN'), 8)[1].train()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.randn(1, 8, 1, 1, requires_grad=True)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        nn.BatchNorm2d(8).train()(x)
    y = norm(x)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    torch.testing.assert_close(norm.eval()(x), y)
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert gradient.isfinite().all() and gradient.any()
