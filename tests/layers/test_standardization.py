"""Weights are standardized once per forward pass, and nothing of it is left afterwards."""

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import wsbcn_mm
from wsbcn_mm import WSConv1d, WSConv2d, WSConv3d, WSConvTranspose2d, backends, reference
from wsbcn_mm.layers import comparators, standardization

FLOAT = dict(dtype=torch.float64)
X = torch.linspace(-2, 3, 2 * 4 * 5 * 5, **FLOAT).view(2, 4, 5, 5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    yield
    assert standardization.open_scopes() == 0


@pytest.fixture(params=['nodes', 'eager'])
def backend(request):
    """The backend that brings nodes of its own, where it can be used, and the one of Python."""
    if request.param == 'nodes':
        if backends.BACKENDS['cpu'].unavailable():
            pytest.skip('the CPU kernels are not compiled')
        yield
    else:
        with backends.use_backend('eager'):
            yield


@pytest.fixture
def calls(monkeypatch):
    """What is standardized, in order: the number of weights of each operator call."""
    seen = []
    one, many = wsbcn_mm.backends.autograd.weight_standardize, standardization.Together

    def counted_one(*arguments):
        seen.append(1)
        return one(*arguments)

    def counted_many(weights, *arguments):
        seen.append(len(weights))
        return many(weights, *arguments)

    monkeypatch.setattr(wsbcn_mm.backends.autograd, 'weight_standardize', counted_one)
    monkeypatch.setattr(standardization, 'Together', counted_many)
    return seen


def conv(kind=WSConv2d, **settings):
    return kind(4, 4, 3, padding=1, **FLOAT | settings)


def net(layers=3, attached=True, **settings):
    model = nn.Sequential(*(conv(**settings) for _ in range(layers)))
    if attached:
        wsbcn_mm.standardize_once_per_forward(model)
    return model


def rand(*shape):
    return torch.randn(*shape, **FLOAT)


def expected(model, x=X):
    """What the model computes with its weights as they are, by the specification."""
    for layer in model:
        weight = reference.weight_standardize(layer.weight, layer.eps, layer.formula)
        x = F.conv2d(x, weight, layer.bias, padding=1)
    return x


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return [p.grad for p in model.parameters()]


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


def reference_of(model):
    """Parameters of a copy, with the gradients that autograd finds through the specification."""
    twin = copy.deepcopy(model)
    gradients(twin, expected(twin))
    return list(twin.parameters())


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
    monkeypatch.setattr(standardization, 'CHUNK_BYTES', 2 * model[0].weight.nbytes)
    model(X)
    assert calls == [2, 2, 1]


def test_chunks_follow_the_order_of_use(calls, monkeypatch):
    class Backwards(nn.Sequential):
        def forward(self, x):
            for layer in reversed(self):
                x = layer(x)
            return x

    model = Backwards(*net(4, attached=False))
    wsbcn_mm.standardize_once_per_forward(model)
    monkeypatch.setattr(standardization, 'CHUNK_BYTES', 2 * model[0].weight.nbytes)
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


@pytest.mark.parametrize(
    ('kind', 'shape'),
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


def shrunk(model):
    """Structured pruning: fewer output channels (of the last layer, so that the model runs)."""
    model[-1].weight.data = model[-1].weight.data[:2]
    model[-1].bias.data = model[-1].bias.data[:2]


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


# ----------------------------------------------------------------------------------------------
# Within a pass


def in_one_scope(model, change):
    """Two uses of the first layer in one scope, with a change between them."""
    with wsbcn_mm.standardized_once(model):
        model(X)
        change()
        found = model(X)
    close(found, expected(model))
    return found


CHANGES = {
    'in place': lambda m: m[0].weight.detach().mul_(torch.arange(1.0, 4.0, **FLOAT)),
    'through a view': lambda m: m[0].weight.detach().view(-1)[3].fill_(7),
    'load': EDITS['load'],
    'load, assign': EDITS['load, assign'],
    'parameter': EDITS['parameter'],
    '.data = ': EDITS['.data = '],
    'shrunk': shrunk,
    'eps': EDITS['eps'],
    'formula': EDITS['formula'],
    'layer': EDITS['layer'],
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('block', [wsbcn_mm.standardized_once, wsbcn_mm.weights_do_not_change])
def test_changes_that_torch_counts_are_seen_inside_a_scope(change, block):
    model = net(2)
    with block(model), torch.no_grad():
        before = model(X)
        CHANGES[change](model)
        after = model(X)
        close(after, expected(model))
    assert not torch.equal(before, after)


def test_a_block_around_a_whole_training_loop_is_right_all_the_same():
    model = net(2)
    with wsbcn_mm.standardized_once(model):
        for _ in range(2):
            model(X).square().sum().backward()
            for p in model.parameters():
                p.data.sub_(1e-3 * p.grad)
            close(model(X), expected(model))
    with wsbcn_mm.weights_do_not_change(model):  # not meant for it, but optimizers are counted
        model(X).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        close(model(X), expected(model))


def test_the_longer_scope_standardizes_once(calls):
    model = net(3).eval()
    with torch.no_grad(), wsbcn_mm.weights_do_not_change(model):
        for x in (X, X[:, :, :3], X):
            close(model(x), expected(model, x))
    assert calls == [3]
    model[0].weight.data.normal_()
    with torch.no_grad():
        close(model(X), expected(model))


def test_gradients_of_micro_steps_in_the_longer_scope(backend):
    model = net(2)
    inputs = [rand(1, 4, 5, 5) for _ in range(3)]
    with wsbcn_mm.weights_do_not_change(model):
        for x in inputs:
            model(x).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    twin = copy.deepcopy(model)
    close(found, gradients(twin, torch.cat([expected(twin, x) for x in inputs])))


def test_gradients_are_recorded_where_they_are_asked_for(backend):
    """A teacher's pass without gradients, and a student's, in one scope."""
    model = net(2)
    with wsbcn_mm.standardized_once(model):
        with torch.no_grad():
            assert not model(X).requires_grad
        with torch.inference_mode():
            model(X)
        y = model(X)
    close(gradients(model, y), [p.grad for p in reference_of(model)])


def test_the_backend_asked_for_computes():
    model = net(1)
    with wsbcn_mm.standardized_once(model):
        first = model[0].standardized_weight()
        with backends.use_backend('eager'):
            assert model[0].standardized_weight() is not first


def test_functional_call_computes_with_its_weights():
    model = net(2)
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    twin = net(2)
    twin.load_state_dict(others)
    with wsbcn_mm.standardized_once(model):
        own = model(X)
        close(torch.func.functional_call(model, others, (X,)), expected(twin))
        close(model(X), own)


def test_function_transforms_leave_nothing_behind():
    model = net(2)
    with wsbcn_mm.weights_do_not_change(model):
        torch.func.vjp(model, X)[1](torch.ones_like(X))
        torch.func.grad(lambda x: model(x).sum())(X)
        y = model(X)
    close(gradients(model, y), [p.grad for p in reference_of(model)])


def test_traces_follow_the_weights():
    model = net(2).eval()
    with torch.no_grad(), wsbcn_mm.weights_do_not_change(model):
        model(X)
        traced = torch.jit.trace(model, X, check_trace=False)
    other = net(2)
    traced.load_state_dict(other.state_dict())
    with torch.no_grad():
        close(traced(X), expected(other))


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses import FakeTensorMode

    model = net(2)
    with wsbcn_mm.weights_do_not_change(model):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model[0].standardized_weight()
        assert type(model[0].standardized_weight()) is torch.Tensor


def test_compiled_code_is_one_graph_with_the_weights_as_they_are():
    model = net(2)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    close(compiled(X), expected(model))
    model[0].weight.data.normal_()
    with wsbcn_mm.weights_do_not_change(model):
        close(compiled(X), expected(model))


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('whole', [True, False])
def test_checkpointing(use_reentrant, whole, backend):
    """What runs again in the backward pass computes for itself; shared nodes add up."""

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(2, attached=False)

        def forward(self, x):
            x = self.body(x)
            for _ in range(2):
                x = x if whole else checkpoint(self.body, x, use_reentrant=use_reentrant)
            return self.body(x)

    model = Repeated()
    wsbcn_mm.standardize_once_per_forward(model)
    x = X.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=use_reentrant) if whole else model(x)
    found = gradients(model, y)
    twin = copy.deepcopy(model.body)
    wanted = expected(twin, expected(twin)) if whole else X
    for _ in range(0 if whole else 4):
        wanted = expected(twin, wanted)
    close(found, gradients(twin, wanted))


def test_backward_after_an_edit_is_refused_as_torch_does(backend):
    model = net(2)
    loss = model(X).sum()
    with torch.no_grad():
        model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match='inplace operation'):
        loss.backward()


# ----------------------------------------------------------------------------------------------
# Scopes


def test_the_outermost_model_opens_the_scope(calls):
    model = nn.Sequential(net(2), net(1))
    wsbcn_mm.standardize_once_per_forward(model)
    wsbcn_mm.standardize_once_per_forward(model)  # twice is as once
    model(X)
    assert calls == [3]
    model[0](X)
    assert calls == [3, 2]


def test_a_model_inside_that_is_not_a_part_has_a_scope_of_its_own(calls):
    teacher = net(2)

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(1, attached=False)

        def forward(self, x):
            first = teacher(x)
            teacher[0].weight.data.normal_()  # the average that it is
            return self.body(x) + first + teacher(x)

    student = Student()
    wsbcn_mm.standardize_once_per_forward(student)
    student(X)
    assert calls == [2, 1, 2]


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_nothing(error):
    class Fails(nn.Module):
        failing = True

        def forward(self, x):
            if self.failing:
                raise error
            return x

    model = nn.Sequential(conv(), Fails(), conv())
    wsbcn_mm.standardize_once_per_forward(model)
    kept = contextlib.suppress(error)
    with kept:
        model(X)
    model[0].weight.data.normal_()
    close(model[0](X), expected(model[:1]))  # not even for a part that opens no scope
    Fails.failing = False
    close(model(X), expected([model[0], model[2]]))
    with pytest.raises(error), wsbcn_mm.weights_do_not_change(model):
        raise error


def test_undone():
    model = net(1, attached=False)
    undo = wsbcn_mm.standardize_once_per_forward(model)
    undo()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(standardization.open_scopes()))
    model(X)
    assert seen == [0]


def test_copies_and_pickles_do_the_same(calls):
    model = net(2)
    with wsbcn_mm.standardized_once(model):
        model(X)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        other[0].weight.data.normal_()
        calls.clear()
        close(other(X), expected(other))
        assert calls == [2]


def test_threads_do_not_meet():
    model = net(3).eval()
    wanted, wrong = model(X).detach(), []

    def work(k):
        for i in range(20):
            with torch.set_grad_enabled(bool((i + k) % 2)):
                y = model(X)
                if y.requires_grad:
                    y.sum().backward()
                if not torch.equal(y.detach(), wanted):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    with wsbcn_mm.weights_do_not_change(model):
        for thread in threads:
            thread.start()
        work(3)
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_parametrized_weight_is_not_read_ahead():
    """Reading it computes it: spectral norm moves its vectors at every training step."""
    model = nn.Sequential(conv(), nn.utils.parametrizations.spectral_norm(conv()))
    wsbcn_mm.standardize_once_per_forward(model)
    twin = copy.deepcopy(model)
    with wsbcn_mm.standardized_once(model):
        model[0](X)
    for a, b in zip(model.buffers(), twin.buffers()):
        assert torch.equal(a, b)
    y = model(X)
    y.sum().backward()
    assert model[1].parametrizations.weight.original.grad is not None


def test_the_methods_that_diagnostics_read():
    for kind, settings in ((WSConv2d, {'groups': 2}), (WSConvTranspose2d, {'groups': 2})):
        for formula in ('paper', 'std_eps', 'var_eps'):
            layer = conv(kind, formula=formula, eps=0.1, **settings)
            rows = layer.filters(layer.weight)
            assert rows.shape == (4, 2 * 9)
            close(
                (rows - rows.mean(1, keepdim=True)) / layer.denominators()[:, None],
                layer.filters(layer.standardized_weight()),
            )
