"""Code of others around a layer may write its weight through ``.data``: scopes compute anew."""

import copy
import functools

import pytest
import torch
from torch import nn

import wsbcn_mm
from tests.layers.standardized import FLOAT, X, close, conv
from wsbcn_mm import WSConv2d


@pytest.mark.parametrize('of_layer', [True, False])
def test_hooks_may_write_a_weight_before_its_use(of_layer):
    model = nn.Sequential(conv(), nn.Sequential(conv()), conv())
    plain = copy.deepcopy(model)
    for each in (model, plain):

        def write(module, args, layer=each[1][0]):
            layer.weight.data.mul_(torch.arange(1.0, 4.0, **FLOAT))

        (each[1][0] if of_layer else each[1]).register_forward_pre_hook(write)
    wsbcn_mm.standardize_once_per_forward(model)
    trains_equally(model, plain)


@pytest.mark.parametrize('a_view', [True, False])
def test_a_weight_that_is_another_layers_too_may_be_written_before_that_ones_use(a_view):
    model = nn.Sequential(conv(), conv(), conv())
    model[2].weight = nn.Parameter(model[1].weight.data) if a_view else model[1].weight
    plain = copy.deepcopy(model)
    if a_view:  # which a copy is not
        plain[2].weight = nn.Parameter(plain[1].weight.data)
    for each in (model, plain):

        def write(module, args):
            module.weight.data.mul_(torch.arange(1.0, 4.0, **FLOAT))

        each[1].register_forward_pre_hook(write)
    wsbcn_mm.standardize_once_per_forward(model)
    trains_equally(model, plain)


def test_a_model_that_calls_itself_runs_its_hooks_again():
    class Twice(nn.Sequential):
        def forward(self, x, deep=True):
            y = super().forward(x)
            return y + self(x * 0.5, deep=False) if deep else y

    model = Twice(conv(), conv())
    plain = copy.deepcopy(model)
    for each in (model, plain):

        def write(module, args):
            module[0].weight.data.mul_(torch.arange(1.0, 4.0, **FLOAT))

        each.register_forward_pre_hook(write)
    wsbcn_mm.standardize_once_per_forward(model)
    with torch.no_grad():
        close(model(X), plain(X))


def trains_equally(model, plain):
    for _ in range(2):
        seen = []
        for each in (model, plain):
            each.zero_grad()
            y = each(X)
            y.square().sum().backward()
            seen.append([y, *(p.grad for p in each.parameters())])
        for a, b in zip(*seen):
            close(a, b)


class MaskedConv2d(WSConv2d):
    """As networks that draw one pixel after the other have them."""

    @functools.wraps(WSConv2d.forward)  # its module is then that of the function
    def forward(self, input):
        self.weight.data *= torch.arange(self.weight[0].numel()).view_as(self.weight[0]) % 3 > 0
        return super().forward(input)


class MaskedInCall(WSConv2d):
    def __call__(self, input):
        self.weight.data *= torch.arange(self.weight[0].numel()).view_as(self.weight[0]) % 3 > 0
        return super().__call__(input)


class MaskedWhenAsked(WSConv2d):
    def standardized_weight(self):
        self.weight.data *= torch.arange(self.weight[0].numel()).view_as(self.weight[0]) % 3 > 0
        return super().standardized_weight()


@pytest.mark.parametrize('kind', [MaskedConv2d, MaskedInCall, MaskedWhenAsked])
def test_a_class_may_be_set_after_the_first_pass(kind):
    model = nn.Sequential(conv(), conv(), conv())
    plain = copy.deepcopy(model)
    wsbcn_mm.standardize_once_per_forward(model)
    trains_equally(model, plain)
    for each in (model, plain):
        each[2].__class__ = kind
    for _ in range(2):
        for each in (model, plain):
            nn.init.normal_(each[2].weight.data, generator=torch.Generator().manual_seed(0))
        trains_equally(model, plain)


@pytest.mark.parametrize('new', [False, True])
def test_a_part_may_be_put_in_after_the_first_pass(new):
    """With a hook that writes, around a layer that was there, or a new one."""
    model = nn.Sequential(conv(), conv(), conv())
    plain = copy.deepcopy(model)
    wsbcn_mm.standardize_once_per_forward(model)
    trains_equally(model, plain)
    of_new = conv()
    for each in (model, plain):
        each[1] = nn.Sequential(copy.deepcopy(of_new) if new else each[1])
        each[1].register_forward_pre_hook(
            lambda module, args: module[0].weight.data.mul_(torch.arange(1.0, 4.0, **FLOAT))
        )
    trains_equally(model, plain)


def test_hooks_of_the_model_in_a_block():
    model = nn.Sequential(conv(), conv())
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each.register_forward_pre_hook(
            lambda module, args: module[0].weight.data.mul_(torch.arange(1.0, 4.0, **FLOAT))
        )
    with wsbcn_mm.standardized_once(model):
        model[0](X)
        y = model(X)
    close(y, plain(X))


@pytest.mark.parametrize('how', ['class', 'method', 'all modules'])
def test_a_weight_may_be_written_by_code_around_the_layer(how):
    model = nn.Sequential(conv(), conv(), conv())
    plain = copy.deepcopy(model)

    def masked(layer, *_):
        layer.weight.data *= torch.arange(layer.weight[0].numel()).view_as(layer.weight[0]) % 3 > 0

    handle = None
    if how == 'all modules':

        def write(module, args):
            if isinstance(module, WSConv2d):
                masked(module)

        handle = nn.modules.module.register_module_forward_pre_hook(write)
    for each in (model, plain):
        for layer in each if how != 'all modules' else ():
            if how == 'class':
                layer.__class__ = MaskedConv2d
            else:

                def forward(input, layer=layer):
                    masked(layer)
                    return type(layer).forward(layer, input)

                layer.forward = forward
    wsbcn_mm.standardize_once_per_forward(model)
    try:
        trains_equally(model, plain)
    finally:
        if handle is not None:
            handle.remove()
