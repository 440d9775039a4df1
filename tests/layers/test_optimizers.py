"""What changes weights between two forward passes: training by every kind of optimizer."""

import copy

import pytest
import torch

from tests.layers.standardized import X, close, expected, net

OPTIMIZERS = {
    'foreach SGD': lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, foreach=True),
    'fused SGD': lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, fused=True),
    'foreach AdamW': lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    'fused AdamW': lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


def loss_of(model, forward):
    loss = (forward(model) - 1).square().mean()
    loss.backward()
    return loss


def by_optimizer(name):
    def train(model, forward):
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model, forward)
            optimizer.step()

    return train


def by_line_search(model, forward):
    """Many forward passes within a step, each with other weights."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        return loss_of(model, forward)

    for _ in range(2):
        optimizer.step(closure)


def in_the_backward_pass(model, forward):
    """A weight moves as soon as its gradient is there; what is before it has none yet."""
    optimizers = {p: torch.optim.SGD([p], 1e-3) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(4):
        loss_of(model, forward)


def sharpness_aware(model, forward):
    optimizer, parameters = torch.optim.SGD(model.parameters(), 1e-3), list(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, forward)
        away = [0.1 * p.grad / p.grad.norm() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, away)
        optimizer.zero_grad()
        loss_of(model, forward)
        with torch.no_grad():
            torch._foreach_sub_(parameters, away)
        optimizer.step()


def by_other_memory(model, forward):
    for _ in range(3):
        model.zero_grad()
        loss_of(model, forward)
        for p in model.parameters():
            p.data = p.data - 1e-3 * p.grad


def in_one_flat_buffer(model, forward):
    """apex, DeepSpeed: weights and gradients are views of two vectors."""
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    gradient, start = torch.zeros_like(flat), 0
    for p in parameters:
        part = slice(start, start := start + p.numel())
        p.data, p.grad = flat[part].view_as(p), gradient[part].view_as(p)
    for _ in range(3):
        gradient.zero_()
        loss_of(model, forward)
        assert gradient.any()
        flat.sub_(gradient, alpha=1e-3)


WAYS = {name: by_optimizer(name) for name in OPTIMIZERS} | {
    'L-BFGS': by_line_search,
    'in the backward pass': in_the_backward_pass,
    'sharpness-aware': sharpness_aware,
    '.data =': by_other_memory,
    'one flat buffer': in_one_flat_buffer,
}


@pytest.mark.parametrize('attached', [True, False], ids=['scope', 'alone'])
@pytest.mark.parametrize('way', WAYS)
def test_training_is_that_of_the_specification(way, attached, backend):
    model = net(3, attached=attached)
    twin, before = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    WAYS[way](model, lambda model: model(X))
    WAYS[way](twin, expected)
    for p, q, old in zip(model.parameters(), twin.parameters(), before):
        close(p, q)
        assert not torch.equal(p, old)
