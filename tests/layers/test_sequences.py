"""Whatever a user does with a model, in whatever order, it computes what the specification says.

Each test of `test_scopes` holds one thing; here hypothesis draws sequences of them, and shrinks one
that fails. Deterministic: the same sequences in every run.
"""

import contextlib
import copy

import pytest

pytest.importorskip('hypothesis', reason='draws the sequences')

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import nn
from torch.utils.checkpoint import checkpoint

import wsbcn_mm
from tests.layers.standardized import close, rand
from wsbcn_mm import BatchChannelNorm2d, WSConv2d, backends, reference
from wsbcn_mm.checks import FORMULAS

NAMES = ('first', 'shared', 'last')


class Net(nn.Module):
    """A weight that is used twice, one below a module of its own, one behind everything."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(WSConv2d(3, 8, 3, padding=1), BatchChannelNorm2d(8, 4))
        self.shared = WSConv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(BatchChannelNorm2d(8, 2) for _ in range(2))
        self.last = WSConv2d(8, 4, 1)
        self.recomputes = self.fails = False

    def forward(self, x):
        x = self.first(x).relu()
        for norm in self.norms:
            x = norm(self.shared(x)).relu()
        if self.fails:
            raise KeyError
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.last, x, use_reentrant=False)
        return self.last(x)


class Twin(Net):
    """The same parameters, computed with by the specification."""

    def forward(self, x):
        self.look()
        with backends.use_backend('eager'):  # of the norms, whose own tests hold them to it
            return super().forward(x)

    def look(self):
        for layer in self.modules():
            if isinstance(layer, WSConv2d):
                layer.forward = _by_specification.__get__(layer)


def _by_specification(layer, x):
    weight = reference.weight_standardize(layer.weight, layer.eps, layer.formula)
    return F.conv2d(x, weight, layer.bias, padding=layer.padding)


def by_data(model, optimizer):
    """A loop of the tutorials, which torch does not see."""
    for p in model.parameters():
        if p.grad is not None:
            p.data.sub_(0.02 * p.grad)


def by_optimizer(model, optimizer):
    optimizer.step()


def conv_of(model, name):
    return model.first[0] if name == 'first' else getattr(model, name)


def differentiable(y):
    return y.square().mean() + y.mean()


WRITES = {
    'scaled': lambda weight, new: weight.data.mul_(0.5).add_(new),
    'replaced': lambda weight, new: setattr(weight, 'data', new.clone()),
    'set': lambda weight, new: weight.data.set_(new.clone()),
    'one filter': lambda weight, new: weight.data[0].copy_(new[0]),
    'counted': lambda weight, new: weight.detach().copy_(new),
    'initialised': lambda weight, new: nn.init.constant_(weight.data[:, :1], 0.3),
}
PASSES = {
    'with a graph': contextlib.nullcontext,
    'no_grad': torch.no_grad,
    'inference_mode': torch.inference_mode,
}
which = st.sampled_from(NAMES)


class Sequences(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Net().double()
        wsbcn_mm.standardize_once_per_forward(self.model)
        self.twin = Twin().double()
        self.twin.load_state_dict(self.model.state_dict())

    def same(self, run):
        """What ``run`` gives of either."""
        state = torch.get_rng_state()
        found = run(self.model)
        torch.set_rng_state(state)
        close(found, run(self.twin))

    def of_both(self, name):
        return [conv_of(model, name) for model in (self.model, self.twin)]

    @rule(
        step=st.sampled_from([by_data, by_optimizer]), scope=st.booleans(), steps=st.integers(2, 3)
    )
    def trains(self, step, scope, steps):
        def run(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            outputs = []
            block = wsbcn_mm.standardized_once(model) if scope else contextlib.nullcontext()
            with block:  # a backward pass ends what it holds
                for _ in range(steps):
                    model.zero_grad()
                    outputs.append(model(rand(2, 3, 5, 4)))
                    loss = differentiable(outputs[-1])
                    if loss.requires_grad:
                        loss.backward()
                        step(model, optimizer)
            return outputs

        self.same(run)

    @rule(order=st.sampled_from([(0, 1), (1, 0), (0, 0, 1)]), clears=st.booleans())
    def adds_gradients_of_two_passes(self, order, clears):
        def run(model):
            if clears:
                model.zero_grad()
            outputs = [model(rand(1, 3, 4, 6)), model(rand(2, 3, 5, 5))]
            for k in order:
                loss = differentiable(outputs[k])
                if loss.requires_grad:
                    loss.backward(retain_graph=True)
            return outputs

        self.same(run)

    @rule(how=st.sampled_from(sorted(PASSES)), images=st.integers(0, 2))
    def evaluates(self, how, images):
        def run(model):
            model.eval()
            with PASSES[how]():
                y = model(rand(images, 3, 5, 5)) + 0
            model.train()
            return y.clone()

        self.same(run)

    @rule(name=which)
    def edits_in_the_longer_scope(self, name):
        def run(model):
            model.eval()
            x = rand(1, 3, 4, 4)
            with torch.no_grad(), wsbcn_mm.weights_do_not_change(model):
                before = model(x)
                weight = conv_of(model, name).weight
                weight.add_(rand(*weight.shape))
                after = model(x)
            model.train()
            return before, after

        self.same(run)

    @rule(name=which, how=st.sampled_from(sorted(WRITES)), between=st.booleans())
    def writes(self, name, how, between):
        def run(model):
            weight = conv_of(model, name).weight
            x, new = rand(1, 3, 4, 4), rand(*weight.shape)
            with torch.no_grad():
                before = model(x) if between else x
                WRITES[how](weight, new)
                return before, model(x)

        self.same(run)

    @rule(name=which)
    def writes_in_a_hook(self, name):
        def run(model):
            layer = conv_of(model, name)
            new = rand(*layer.weight.shape)
            of = model.first if name == 'first' else layer

            def hook(module, inputs):
                layer.weight.data.add_(new)

            handle = of.register_forward_pre_hook(hook)
            x = rand(1, 3, 4, 4)
            with torch.no_grad():
                outputs = [model(x), model(x)]
                handle.remove()
                return [*outputs, model(x)]

        self.same(run)

    @rule(name=which, trains=st.booleans())
    def freezes(self, name, trains):
        for layer in self.of_both(name):
            layer.weight.requires_grad_(trains)

    @rule(name=which, formula=st.sampled_from(FORMULAS), eps=st.sampled_from([1e-5, 1e-2]))
    def sets(self, name, formula, eps):
        for layer in self.of_both(name):
            layer.formula, layer.eps = formula, eps

    @rule(name=which)
    def gets_another_parameter(self, name):
        new = rand(*conv_of(self.model, name).weight.shape)
        for layer in self.of_both(name):
            layer.weight = nn.Parameter(new.clone())

    @rule(assign=st.booleans())
    def loads(self, assign):
        for model in (self.model, self.twin):
            state = {key: value.clone() for key, value in model.state_dict().items()}
            state['shared.weight'] *= 1.5
            model.load_state_dict(state, assign=assign)

    @rule()
    def is_copied(self):
        self.model, self.twin = copy.deepcopy(self.model), copy.deepcopy(self.twin)

    @rule(yes=st.booleans())
    def recomputes(self, yes):
        self.model.recomputes = self.twin.recomputes = yes

    @rule()
    def fails(self):
        def run(model):
            model.fails = True
            with pytest.raises(KeyError):
                model(rand(1, 3, 4, 4))
            model.fails = False
            return model(rand(1, 3, 4, 4))

        self.same(run)

    @rule()
    def is_called_with_other_parameters(self):
        def run(model):
            others = {name: 1.2 * p.detach() for name, p in model.named_parameters()}
            x = rand(1, 3, 4, 4)
            with torch.no_grad():
                return torch.func.functional_call(model, others, (x,)), model(x)

        self.same(run)

    @rule()
    def has_gradients_of_gradients(self):
        def run(model):
            x = rand(1, 3, 4, 4).requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            gradient.square().mean().backward()
            return gradient

        self.same(run)

    @invariant()
    def has_the_values_of_its_twin(self):
        for one, other in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            close(one.detach(), other.detach())
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                close(one.grad, other.grad)
        for one, other in zip(self.model.buffers(), self.twin.buffers(), strict=True):
            close(one, other)


def test_any_sequence(backend):
    run_state_machine_as_test(
        Sequences,
        settings=settings(
            max_examples=50,
            stateful_step_count=8,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
