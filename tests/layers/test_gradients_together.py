"""Gradients of weights that were standardized together: one call, told to whom it concerns."""

import contextlib

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode

import wsbcn_mm
from tests.layers.standardized import X, net, reference_of
from wsbcn_mm.backends import cpu


class Watching(BaseTorchFunctionMode):
    pass


def test_a_loss_tells_the_weights_that_it_depends_on_alone(backend):
    """One pass, two losses, a branch that is thrown away: DistributedDataParallel counts calls."""
    model = net(5, attached=False)
    wsbcn_mm.standardize_once_per_forward(model)
    heard = []
    for i, layer in enumerate(model):
        layer.weight.register_hook(lambda grad, i=i: heard.append((i, grad.shape)))
        layer.weight.register_post_accumulate_grad_hook(lambda p, i=i: heard.append((i, p.grad)))
    x = X.clone().requires_grad_()
    with wsbcn_mm.standardized_once(model):
        outputs = [layer(x) for layer in model]
    first = (outputs[0] + outputs[2] + outputs[4].detach()).square().mean()
    for loss, of in ((first, [0, 2]), (outputs[3].mean(), [3]), (outputs[1].mean(), [1])):
        heard.clear()
        loss.backward()
        assert sorted(i for i, _ in heard) == sorted([*of, *of])
        assert all(value is not None for _, value in heard)
    assert model[4].weight.grad is None


@pytest.mark.skipif(cpu.entries is None, reason='the C++ extension is not compiled')
@pytest.mark.parametrize('watched', [True, False])
@pytest.mark.parametrize(
    'around, calls', [(lambda: torch.device('cpu'), 1), (contextlib.nullcontext, 1), (Watching, 6)]
)
def test_the_gradients_of_a_backward_pass_are_one_call(watched, around, calls):
    """Of set_default_device, too; where a mode watches, each weight is computed once, by itself."""
    model = net(6)
    model(X)  # from now on the order is known
    if watched:
        model[2].weight.register_hook(lambda grad: None)
    with around(), torch.profiler.profile() as profile:
        model(X).square().sum().backward()
    found = {event.key: event.count for event in profile.key_averages()}
    assert found['wsbcn_mm::standardize_all'] == calls
    assert found['wsbcn_mm::standardize_all_backward'] == calls


@pytest.mark.skipif(not hasattr(torch.Tensor, 'grad_dtype'), reason='gradients have their dtype')
@pytest.mark.parametrize('watched', [True, False])
def test_gradients_in_a_dtype_of_their_own(watched):
    model = net(3)
    expected = [p.grad for p in reference_of(model)]
    for layer in model:
        layer.weight.grad_dtype = torch.bfloat16
        if watched:
            layer.weight.register_post_accumulate_grad_hook(lambda _: None)
    model(X).square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad.to(parameter.grad_dtype or grad.dtype))


@pytest.mark.skipif(cpu.entries is None, reason='the C++ extension is not compiled')
def test_a_hook_that_would_be_called_for_nothing_is_refused():
    model = net(2, attached=False)
    with wsbcn_mm.standardized_once(model):
        first, second = (layer(X) for layer in model)
    model[1].weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(RuntimeError, match='set it before the forward pass'):
        first.sum().backward(retain_graph=True)
    (first.sum() + second.sum()).backward()  # with a gradient there is nothing to tell


@pytest.mark.parametrize('way', ['anomalies', 'behind the node', 'before the next'])
def test_who_looks_between_the_nodes_sees_gradients(way):
    model = net(3, attached=False)
    model[2].weight.register_hook(lambda grad: None)
    seen = []
    with wsbcn_mm.standardized_once(model), torch.autograd.set_detect_anomaly(way == 'anomalies'):
        node = model[0].standardized_weight().grad_fn
        if way == 'behind the node':
            node.register_hook(lambda inputs, outputs: seen.append(inputs[0].clone()))
        elif way == 'before the next':
            (following, _), *_ = node.next_functions
            following.register_prehook(lambda inputs: seen.append(inputs[0].clone()))
        sum(layer(X).square().sum() for layer in model).backward()
    assert len(seen) == (way != 'anomalies')
    assert all(torch.equal(grad, model[0].weight.grad) for grad in seen)
