"""What a scope sees while it is open, what it leaves alone, and that it always ends."""

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
from torch.utils.checkpoint import checkpoint

import wsbcn_mm
from tests.layers.standardized import (
    FLOAT,
    X,
    close,
    conv,
    expected,
    gradients,
    net,
    rand,
    reference_of,
    shrunk,
)
from wsbcn_mm import WSConv2d, WSConvTranspose2d, backends, reference
from wsbcn_mm.backends import cpu
from wsbcn_mm.layers import standardization
from wsbcn_mm.layers.scopes import Scope

# ----------------------------------------------------------------------------------------------
# Within a pass


def test_a_model_inside_a_model_shares_all_the_same(calls):
    model = nn.Sequential(conv(), nn.Sequential(conv()))
    for each in (model, model[1]):
        wsbcn_mm.standardize_once_per_forward(each)
    model(X)
    assert calls == [2]


CHANGES = {
    'in place': lambda m: m[0].weight.detach().mul_(torch.arange(1.0, 4.0, **FLOAT)),
    'through a view': lambda m: m[0].weight.detach().view(-1)[3].fill_(7),
    'load': lambda m: m.load_state_dict(net(2).state_dict()),
    'load, assign': lambda m: m.load_state_dict(net(2).state_dict(), assign=True),
    'parameter': lambda m: setattr(m[0], 'weight', nn.Parameter(torch.randn_like(m[0].weight))),
    '.data = ': lambda m: setattr(m[0].weight, 'data', torch.randn_like(m[0].weight)),
    'shrunk': shrunk,
    'eps': lambda m: setattr(m[0], 'eps', 0.3),
    'formula': lambda m: (setattr(m[0], 'formula', 'std_eps'), setattr(m[0], 'eps', 0.1)),
    'layer': lambda m: m.__setitem__(1, conv()),
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


def test_a_block_around_a_whole_training_loop_is_right_all_the_same(backend):
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


def test_compiled_code_may_make_modules():
    """That they are counted does not compile it anew."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def makes(x):
        activation = nn.Sequential(nn.ReLU())
        return activation(x)

    made = torch.compile(makes, backend=backend)
    for _ in range(3):
        made(X)
    assert len(graphs) == 1


def test_compiled_code_is_one_graph_with_the_weights_as_they_are():
    torch._dynamo.reset()  # what other tests have compiled counts for the same forward
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


@pytest.mark.skipif(cpu.entries is None, reason='the C++ extension is not compiled')
def test_a_usual_weight_is_standardized_and_found_without_python(monkeypatch):
    """Uses of layers ask the extension alone."""
    model, asked, first_uses = net(3), [], []
    get = Scope.get
    monkeypatch.setattr(Scope, 'get', lambda *arguments: asked.append(1) or get(*arguments))
    model[2].register_standardized_hook(first_uses.append)
    with wsbcn_mm.standardized_once(model):
        for _ in range(2):
            close(model(X), expected(model))
    # The last one has a hook, which its first use has to call.
    assert len(asked) == 1
    assert len(first_uses) == 1


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


def test_a_block_may_end_in_another_thread():
    block = wsbcn_mm.weights_do_not_change(net(2))
    block.__enter__()
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert standardization.open_scopes() == 0


@pytest.mark.parametrize('block', [wsbcn_mm.standardized_once, wsbcn_mm.weights_do_not_change])
def test_a_block_of_a_generator_is_open_while_it_waits(block, calls):
    """What its caller does meanwhile is inside; changes that torch counts are seen all the same."""
    model = net(2)

    def results():
        with block(model):
            while True:
                yield model(X)

    generator = results()
    with torch.no_grad():
        close(next(generator), expected(model))
        close(model(X), expected(model))
        assert calls == [2] and standardization.open_scopes() == 1
        model[0].weight.mul_(torch.arange(1.0, 4.0, **FLOAT))
        close(next(generator), expected(model))
        generator.close()
        assert standardization.open_scopes() == 0
        model[0].weight.data.normal_()
        close(model(X), expected(model))


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


def test_conversions_end_what_a_block_holds():
    """They write through ``.data``, and the memory of before is soon used again."""
    for _ in range(20):
        model = net(2)
        with torch.no_grad(), wsbcn_mm.weights_do_not_change(model):
            model(X)
            model.half()
            model.double()
            y = model(X)
        with torch.no_grad():
            close(y, model(X))


def test_wrappers_of_layers_are_no_layers():
    """They hand on what they wrap, attributes too."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net(2)
    expected = model(X)
    model[0] = checkpoint_wrapper(model[0])
    with wsbcn_mm.weights_do_not_change(model):
        close(model(X), expected)


def test_scopes_that_are_made_and_not_needed_keep_nothing():
    """Not until the next garbage collection either: a pass has images, and its frame has them."""
    inner = net(2)
    model = nn.Sequential(inner, inner)
    wsbcn_mm.standardize_once_per_forward(model)
    made, passed = [], []

    def note(_module, _args, output):
        made.extend(weakref.ref(scope) for scope in standardization.open_here())
        passed.append(weakref.ref(output))

    inner.register_forward_hook(note)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), wsbcn_mm.weights_do_not_change(model):
            for _ in range(3):
                model(X)
        assert len(passed) == 6 and not any(ref() is not None for ref in passed)
        assert made and not any(ref() is not None for ref in made)
    finally:
        gc.enable()


@pytest.mark.parametrize('layers', [1, 3])
def test_compiled_autograd_around_a_scope(layers):
    # Not above: it imports Triton, which decides then whether it interprets.
    from torch._dynamo import compiled_autograd

    model = net(layers)
    wanted = reference_of(model)
    with compiled_autograd._enable(torch.compile(backend='eager')):
        found = gradients(model, model(X))
    for grad, parameter in zip(found, wanted, strict=True):
        close(grad, parameter.grad)
    torch._dynamo.reset()


def test_a_class_whose_layers_answer_each_for_itself():
    class Doubled(WSConv2d):
        special = False

        def standardizes_rows(self):
            return not self.special

        def standardize(self, weight, dtype):
            w_hat = super().standardize(weight, dtype)
            return 2 * w_hat if self.special else w_hat

    model = net(3, kind=Doubled)
    model[1].special = True
    wanted = X
    for layer in model:
        w_hat = reference.weight_standardize(layer.weight, layer.eps, layer.formula)
        wanted = F.conv2d(wanted, w_hat * (1 + layer.special), layer.bias, padding=1)
    for _ in range(2):
        close(model(X), wanted)
