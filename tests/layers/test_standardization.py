"""Weights are standardized once per forward pass, and nothing of it is left afterwards."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import wsbcn_mm
from tests.layers.standardized import (
    FLOAT,
    X,
    close,
    conv,
    expected,
    gradients,
    net,
    reference_of,
    shrunk,
)
from wsbcn_mm import WSConv1d, WSConv2d, WSConv3d, WSConvTranspose2d, reference
from wsbcn_mm.layers import comparators, scopes
from wsbcn_mm.layers.subclasses import standardized_copy

# ----------------------------------------------------------------------------------------------
# Once


def test_without_a_scope_every_call_computes(calls):
    model = net(attached=False)
    model(X)
    model(X)
    assert calls == [1] * 6


def test_a_forward_pass_is_one_call(calls, backend):
    model = net()
    for _ in range(2):
        assert calls == []
        y = model(X)
        assert calls == [3]
        close(gradients(model, y), [p.grad for p in reference_of(model)])
        calls.clear()


def test_a_shared_layer_is_standardized_once_per_pass(calls, backend):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = net(2, attached=False)

        def forward(self, x):
            return sum(self.head(level).square().sum() for level in (x, x[..., :4], x[..., :3]))

    model = Pyramid()
    wsbcn_mm.standardize_once_per_forward(model)
    loss = model(X)
    assert calls == [2]
    loss.backward()
    twin = copy.deepcopy(model.head)
    twin.zero_grad()
    sum(expected(twin, level).square().sum() for level in (X, X[..., :4], X[..., :3])).backward()
    close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_a_chunk_holds_a_few_megabytes(calls, monkeypatch):
    model = net(5)
    monkeypatch.setattr(scopes, 'ON_CPU', 2 * model[0].weight.nbytes)
    model(X)
    assert calls == [2, 2, 1]


def test_a_chunk_on_a_gpu_is_the_model_unless_other_ranks_wait_for_gradients(calls, monkeypatch):
    model = net(5)
    monkeypatch.setattr(scopes, 'ON_CPU', scopes.ALONE)
    model(X)
    assert calls == [5]
    elsewhere = conv().to('meta').weight
    assert scopes.most_bytes(elsewhere) == scopes.ALONE
    monkeypatch.setattr(scopes.distributed, 'world_size', lambda: 2)
    assert scopes.most_bytes(elsewhere) == scopes.OVER_RANKS < 25 * 2**20  # a bucket of DDP
    assert scopes.most_bytes(model[0].weight) == scopes.ON_CPU


def test_chunks_follow_the_order_of_use(calls, monkeypatch):
    class Backwards(nn.Sequential):
        def forward(self, x):
            for layer in reversed(self):
                x = layer(x)
            return x

    model = Backwards(*net(4, attached=False))
    wsbcn_mm.standardize_once_per_forward(model)
    monkeypatch.setattr(scopes, 'ON_CPU', 2 * model[0].weight.nbytes)
    model(X)
    calls.clear()
    model(X)  # knows the order of the first pass
    assert calls == [2, 2]


def test_a_layer_that_is_not_used_gets_nothing(backend):
    """To its hooks, and to DistributedDataParallel, it is a layer that nobody called."""

    class Heads(nn.ModuleList):
        def forward(self, x, which):
            return sum(self[i](x).sum() for i in which)

    model = Heads(net(3, attached=False))
    wsbcn_mm.standardize_once_per_forward(model)
    heard = []
    for i, layer in enumerate(model):
        layer.weight.register_hook(lambda grad, i=i: heard.append((i, grad.shape)))
    for which in ([0, 1, 2], [0, 2], [1], [2, 1]):
        heard.clear()
        model.zero_grad()
        model(X, which).square().backward()
        assert sorted(i for i, _ in heard) == sorted(which)
        assert [layer.weight.grad is not None for layer in model] == [i in which for i in range(3)]


def test_what_differs_is_standardized_apart(calls):
    model = net(6)
    model[1].eps = 0.1
    model[2].formula = 'std_eps'
    model[3].weight.requires_grad_(False)
    close(model(X), expected(model))
    assert sorted(calls) == [1, 1, 1, 3]
    assert not model[3].standardized_weight().requires_grad


@pytest.mark.parametrize('kind', [WSConvTranspose2d, comparators.WSMeanOnlyConv2d])
def test_other_kinds_of_layers_compute_for_themselves(kind, calls):
    model = nn.Sequential(conv(), conv(kind), conv())
    wsbcn_mm.standardize_once_per_forward(model)
    alone = [layer.standardize(layer.weight, torch.float64) for layer in model]
    with wsbcn_mm.standardized_once(model):
        for layer, weight in zip(model, alone):
            assert torch.equal(layer.standardized_weight(), weight)
            assert layer.standardized_weight() is layer.standardized_weight()


def test_convolutions_of_other_classes_are_standardized_with_the_rest(calls):
    class PadsItself(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    model = nn.Sequential(conv(), standardized_copy(PadsItself(4, 4, 3).double()), conv())
    wsbcn_mm.standardize_once_per_forward(model)
    y = model(X)
    assert calls == [3]
    close(gradients(model, y), [p.grad for p in reference_of(model)])


@pytest.mark.parametrize(
    'kind, shape',
    [(WSConv1d, (1, 4, 5)), (WSConv2d, (1, 4, 5, 5)), (WSConv3d, (1, 4, 5, 5, 5))],
)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_together_is_what_each_is_alone(kind, shape, dtype, backend):
    torch.manual_seed(3)
    model = nn.Sequential(kind(4, 6, 3, dtype=dtype), kind(6, 3, 1, dtype=dtype))
    if len(shape) == 4:
        model.to(memory_format=torch.channels_last)
    cotangents = [torch.randn_like(layer.weight) for layer in model]
    apart = [layer.standardized_weight() for layer in model]
    wanted = torch.autograd.grad(apart, [m.weight for m in model], cotangents)
    with wsbcn_mm.standardized_once(model):
        together = [layer.standardized_weight() for layer in model]
    found = torch.autograd.grad(together, [m.weight for m in model], cotangents)
    for a, b in zip((*together, *found), (*apart, *wanted)):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize('to', [torch.bfloat16, torch.float16])
def test_under_autocast_in_its_dtype(to, backend):
    model = net(2, dtype=torch.float32)
    with torch.autocast('cpu', to):
        y = model(X.float())
        with wsbcn_mm.standardized_once(model):
            inside = model[0].standardized_weight()
            with torch.autocast('cpu', enabled=False):
                assert model[0].standardized_weight().dtype == torch.float32
            assert model[0].standardized_weight() is inside
    assert y.dtype == inside.dtype == to
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_a_gradient_that_others_hold_is_not_overwritten(backend):
    """Where nobody else has it, the gradient of the result becomes that of the weight in place."""
    for shape in ((4, 4, 3, 3), (5, 7, 1, 1), (3, 70, 3, 3), (8, 17), (300, 5, 3, 3)):
        weight = torch.randn(shape, requires_grad=True)
        cotangent = torch.randn(shape)
        kept, before = [], cotangent.clone()
        wsbcn_mm.weight_standardize(weight).mul(2).backward(cotangent)  # a fresh one arrives
        in_place, weight.grad = weight.grad, None
        w_hat = wsbcn_mm.weight_standardize(weight)
        w_hat.register_hook(kept.append)
        w_hat.mul(2).backward(cotangent)
        assert torch.equal(kept[0], 2 * before)
        assert torch.equal(cotangent, before)
        assert torch.equal(weight.grad, in_place)
        exact = weight.detach().double().requires_grad_()
        reference.weight_standardize(exact).mul(2).backward(before.double())
        torch.testing.assert_close(in_place.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_double_backward(backend):
    model = net(2)
    parameters = [layer.weight for layer in model]

    def second(y):
        first = torch.autograd.grad(y.square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    close(second(model(X)), second(expected(model)))


def test_graphs_may_be_differentiated_again(backend):
    model = net(2)
    y = model(X).square().sum()
    first = torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(y, list(model.parameters()))
    for a, b in zip(first, again):
        assert torch.equal(a, b)


def test_two_losses_of_one_pass(backend):
    """Their graphs share the node: each backward pass adds its share."""
    model = net(2)
    with wsbcn_mm.standardized_once(model):
        first, second = model[0](X).square().sum(), model[0](X + 1).sin().sum()
        first.backward()
        second.backward()
    found = model[0].weight.grad
    twin = copy.deepcopy(model)
    twin.zero_grad()
    (expected(twin[:1]).square().sum() + expected(twin[:1], X + 1).sin().sum()).backward()
    close(found, twin[0].weight.grad)


# ----------------------------------------------------------------------------------------------
# Nothing is left: every way to change a weight


class WritesThroughData(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                p.data.sub_(p.grad.data, alpha=0.1)


def no_grad_step(model):
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


def compiled_foreach(model):
    torch._foreach_add_([p.data for p in model.parameters()], 1.5)
    model[0].weight.data.view(-1)[0] += 3


def flat_vector(model):
    """apex, DeepSpeed, evolution strategies: all parameters are views of one vector."""
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    model(X)
    vector.normal_()


def average_written_through_data(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(copy.deepcopy(model))
    for p, q in zip(model.parameters(), average.module.parameters()):
        p.data.copy_(q.data * 1.1 + 0.1 * torch.randn_like(q))


def inference_write(model):
    with torch.inference_mode():
        model[0].weight.data.copy_(torch.randn_like(model[0].weight))


def through_storage(model):
    other = torch.randn_like(model[0].weight).untyped_storage()
    model[0].weight.untyped_storage().copy_(other)


def shared(model):
    model.share_memory()
    model(X)
    model[0].weight.detach().numpy()[:] = 0.3 * torch.randn_like(model[0].weight).detach().numpy()


def parametrized(model):
    scale = nn.Module()
    scale.forward = lambda weight: 2 * weight + weight.square()
    parametrize.register_parametrization(model[0], 'weight', scale)
    model(X)
    model[0].parametrizations.weight.original.data.normal_()


EDITS = {
    'tutorial: p.data.sub_': lambda m: [p.data.sub_(0.1 * p.grad) for p in m.parameters()],
    'tutorial: no_grad': no_grad_step,
    'foreach on .data': compiled_foreach,
    'optimizer on .data': lambda m: WritesThroughData(m.parameters()).step(),
    'SGD': lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
    'fused AdamW': lambda m: torch.optim.AdamW(m.parameters(), 0.1, fused=True).step(),
    '.data.normal_': lambda m: m[0].weight.data.normal_(),
    'init on .data': lambda m: nn.init.normal_(m[0].weight.data),
    'init': lambda m: nn.init.normal_(m[0].weight),
    'reset_parameters': lambda m: m[0].reset_parameters(),
    'flat vector': flat_vector,
    'average': average_written_through_data,
    '.data +=': lambda m: m[0].weight.data.add_(torch.randn_like(m[0].weight)),
    '.data = ': lambda m: setattr(m[0].weight, 'data', torch.randn_like(m[0].weight)),
    '.data[0] =': lambda m: m[0].weight.data[0].normal_(),
    'mask on .data': lambda m: m[0].weight.data.mul_(torch.randn_like(m[0].weight) > 0),
    'prune': lambda m: prune.random_unstructured(m[0], 'weight', 0.5),
    'shrunk': shrunk,
    'numpy': shared,
    'storage': through_storage,
    'inference mode': inference_write,
    'state_dict': lambda m: m.state_dict()['0.weight'].copy_(torch.randn_like(m[0].weight)),
    'load': lambda m: m.load_state_dict(net(len(m)).state_dict()),
    'load, assign': lambda m: m.load_state_dict(net(len(m)).state_dict(), assign=True),
    'parameter': lambda m: setattr(m[0], 'weight', nn.Parameter(torch.randn_like(m[0].weight))),
    'parametrization': parametrized,
    'layer': lambda m: m.__setitem__(1, conv()),
    'new layer': lambda m: m.append(conv()),
    'eps': lambda m: setattr(m[0], 'eps', 0.3),
    'formula': lambda m: (setattr(m[0], 'formula', 'std_eps'), setattr(m[0], 'eps', 0.1)),
    'casts': lambda m: m.float().double(),
}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('edit', EDITS)
def test_the_next_pass_computes_with_the_weights_as_they_are(edit, training):
    model = net(2).train(training)
    before = model(X)
    before.square().sum().backward()
    EDITS[edit](model)
    after = model(X)
    assert not torch.equal(before, after)
    close(after, expected(model))
    with torch.no_grad():
        close(model(X), expected(model))


def test_micro_steps_compute_anew(calls):
    model = net(2)
    for _ in range(2):
        model(X).sum().backward()
    assert calls == [2, 2]


def test_nothing_is_kept_after_a_pass():
    model = net(2)
    kept = []
    model[0].register_forward_hook(lambda m, *_: kept.append(weakref.ref(m.standardized_weight())))
    with torch.no_grad():
        model(X)
    gc.collect()
    assert kept[0]() is None


def test_memory_moved_away_is_free():
    """What a pass used of a model does not outlive it, nor the move of its weights."""
    model = net(2)
    model(X).sum().backward()
    model.zero_grad()
    storage = weakref.ref(model[0].weight)
    model.to('meta')
    refs = [weakref.ref(model), storage]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.parametrize('swap', [True, False])
def test_conversions_that_swap_tensors(swap):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model = net(2)
        model(X).sum().backward()
        model.zero_grad()
        model.float()
        assert model(X.float()).dtype == torch.float32
        model.double().load_state_dict(net(2).state_dict())
        close(model(X), expected(model))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_skip_init_and_meta():
    layer = nn.utils.skip_init(WSConv2d, 4, 4, 3, padding=1, eps=0.1, **FLOAT)
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    close(layer(X), expected([layer]))
    for kind in (WSConv2d, WSConvTranspose2d):
        with pytest.raises(ValueError, match='meta device'):
            conv(kind, device='meta')(X)
        layer = conv(kind)
        layer.bias = nn.Parameter(layer.bias.detach().to('meta'))
        with pytest.raises(ValueError, match='meta device'):
            layer(X)
    assert conv(device='meta')(X.to('meta')).is_meta


def test_harm_is_undone():
    """The loop of torch's tutorial, through .data: the same loss as with torch.optim."""
    losses = []
    for through_data in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(conv(), nn.GroupNorm(2, 4, **FLOAT), nn.ReLU(), conv())
        wsbcn_mm.standardize_once_per_forward(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(10):
            loss = (model(X) - 1).square().mean()
            model.zero_grad()
            loss.backward()
            if through_data:
                for p in model.parameters():
                    p.data.sub_(0.05 * p.grad.data)
            else:
                optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[1] < 1.5
