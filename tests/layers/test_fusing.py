"""wsbcn_mm.layers.fusing: foreign ways to fold a BatchNorm end in one sentence."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.ao.quantization import fuse_modules
from torch.nn.utils.fusion import fuse_conv_bn_weights

from wsbcn_mm import BatchChannelNorm2d, WSConv2d, fold
from wsbcn_mm.convert import convert_model
from wsbcn_mm.layers.subclasses import standardized_copy

SENTENCE = r'folds BatchNorms into raw weights.*\n.*use wsbcn_mm\.fold'


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x))


class Model(nn.Module):
    """Folds itself, as models of ultralytics, timm and torchvision do."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.reparametrized(self.fused(self.block(x), self.head))

    def fused(self, x, head):  # needs arguments: a step of the forward pass
        return head(x)

    def reparametrized(self, x):
        return self.fuse_all(x, x) / 2

    def fuse_all(self, *maps):  # a step of the forward pass, too, by way of another one
        return sum(maps)

    def fuse(self, verbose=True):
        self.block.conv.weight.data.mul_(self.block.bn.running_var.view(-1, 1, 1, 1))
        return self

    def switch_to_deploy(self):
        self.fuse()

    def fuse_model(self, is_qat=None):
        fuse_modules(self, [['block.conv', 'block.bn']], inplace=True)


@pytest.mark.parametrize('name', ['fuse', 'switch_to_deploy', 'fuse_model'])
def test_a_method_that_folds_says_what_to_use(name):
    model, x = Model(), torch.randn(2, 3, 8, 8)
    convert_model(model, x)
    model.train()(x)
    model.eval()
    before, expected = model.block.conv.weight.clone(), model(x)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=rf'Model\.{name}\(\) {SENTENCE}'):
            getattr(one, name)()
        torch.testing.assert_close(one(x), expected)
    assert torch.equal(model.block.conv.weight, before)
    folded = fold(model, x)
    assert getattr(folded, name)() is folded  # nothing to do any more
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)


def test_models_that_were_not_converted_fold_themselves():
    model = Model().eval()
    assert convert_model(nn.Sequential(nn.Linear(2, 2), model.head)).changed == []
    before = model.block.conv.weight.clone()
    model.block.bn.running_var.fill_(2)
    assert model.fuse() is model and torch.equal(model.block.conv.weight, 2 * before)


class Steps(Block):
    def reparametrize(self):
        return self.kept * 2

    def forward(self, x):
        self.kept = super().forward(x)
        return [getattr(self, name)() for name in ('reparametrize',)].pop()


def test_what_runs_in_a_forward_pass_is_a_step_of_it():
    model, x = Steps(), torch.randn(2, 3, 8, 8)
    convert_model(model)
    torch.testing.assert_close(model(x), model.kept * 2)
    with pytest.raises(RuntimeError, match=SENTENCE):
        model.reparametrize()


class Same(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    'layers',
    [
        [WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4)],
        [WSConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()],
        [nn.Conv2d(3, 8, 3), BatchChannelNorm2d(8, 4)],
        [standardized_copy(Same(3, 8, 3)), nn.BatchNorm2d(8)],
    ],
)
def test_fuse_modules_of_torch(layers):
    model = nn.Sequential(*layers).eval()
    with pytest.raises(RuntimeError, match=rf'fuse_modules {SENTENCE}'):
        fuse_modules(model, [str(i) for i in range(len(layers))])


def test_fuse_modules_does_all_else_as_before():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    assert isinstance(fuse_modules(model, ['0', '1'])[1], nn.Identity)


def test_fusing_by_hand_is_right_with_the_standardized_weight():
    """Tensors do not say whose they are: with the raw weight nobody sees that it is wrong."""
    conv, bn, x = WSConv2d(3, 8, 3), nn.BatchNorm2d(8).eval(), torch.randn(2, 3, 8, 8)
    nn.init.normal_(bn.running_mean)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    rest = conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    raw, right = (fuse_conv_bn_weights(w, *rest) for w in (conv.weight, conv.standardized_weight()))
    torch.testing.assert_close(nn.functional.conv2d(x, *right), bn(conv(x)))
    assert not torch.allclose(nn.functional.conv2d(x, *raw), bn(conv(x)), atol=0.1)
