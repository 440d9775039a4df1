"""A standardized weight is computed once, and never used after anything it depends on changed."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import WSConv2d, WSConvTranspose2d, reference
from wsbcn_mm.backends import use_backend
from wsbcn_mm.layers.weight_cache import StandardizedWeightCache

CONVS = [WSConv2d, WSConvTranspose2d]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def count(monkeypatch):
    """Counts how often a weight is standardized."""
    calls = []
    original = WSConv2d._standardize

    def counted(self, *args):
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(WSConv2d, '_standardize', counted)
    return lambda: len(calls)


def make(conv_class=WSConv2d):
    return conv_class(4, 4, 3, padding=1, dtype=torch.float64)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


X = torch.linspace(-2, 3, 2 * 4 * 5 * 5, dtype=torch.float64).view(2, 4, 5, 5)


def uncached(conv, x=X):
    weight = conv._standardize(conv.weight, conv.eps, conv.formula, conv.weight.dtype)
    if isinstance(conv, WSConvTranspose2d):
        return F.conv_transpose2d(x, weight, conv.bias, padding=1)
    return F.conv2d(x, weight, conv.bias, padding=1)


# ----------------------------------------------------------------------------------------------
# Once


def test_uses_of_one_step_standardize_once(count):
    conv = make()
    for _ in range(3):  # gradient accumulation: micro-steps
        sum(conv(rand(1, 4, 5, 5)).square().mean() for _ in range(5)).backward()  # FPN levels
    assert count() == 1


@pytest.mark.parametrize('conv_class', CONVS)
def test_accumulated_gradients_are_those_without_the_cache(conv_class):
    conv = make(conv_class)
    inputs = [rand(2, 4, 5, 5) for _ in range(4)]
    for x in inputs:
        (conv(x).square() + conv(2 * x).sin()).sum().backward()
    found = conv.weight.grad.clone()
    conv.weight.grad = None
    for x in inputs:
        (uncached(conv, x).square() + uncached(conv, 2 * x).sin()).sum().backward()
    torch.testing.assert_close(found, conv.weight.grad, rtol=1e-12, atol=1e-12)


def test_interleaved_graphs_and_retained_graphs(count):
    """Graphs share the node: each may be differentiated, in any order, more than once."""
    conv = make()
    first, second = conv(X).square().sum(), conv(X + 1).square().sum()
    (b,) = torch.autograd.grad(second, conv.weight, retain_graph=True)
    (a,) = torch.autograd.grad(first, conv.weight)
    (again,) = torch.autograd.grad(second, conv.weight)
    assert count() == 1
    assert torch.equal(b, again)
    expected = torch.autograd.grad(uncached(conv).square().sum(), conv.weight)[0]
    torch.testing.assert_close(a, expected, rtol=1e-12, atol=1e-12)


def test_evaluation_standardizes_once(count):
    conv = make().eval()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(conv(X), uncached(conv))
    assert count() == 1 + 3  # those of uncached()


def test_double_backward_through_the_cache():
    conv = make()
    conv(X).sum().backward()  # the second use is a cached one
    (grad,) = torch.autograd.grad(conv(X).square().sum(), conv.weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), conv.weight)
    weight = conv.weight.detach().requires_grad_()
    y = F.conv2d(X, reference.weight_standardize(weight), conv.bias.detach(), padding=1)
    (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), weight)
    torch.testing.assert_close(second, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointed_uses(use_reentrant):
    conv = make()
    x = rand(2, 4, 5, 5).requires_grad_()

    def twice(x):
        return conv(conv(x).relu())

    y = checkpoint(
        twice, checkpoint(twice, x, use_reentrant=use_reentrant), use_reentrant=use_reentrant
    )
    found = torch.autograd.grad(y.square().sum(), x) if not use_reentrant else None
    if use_reentrant:  # allows .backward() only
        y.square().sum().backward()
        found, x.grad = (x.grad,), None
    expected = torch.autograd.grad(twice(twice(x)).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------
# Never stale


def optimizer_step(conv):
    conv.weight.grad = torch.randn_like(conv.weight)
    torch.optim.SGD([conv.weight], lr=0.1).step()


def fused_step(conv):
    conv.weight.grad = torch.randn_like(conv.weight)
    torch.optim.AdamW([conv.weight], lr=0.1, fused=True).step()


class WritesThroughData(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                p.data.mul_(torch.linspace(1, 2, p.numel(), dtype=p.dtype).view_as(p))


def data_optimizer_step(conv):
    WritesThroughData([conv.weight]).step()


def in_place(conv):
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] += 1


def through_a_view(conv):
    conv.weight.detach().view(-1)[3] = 7


def init(conv):
    nn.init.kaiming_normal_(conv.weight)


def load(conv):
    conv.load_state_dict(make(type(conv)).state_dict())


def load_assign(conv):
    conv.load_state_dict(make(type(conv)).state_dict(), assign=True)


def data_assigned(conv):
    conv.weight.data = torch.randn_like(conv.weight)


def swapped_through_data(conv):
    """OpenMMLab's EMAHook: an edit torch does not count, then the mode is set."""
    conv.weight.data.copy_(torch.randn_like(conv.weight))
    conv.train(conv.training)


def new_parameter(conv):
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def set_eps(conv):
    conv.eps = 0.3


def set_formula(conv):
    conv.formula = 'std_eps'
    conv.eps = 0.1


EDITS = [
    optimizer_step,
    fused_step,
    data_optimizer_step,
    in_place,
    through_a_view,
    init,
    load,
    load_assign,
    data_assigned,
    swapped_through_data,
    new_parameter,
    set_eps,
    set_formula,
]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('edit', EDITS)
@pytest.mark.parametrize('conv_class', CONVS)
def test_an_edit_is_seen(conv_class, edit, grad, training):
    conv = make(conv_class).train(training)
    with torch.set_grad_enabled(grad):
        before = conv(X)
    edit(conv)
    with torch.set_grad_enabled(grad):
        after = conv(X)
    assert not torch.equal(before, after)
    assert torch.equal(after, uncached(conv))


def test_casts_and_moves_are_seen():
    conv = make().eval()
    with torch.no_grad():
        conv(X)
        assert conv.float()(X.float()).dtype == torch.float32
        conv.to(memory_format=torch.channels_last)
        torch.testing.assert_close(conv(X.float()), uncached(conv, X.float()))
        assert conv.to('meta')(X.float().to('meta')).is_meta


def test_gradients_are_recorded_after_a_use_without():
    conv = make()
    with torch.no_grad():
        conv(X)
    assert conv(X).requires_grad
    conv.weight.requires_grad_(False)
    assert not conv.standardized_weight().requires_grad
    conv.weight.requires_grad_(True)
    assert conv.standardized_weight().requires_grad


def test_inference_mode_leaves_nothing_that_training_cannot_use():
    conv = make()
    with torch.inference_mode():
        conv(X)
    conv(X).sum().backward()
    assert conv.weight.grad is not None


def test_autocast_asks_for_its_own_dtype():
    conv = WSConv2d(4, 4, 3)
    assert conv.standardized_weight().dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert conv.standardized_weight().dtype == torch.bfloat16
        y = conv(X.float())
        assert y.dtype == torch.bfloat16
        assert conv.to_plain().weight.dtype == torch.float32
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    assert conv.standardized_weight().dtype == torch.float32


def test_the_backend_asked_for_computes():
    conv = make().eval()
    with torch.no_grad():
        conv(X)
        with use_backend('eager'):
            eager = conv.standardized_weight()
        assert eager is not conv.standardized_weight()


def test_backward_after_an_edit_is_refused_as_torch_does():
    conv = make()
    loss = conv(X).sum()
    in_place(conv)
    with pytest.raises(RuntimeError, match='inplace operation'):
        loss.backward()


def test_parametrized_weights_are_not_cached():
    conv = make()
    scale = nn.Module()
    scale.forward = lambda weight: 2 * weight + 1
    parametrize.register_parametrization(conv, 'weight', scale)
    conv(X).sum().backward()
    conv(X).sum().backward()  # a cached graph would have been freed
    conv.parametrizations.weight.original.data.normal_()
    assert torch.equal(conv(X), uncached(conv))


def test_copies_and_pickles_do_not_carry_the_weight():
    conv = make()
    conv(X)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert other._cache._entry is None
        other.weight.data.normal_()
        assert torch.equal(other(X), uncached(other))
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), conv(X))


def test_ema_hook_of_openmmlab(tmp_path):
    """It swaps weights through .data before and after validation."""
    pytest.importorskip('mmengine')
    from mmengine.hooks import EMAHook
    from mmengine.model import ExponentialMovingAverage

    conv = nn.Sequential(make())
    hook = EMAHook()
    hook.src_model = conv
    hook.ema_model = ExponentialMovingAverage(conv)
    for p in hook.ema_model.parameters():
        p.data.normal_()
    conv.eval()
    with torch.no_grad():
        before = conv(X)
        hook._swap_ema_parameters()
        conv.eval()  # as the validation loop does
        assert torch.equal(conv(X), uncached(conv[0]))
        assert not torch.equal(conv(X), before)
        hook._swap_ema_parameters()
        conv.train()
        assert torch.equal(conv(X), before)


def test_an_object_is_told_from_another_in_its_place():
    """Both parameter and storage are kept alive: an address cannot be used again."""
    cache, seen = StandardizedWeightCache(), set()
    for i in range(50):
        weight = nn.Parameter(torch.full((2, 2), float(i)))
        value = cache.get(weight, 1e-5, 'paper', torch.float32, lambda w, *_: w.detach().clone())
        assert value[0, 0] == i
        seen.add(weight.data_ptr())
