"""What scopes ask of a model's layers, in C++ and in Python."""

import gc
import operator
import types
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tests.layers.standardized import X, close, conv, net
from wsbcn_mm import WSConv2d, WSConvTranspose2d, standardized_once
from wsbcn_mm.backends import cpu
from wsbcn_mm.layers import plans
from wsbcn_mm.layers.subclasses import standardized_copy

pytestmark = pytest.mark.skipif(cpu.entries is None, reason='the C++ extension is not compiled')


class Either(_ConvNd):
    """A convolution or its transpose, as torch's base class takes it."""

    def __init__(self, transposed):
        ones, zeros = (1, 1), (0, 0)
        settings = (3, 3), ones, ones, ones, transposed, zeros, 1, False, 'zeros'
        super().__init__(4, 4, *settings, dtype=torch.float64)

    def forward(self, x):
        convolve = F.conv_transpose2d if self.transposed else F.conv2d
        return convolve(x, self.weight, padding=self.padding)


def test_layers_of_one_class_may_be_transposed_or_not():
    model = nn.Sequential(*(standardized_copy(Either(t)) for t in (False, True, False, True)))
    alone = model(X)
    with standardized_once(model):
        close(model(X), alone)


def test_memory_that_was_freed_is_not_read_by_a_pass_without_its_layer():
    model = net(3)
    y = model[0](X)
    model[1].weight.untyped_storage().resize_(0)
    with standardized_once(model):
        assert torch.equal(model[0](X), y)
    order = list(model)
    for gather in (cpu.entries.gather, plans.gather):
        (layers, _) = gather(order, 0, ({}, ()), model[0], model[0].weight, 9**9)
        assert layers == [model[0], model[2]]


def test_a_model_lives_no_longer_than_who_holds_it():
    gc.collect()
    gc.disable()
    try:
        model = net(3)
        model(X).sum().backward()
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_the_extension_gathers_what_python_does():
    """Whatever sets a layer apart: what it computes, its weight, what is left out, what fits."""
    model = net(12)
    for index in (0, 10, 11):  # one class, of which a layer may be transposed or not
        model[index] = standardized_copy(Either(transposed=index == 10))
    model[1].eps = 0.1
    model[2].formula = 'std_eps'
    model[3].weight.requires_grad_(False)
    model[4].float()
    model[5] = conv(WSConvTranspose2d)
    nn.utils.parametrizations.weight_norm(model[6])
    model[7].to('meta')
    model[8].weight = nn.Parameter(model[8].weight.detach().transpose(2, 3)[..., ::2])  # not dense
    one = model[0].weight.nbytes
    for left_out in (({}, set()), ({model[9]: None}, {model[11]})):
        for most in (one, 2 * one, 100 * one):
            for place in range(len(model)):
                layer, weight = model[place], model[place].weight
                found = [
                    gather(list(model), place, left_out, layer, weight, most)
                    for gather in (cpu.entries.gather, plans.gather)
                ]
                for ours, plain in zip(*found):
                    assert len(ours) == len(plain) and all(map(operator.is_, ours, plain)), place
    assert len(found[0][0]) == 1
    (layers, _) = cpu.entries.gather(list(model), 0, ({}, ()), model[0], model[0].weight, 9**9)
    assert layers == [model[index] for index in (0, 9, 11)]


def _set_a_method(model):
    model[0][1].standardized_weight = types.MethodType(WSConv2d.standardized_weight, model[0][1])


def _replace_the_hooks(model):
    """As code does that removes hooks, before others are registered."""
    model[0]._forward_pre_hooks = OrderedDict()
    model[0].register_forward_pre_hook(print)


@pytest.mark.parametrize(
    'change, kinds',
    [
        (lambda model: None, {WSConv2d, WSConvTranspose2d}),
        (lambda model: model.register_forward_pre_hook(print), {WSConv2d, WSConvTranspose2d}),
        (lambda model: model[0][1].register_forward_hook(print), {WSConv2d, WSConvTranspose2d}),
        (lambda model: model.pop(1), {WSConv2d}),
        (_set_a_method, None),
        (lambda model: model[0].register_forward_pre_hook(print), None),
        (lambda model: model[0][1].register_forward_pre_hook(print), None),
        (_replace_the_hooks, None),
        (lambda model: nn.utils.parametrizations.weight_norm(model[0][1]), None),
        (lambda model: model[0][0].register_parameter('weight', None), None),
    ],
)
def test_the_extension_surveys_what_python_does(change, kinds):
    model = nn.Sequential(nn.Sequential(conv(), conv()), conv(WSConvTranspose2d))
    below = [(weakref.ref(module), None) for module in model.modules()]
    layers = [weakref.ref(module) for module in (*model[0], model[1])]
    change(model)
    for survey in (cpu.entries.survey, plans.survey):
        found = survey(layers, below, model)
        assert (None if found is None else set(found)) == kinds
