"""wsbcn_mm.networks.module_replacement: layers that a pass reaches beside the module tree."""

import collections
import copy
import functools
import gc
import itertools
import types
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.convert import convert_model
from wsbcn_mm.folding import fold, plan
from wsbcn_mm.networks import module_replacement


class OwnPartial(functools.partial):
    pass


class Helper(nn.Module):
    """A module outside of the tree."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = steps


NOT_COPIED = 'proxy', 'function'  # by copy.deepcopy, with which folding begins


def function_with_attributes(conv, norm):
    def step(x):
        return step.norm(step.conv(x))

    step.conv, step.norm = conv, norm
    return step


def chain(*layers, length=200):
    link = types.SimpleNamespace(layers=layers)
    for _ in range(length):
        link = types.SimpleNamespace(link=link)
    return link


def through_chain(link, x):
    while not hasattr(link, 'layers'):
        link = link.link
    return link.layers[1](link.layers[0](x))


class Slots:
    __slots__ = ('conv', 'norm', 'unset')

    def __init__(self, conv, norm):
        self.conv, self.norm = conv, norm


WAYS = {
    'list': (lambda m: [m.conv, m.norm], lambda way, x: way[1](way[0](x))),
    'tuples': (lambda m: [(m.conv, 1), (m.norm, 1)], lambda way, x: way[1][0](way[0][0](x))),
    'dict of lists': (
        lambda m: {'a': [m.conv], 'b': [m.norm]},
        lambda way, x: way['b'][0](way['a'][0](x)),
    ),
    'object': (
        lambda m: types.SimpleNamespace(conv=m.conv, norm=m.norm),
        lambda way, x: way.norm(way.conv(x)),
    ),
    'partial': (lambda m: functools.partial(run, m.conv, norm=m.norm), lambda way, x: way(x)),
    'methods': (lambda m: (m.conv.forward, m.norm.forward), lambda way, x: way[1](way[0](x))),
    'keys': (lambda m: {m.conv: 0, m.norm: 1}, lambda way, x: [*way][1](next(iter(way))(x))),
    'slots': (lambda m: Slots(m.conv, m.norm), lambda way, x: way.norm(way.conv(x))),
    'module': (lambda m: [nn.Sequential(m.conv, m.norm)], lambda way, x: way[0](x)),
    'attribute of a module': (
        lambda m: (Helper(m.conv, m.norm),),
        lambda way, x: way[0].steps[1](way[0].steps[0](x)),
    ),
    'hooks of a module': (
        lambda m: (_hooked(nn.Identity(), m.conv, m.norm),),
        lambda way, x: way[0](x),
    ),
    'own partial': (lambda m: OwnPartial(run, m.conv, norm=m.norm), lambda way, x: way(x)),
    'proxy': (
        lambda m: types.MappingProxyType({'a': m.conv, 'b': m.norm}),
        lambda way, x: way['b'](way['a'](x)),
    ),
    'array': (
        lambda m: np.array([m.conv, m.norm], dtype=object),
        lambda way, x: way[1](way[0](x)),
    ),
    'function': (lambda m: function_with_attributes(m.conv, m.norm), lambda way, x: way(x)),
    'chain': (lambda m: chain(m.conv, m.norm), through_chain),
}


def _hooked(module, conv, norm):
    module.register_forward_hook(functools.partial(_call, conv))
    module.register_forward_hook(functools.partial(_call, norm))
    return module


def _call(layer, module, args, output):
    return layer(output)


def run(conv, x, norm):
    return norm(conv(x))


class Model(nn.Module):
    def __init__(self, conv, norm, way):
        super().__init__()
        self.conv, self.norm = conv, norm
        refer, self.run = WAYS[way]
        self.way = refer(self)

    def forward(self, x):
        return self.run(self.way, x)


@pytest.mark.parametrize('way', WAYS)
def test_converted_layers_run_whatever_the_forward_pass_goes_by(way):
    model, x = Model(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), way), torch.randn(2, 3, 6, 6)
    report = convert_model(model, x)
    assert [line.after for line in report.changed] == ['WSConv2d', 'BatchChannelNorm2d']
    norm = copy.deepcopy(model.norm)
    y = model(x)
    assert model.norm.bn.num_batches_tracked == 1
    torch.testing.assert_close(y, norm(model.conv(x)))


def test_what_a_replaced_layer_refers_to_is_replaced():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[0].after = (model[1],)
    model.step = lambda x, norm=model[1]: norm(x)
    convert_model(model)
    assert model.step.__defaults__ == (model[1],)
    assert model[0].after == (model[1],)


@pytest.mark.parametrize('way', [way for way in WAYS if way not in NOT_COPIED])
def test_layers_that_attributes_refer_to_are_not_folded(way):
    model, x = Model(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 2), way), torch.randn(2, 3, 6, 6)
    model(x)
    assert plan(model, x).left.keys() == {'conv', 'norm'}
    with pytest.warns(UserWarning, match="attribute 'way' of a Model refers to it as well"):
        torch.testing.assert_close(fold(model, x)(x), model.eval()(x))


class Forbids(dict):
    def items(self):
        raise RuntimeError('not now')

    def __setitem__(self, key, value):
        raise RuntimeError('frozen')


class Raises:
    def __getattribute__(self, name):
        raise RuntimeError('not now')


class OwnTuple(tuple):
    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


class HidesAttributes:
    @property
    def __dict__(self):
        raise RuntimeError('not these')


def test_classes_that_forbid_it_are_looked_into_all_the_same():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.settings = Forbids(norm=model[1], parent=weakref.proxy(model))
    vars(model)['raises'] = Raises()
    vars(model)['parent'] = weakref.proxy(nn.ReLU())  # dead at once
    model.pair = OwnTuple(model[0], 1)
    model.pair.of = 'a pair'
    model.hides = HidesAttributes()  # the one thing that stays unseen
    model.method = types.MethodType(functools.partial(run), model[0])
    assert len(convert_model(model).changed) == 2 and model.settings['norm'] is model[1]
    assert model.pair[0] is model[0]
    assert type(model.pair) is OwnTuple and model.pair.of == 'a pair'


def test_every_closure_keeps_its_own_layers():
    """What is looked into lives as long as it is remembered by its id."""
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(60)])

    def step(pair):
        return lambda: pair, lambda: pair

    model.steps = [step((layer, i)) for i, layer in enumerate(model)]
    module_replacement.replace(model, {id(layer): nn.Conv2d(1, 1, 3) for layer in model})
    assert all(f()[0] is layer for layer, both in zip(model, model.steps) for f in both)


def test_a_chain_of_objects():
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(20)])
    model.steps = [types.SimpleNamespace(layer=layer) for layer in model]
    for step, following in itertools.pairwise(model.steps):
        step.following = following
    module_replacement.replace(model, {id(layer): nn.Conv2d(1, 1, 3) for layer in model})
    assert all(step.layer is layer for step, layer in zip(model.steps, model))


def test_what_wraps_a_module_refers_to_no_layer_by_its_attributes():
    """As torch.compile does: a function gets the dictionary that holds the children."""
    model = nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 2))
    model.call = functools.wraps(model)(function_with_attributes(1, 2))
    assert module_replacement.modules_in_attributes(model).keys() == {model}  # as __wrapped__
    compiled = torch.compile(model, backend='eager')
    assert plan(compiled, torch.randn(2, 3, 6, 6)).left == {}


def test_weak_references_follow():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.norms, model.conv = weakref.WeakSet([model[1]]), weakref.ref(model[0])
    model.by_name = weakref.WeakValueDictionary(norm=model[1])
    convert_model(model)
    gc.collect()
    assert [*model.norms] == [model[1]] == [*model.by_name.values()]
    assert model.conv() is model[0]
    del model[1]
    gc.collect()
    assert not model.norms and not model.by_name


def test_however_deep_the_stack_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    steps = model[0]
    for _ in range(400):
        steps = [(steps,)]
    model.steps = steps

    def deeper(times):
        return convert_model(model) if times == 0 else deeper(times - 1)

    assert len(deeper(600).changed) == 2
    found = model.steps
    while isinstance(found, (list, tuple)):
        (found,) = found
    assert found is model[0]


def test_a_wrapper_of_the_model_beside_it_refers_to_none_of_its_layers():
    model = nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 2))
    model.trainer = types.SimpleNamespace(model=nn.Sequential(model))
    assert module_replacement.modules_in_attributes(model).keys() == {model}


def test_what_refers_to_itself_or_to_the_model_ends():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.parts = parts = [model, (1, 'a', torch.ones(2))]
    parts.append(parts)
    model.step = model.forward
    assert module_replacement.modules_in_attributes(model).keys() == {model}
    new = nn.ReLU()
    module_replacement.replace(model, {id(model[1]): new})
    assert model[1] is new and model.parts is parts and parts[0] is model


class KeptByTheClass(nn.Module):
    """Where a forward pass goes by what is looked for nowhere."""

    unseen: ClassVar[list[nn.Module]] = []

    def __init__(self, *unseen):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.unseen[:] = [getattr(self, name) for name in unseen]

    def forward(self, x):
        layers = [self.conv, self.norm, self.conv2, self.norm2]
        if self.unseen:
            layers[-len(self.unseen) :] = self.unseen
        return nn.Sequential(*layers)(x)


@pytest.mark.parametrize(
    'unseen, changed',
    [
        ((), ['conv', 'norm', 'conv2', 'norm2']),
        (('norm2',), ['conv', 'norm']),
        (('conv2', 'norm2'), ['conv', 'norm']),
        (('norm', 'conv2', 'norm2'), []),
    ],
)
def test_an_old_layer_that_still_runs_is_put_back(unseen, changed):
    model, x = KeptByTheClass(*unseen), torch.randn(2, 3, 8, 8)
    layers = dict(model.named_children())
    report = convert_model(model, x)
    assert [line.name for line in report.changed] == changed
    assert all((model.get_submodule(n) is layers[n]) == (n not in changed) for n in layers)
    for line in report.left:
        assert 'something runs it that' in line.reason or 'stays as it is' in line.reason
    model(x)
    assert all(m.num_batches_tracked == 1 for m in model.modules() if hasattr(m, 'running_mean'))


def test_modules_as_keys_and_behind_many_nones():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.of = collections.OrderedDict([(model[0], 'a'), ('b', 1), (model[1], 'c')])
    model.steps = [None] * 100 + list(model)
    model.array = np.array(model.steps, dtype=object)
    assert len(convert_model(model).changed) == 2
    assert list(model.array[-2:]) == list(model)
    assert list(model.of) == [model[0], 'b', model[1]] and model.steps[-2:] == list(model)
