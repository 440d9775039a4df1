"""What autograd may be asked for: hooks on what it saves, penalties, parts of a backward pass."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import wsbcn_mm
from tests.layers.standardized import X, close, conv, expected, net
from wsbcn_mm import backends, compat, reference


def gradients_left(model):
    return [p.grad for p in model.parameters()]


def saved_in_main_memory(model, forward, folder):
    with save_on_cpu():
        loss = forward(model, X).pow(2).sum()
    loss.backward()
    return gradients_left(model)


def saved_on_disk(model, forward, folder):
    def write(tensor):
        path = folder / f'{len(list(folder.iterdir()))}.pt'
        torch.save(tensor.detach(), path)
        return path

    with saved_tensors_hooks(write, torch.load):
        loss = forward(model, X).pow(2).sum()
    assert list(folder.iterdir())
    loss.backward()
    return gradients_left(model)


def watched_for_anomalies(model, forward, folder):
    with torch.autograd.set_detect_anomaly(True):
        forward(model, X).pow(2).sum().backward()
    return gradients_left(model)


def penalty(model, forward, folder):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(forward(model, x).pow(2).sum(), x, create_graph=True)
    (1 - grad.norm()).pow(2).backward()
    return [x.grad, *gradients_left(model)]


def inside_a_forward_pass(model, forward, folder):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(forward(model[:2], x).pow(2).sum(), x, create_graph=True)
    forward(model[1:], 1e-3 * grad).pow(2).sum().backward()
    return [x.grad, *gradients_left(model)]


def of_some_weights(model, forward, folder):
    y = forward(model, X).pow(2).sum()
    first = torch.autograd.grad(y, [model[1].weight], retain_graph=True)
    return [*first, *torch.autograd.grad(y, [model[0].bias, model[2].weight])]


def of_a_model_that_is_frozen_in_part(model, forward, folder):
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    forward(model, X).pow(2).sum().backward()
    assert model[0].weight.grad is model[1].weight.grad is None
    return [model[1].bias.grad, *gradients_left(model[2])]


def edited_by_hooks(model, forward, folder):
    for i, layer in enumerate(model):
        layer.weight.register_hook(lambda grad, i=i: (i + 2) * grad.clamp(-9, 9))
    forward(model, X).pow(2).sum().backward()
    return gradients_left(model)


USES = [
    saved_in_main_memory,
    saved_on_disk,
    watched_for_anomalies,
    penalty,
    inside_a_forward_pass,
    of_some_weights,
    of_a_model_that_is_frozen_in_part,
    edited_by_hooks,
]


@pytest.mark.parametrize('scope', ['none', 'forward', 'all'])
@pytest.mark.parametrize('use', USES)
def test_gradients_are_those_of_the_specification(use, scope, backend, tmp_path):
    """A scope is a forward pass, or all of the use: it ends by itself when one runs backward."""
    model = net(3, attached=scope == 'forward')
    twin, folders = copy.deepcopy(model), (tmp_path / 'found', tmp_path / 'wanted')
    for folder in folders:
        folder.mkdir()
    with wsbcn_mm.standardized_once(model) if scope == 'all' else contextlib.nullcontext():
        found = use(model, lambda layers, x: layers(x), folders[0])
    wanted = use(twin, expected, folders[1])
    assert len(found) == len(wanted) and all(grad.any() for grad in wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradients_in_batches(backend):
    """Of a weight: torch's older vmap, in which they run, refuses; `torch.func.jacrev` is right."""
    layer, x = conv(), X[:1, :, :2, :2]

    def run(weight, standardize=wsbcn_mm.weight_standardize):
        return nn.functional.conv2d(x, standardize(weight), padding=1).flatten()

    jacobian = torch.autograd.functional.jacobian
    wanted = jacobian(lambda w: run(w, reference.weight_standardize), layer.weight)
    close(jacobian(run, layer.weight), wanted)
    close(torch.func.jacrev(run)(layer.weight), wanted)
    with pytest.raises(RuntimeError, match='BatchedTensorImpl|Batching rule not implemented'):
        jacobian(run, layer.weight, vectorize=True)


@pytest.mark.parametrize('scope', [True, False], ids=['scope', 'alone'])
def test_a_backward_pass_in_two_halves(scope, backend):
    """Schedules of pipelines compute the gradients of weights when they have time for it."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    if compat.installed() < (2, 11):
        pytest.skip('torch before 2.11 asserts that every weight here is a leaf')
    make_norm = lambda: nn.GroupNorm(2, 4, dtype=X.dtype)  # noqa: E731
    model = nn.Sequential(conv(), make_norm(), nn.ReLU(), conv(), make_norm())
    twin = copy.deepcopy(model)
    if scope:
        wsbcn_mm.standardize_once_per_forward(model)
    x, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    twin(other).pow(2).sum().backward()
    loss = model(x).pow(2).sum()
    (found,), groups = stage_backward_input([loss], None, [x], model.parameters())
    close(found, other.grad)
    assert all(p.grad is None for p in model.parameters())
    try:
        stage_backward_weight(model.parameters(), groups)
    except RuntimeError as error:  # with nodes in C++, which free what they saved
        if not scope or backends.forced() == 'eager' or 'second time' not in str(error):
            raise
    else:
        close(gradients_left(model), gradients_left(twin))
