"""The child ``bn`` is a BatchNorm in all that others do to the BatchNorms of a model."""

import copy
import pickle

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from wsbcn_mm import BatchChannelNorm1d, BatchChannelNorm2d, BatchChannelNorm3d, WSConv2d

NORMS = {
    BatchChannelNorm1d: nn.BatchNorm1d,
    BatchChannelNorm2d: nn.BatchNorm2d,
    BatchChannelNorm3d: nn.BatchNorm3d,
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4), nn.ReLU())


@pytest.mark.parametrize('norm_class', NORMS)
def test_it_is_the_batch_norm_with_the_layers_scale_and_shift(norm_class):
    norm = norm_class(8, 4)
    assert isinstance(norm.bn, NORMS[norm_class])
    assert norm.bn.weight is norm.batch_weight and norm.bn.bias is norm.batch_bias
    # Loops over BatchNorms and GroupNorms would step each twice.
    assert not list(norm.bn.parameters()) and len(list(norm.parameters())) == 4
    assert 'bn.weight' not in norm.state_dict()
    # What OpenMMLab's rules for layers look at, as for torch's own class.
    bases = {base.__name__ for base in type(norm.bn).__bases__}
    assert {NORMS[norm_class].__name__, '_BatchNorm'} <= bases


def test_called_by_itself_it_is_stage_one():
    norm, x = BatchChannelNorm2d(8, 4).eval(), torch.randn(2, 8, 3, 3)
    plain = nn.BatchNorm2d(8).eval()
    for value, target in ((norm.batch_weight, plain.weight), (norm.batch_bias, plain.bias)):
        nn.init.normal_(value)
        target.data.copy_(value)
    assert torch.equal(norm.bn(x), plain(x))


@pytest.mark.parametrize(
    'initialise',
    [
        lambda m: (nn.init.constant_(m.weight, 1), nn.init.constant_(m.bias, 0)),
        lambda m: (nn.init.normal_(m.weight, 1.0, 0.02), nn.init.zeros_(m.bias)),
        lambda m: (m.weight.data.fill_(0.5), m.bias.data.zero_()),
        lambda m: m.reset_parameters(),
    ],
)
def test_loops_that_initialise_batch_norms(initialise):
    """PIDNet, DDRNet and CenterNet of OpenMMLab do, and whoever copied torchvision."""
    model = net()
    plain = nn.BatchNorm2d(8)
    for module, seed in ((plain, 1), *((m, 1) for m in model.modules())):
        if isinstance(module, nn.BatchNorm2d):
            torch.manual_seed(seed)
            initialise(module)
    assert torch.equal(model[1].batch_weight, plain.weight)
    assert torch.equal(model[1].batch_bias, plain.bias)
    assert model(torch.randn(1, 3, 6, 6)).isfinite().all()


def freeze_by_name(bn):
    bn.weight.requires_grad = bn.bias.requires_grad = False


@pytest.mark.parametrize('freeze', [freeze_by_name, lambda bn: bn.requires_grad_(False)])
def test_freezing_batch_norms_by_their_weights(freeze):
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            freeze(module)
    model(torch.randn(1, 3, 6, 6)).sum().backward()
    norm = model[1]
    assert norm.batch_weight.grad is None and norm.batch_bias.grad is None
    assert norm.bn.num_batches_tracked == 0


def test_parameter_groups_by_kinds_of_layers_hold_every_parameter_once():
    groups, model = ([], [], []), net()
    for module in model.modules():
        if isinstance(getattr(module, 'bias', None), nn.Parameter):
            groups[2].append(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            groups[1].append(module.weight)
        elif isinstance(getattr(module, 'weight', None), nn.Parameter):
            groups[0].append(module.weight)
    optimizer = torch.optim.SGD([dict(params=group) for group in groups], 0.1)
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert held == {id(p) for p in model.parameters()}


def test_a_new_scale_set_on_it_is_the_layers():
    norm, scale = BatchChannelNorm2d(8, 4), nn.Parameter(torch.full((8,), 2.0))
    norm.bn.weight = scale
    assert norm.batch_weight is scale
    assert list(dict(norm.named_parameters())) == ['weight', 'bias', 'batch_weight', 'batch_bias']


def test_zeroing_all_weights_below_the_layer_leaves_one_scale():
    """Residual branches that start as nothing: mmengine applies a constant to the whole subtree."""

    def zero(module):
        if getattr(module, 'weight', None) is not None:
            nn.init.zeros_(module.weight)

    norm = BatchChannelNorm2d(8, 4)
    norm.apply(zero)
    assert not norm.weight.any() and (norm.batch_weight == 1).all()
    nn.init.zeros_(norm.bn.weight)  # said by name it is meant
    assert not norm.batch_weight.any()
    BatchChannelNorm2d(8, 4, affine=None).apply(zero)
    BatchChannelNorm2d(8, 4, device='meta').apply(zero)


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle']
)
def test_copies_belong_to_the_copied_layer(copied):
    model = net()
    other = copied(model)
    assert other[1].bn.weight is other[1].batch_weight is not model[1].batch_weight
    assert [id(m) for m in other.modules()].count(id(other[1])) == 1


def test_without_running_statistics_the_layer_says_so():
    """Test-time adaptation takes them away from every BatchNorm."""
    norm = BatchChannelNorm2d(8, 4)
    norm.bn.track_running_stats, norm.bn.running_mean, norm.bn.running_var = False, None, None
    for training in (True, False):
        with pytest.raises(RuntimeError, match='bn has no running statistics'):
            norm.train(training)(torch.randn(1, 8, 3, 3))
    norm.double()


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('grad', [True, False])
def test_without_its_counter_the_layer_evaluates_and_does_not_train(mode, grad):
    norm, x = BatchChannelNorm2d(8, 4, mode=mode), torch.randn(2, 8, 3, 3)
    expected = norm.eval()(x)
    norm.bn.num_batches_tracked = None
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(norm(x), expected)
        with pytest.raises(RuntimeError, match='num_batches_tracked must be a 0-d int64 tensor'):
            norm.train()(x)
    torch.testing.assert_close(norm.bn.running_mean, torch.zeros(8))


def test_its_eps_is_the_layers():
    """Networks of EfficientNet's kind set it in every BatchNorm."""
    norm, other = BatchChannelNorm2d(8, 4), BatchChannelNorm2d(8, 4, eps=0.5)
    norm.bn.eps = 0.5
    x = torch.randn(2, 8, 3, 3)
    assert norm.eps == 0.5 and torch.equal(norm(x), other(x))
    norm.eps = 0.25
    assert norm.bn.eps == 0.25
    with pytest.raises(ValueError, match='eps must be finite'):
        norm.bn.eps = -1.0
    norm.bn.eps = numpy.float32(0.5)
    assert norm.bn.eps == norm.eps == 0.5 and type(norm.eps) is float


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_its_training_alone_counts(mode):
    """Adaptation to other images: BatchNorms that train in a model that evaluates."""
    model, trained = (nn.Sequential(BatchChannelNorm2d(8, 4, mode=mode)) for _ in range(2))
    model.eval()[0].bn.train()
    x = torch.randn(4, 8, 3, 3) + 1
    assert torch.equal(model(x), trained(x))
    assert torch.equal(model[0].bn.running_mean, trained[0].bn.running_mean)
    assert model[0].bn.num_batches_tracked == 1


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_what_it_does_not_track_it_does_not_update(mode):
    """Virtual adversarial training switches ``track_running_stats`` off for some passes."""
    norm, other = (BatchChannelNorm2d(8, 4, mode=mode) for _ in range(2))
    x = torch.randn(2, 8, 3, 3) + 1
    before = copy.deepcopy(norm.bn.state_dict())
    norm.bn.track_running_stats = False
    expected = other(x) if mode == 'batch' else other.eval()(x)
    torch.testing.assert_close(norm(x), expected)
    for name, value in norm.bn.state_dict().items():
        assert torch.equal(value, before[name]), name
    norm.bn.track_running_stats = True
    norm(x)
    assert norm.bn.num_batches_tracked == 1


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('training', [True, False])
def test_its_forward_hooks_see_input_and_result_of_the_stage(mode, training):
    """Those who count inputs, or compare the statistics of one with the running ones."""
    norm, x, seen = BatchChannelNorm2d(8, 4, mode=mode).train(training), torch.randn(2, 8, 3, 3), []
    first = norm.bn.register_forward_pre_hook(lambda bn, args: seen.append((bn, *args)))
    last = norm.bn.register_forward_hook(lambda bn, args, result: seen.append((bn, *args, result)))
    plain = nn.BatchNorm2d(8).train(training and mode == 'batch')
    norm(x)
    assert seen[0] == (norm.bn, x) and seen[1][:2] == (norm.bn, x)
    if training and mode == 'estimate':
        plain.load_state_dict({**plain.state_dict(), **norm.bn.state_dict()})
    torch.testing.assert_close(seen[1][2], plain(x).detach())
    first.remove(), last.remove()
    norm(x)
    assert len(seen) == 2
    norm.bn.register_forward_hook(Returned())  # as who looks at all modules
    copied = pickle.loads(pickle.dumps(norm)).half()
    copied(input=x)  # in another dtype than its own
    assert copied.bn._forward_hooks
    norm.eval()
    expected = norm(x + 1)
    norm.bn.register_forward_pre_hook(lambda bn, args: (args[0] + 1,))
    assert torch.equal(norm(x), expected)
    norm.bn.register_forward_hook(lambda bn, args, result: result + 1)
    with pytest.raises(RuntimeError, match='cannot replace its result'):
        norm(x)


class Returned:
    def __call__(self, bn, args, result):
        return result


def test_what_it_is_never_called_for():
    """Its forward method does not run: the layer computes both stages at once."""
    norm, seen = BatchChannelNorm2d(8, 4), []
    norm.bn.register_full_backward_hook(lambda *_: seen.append('backward'))
    norm.bn.register_full_backward_pre_hook(lambda *_: seen.append('before'))
    norm.bn.forward = lambda x: seen.append('forward')
    norm(torch.randn(2, 8, 3, 3, requires_grad=True)).pow(2).sum().backward()
    assert not seen


def test_a_pre_hook_may_hand_the_input_on_by_name():
    norm, x = BatchChannelNorm2d(8, 4).eval(), torch.randn(2, 8, 3, 3)
    expected = norm(x + 1)
    norm.bn.register_forward_pre_hook(
        lambda bn, args, kwargs: ((), dict(input=args[0] + 1)), with_kwargs=True
    )
    assert torch.equal(norm(x), expected)


def test_its_hooks_lie_within_those_of_the_layer():
    """Profilers keep a stack of what runs."""
    model, stack, seen = net(), [], []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, args: stack.append(m))
        module.register_forward_hook(lambda m, args, y: seen.append(stack.pop() is m))
    model(torch.randn(1, 3, 6, 6))
    assert not stack and all(seen) and len(seen) == 5


def test_a_copy_that_is_put_back_belongs_to_the_layer():
    norm, x = BatchChannelNorm2d(8, 4), torch.randn(2, 8, 3, 3)
    before = copy.deepcopy(norm.bn)
    norm(x)
    norm.bn = before
    assert norm.bn.weight is norm.batch_weight and norm.bn.num_batches_tracked == 0
    norm.bn.requires_grad_(False)
    assert not norm.batch_weight.requires_grad
    with pytest.raises(ValueError, match='momentum must lie in'):
        norm.bn = nn.BatchNorm2d(8, momentum=3)
    saved, norm.eps = norm.bn, 0.25
    norm.bn = nn.BatchNorm2d(8, momentum=1)
    assert norm.momentum == 1.0 and type(norm.momentum) is float and norm.eps == 1e-5
    norm.bn = saved
    assert norm.bn is saved and norm.eps == norm.bn.eps == 0.25
    with pytest.raises(ValueError, match='eps must be finite'):
        norm.bn = nn.BatchNorm2d(8, eps=-1)
    assert norm.bn is saved


def test_put_back_it_brings_its_scale():
    """An optimizer that was made before steps what the layer computes with."""
    norm = BatchChannelNorm2d(8, 4)
    child, before = norm.bn, dict(norm.named_parameters())
    for other in (nn.BatchNorm2d(8), nn.BatchNorm2d(8)):
        norm.bn = other
        assert norm.batch_weight is other.weight
    norm.bn = child
    assert all(norm.get_parameter(name) is value for name, value in before.items())
    norm.bn = nn.BatchNorm2d(8)
    prune.l1_unstructured(norm, 'batch_weight', 0.25)
    with pytest.raises(ValueError, match='batch_weight of the layer is pruned'):
        norm.bn = child


def test_an_average_does_not_go_on_with_other_statistics():
    norm, x = BatchChannelNorm2d(8, 4, momentum=1.0), torch.randn(2, 8, 5, 5)
    norm(x)
    norm.bn = nn.BatchNorm2d(8, momentum=1.0)
    norm(x + 5)
    norm.load_state_dict(norm.state_dict())
    norm(x)
    torch.testing.assert_close(norm.bn.running_var, x.var((0, 2, 3), unbiased=False))


def test_what_it_is_replaced_by():
    """Frozen BatchNorms of other libraries freeze; what has no statistics is refused."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.register_buffer('running_mean', torch.full((width,), 0.5))
            self.register_buffer('running_var', torch.ones(width))

    norm, x = BatchChannelNorm2d(8, 4), torch.randn(2, 8, 3, 3)
    norm.bn.running_mean.fill_(0.5)
    expected = norm.eval()(x)
    norm.train().bn = FrozenBatchNorm2d(8)
    torch.testing.assert_close(norm.double().float()(x), expected)
    assert 'momentum=0.0' in repr(norm)
    norm.bn = nn.Identity()
    with pytest.raises(RuntimeError, match='bn was replaced by a Identity'):
        norm(x)


def test_converted_it_is_the_channel_stage_all_the_same():
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(net())[1]
    assert isinstance(norm.bn, nn.SyncBatchNorm)
    assert norm.bn.weight is norm.batch_weight and 'bn.weight' not in norm.state_dict()
    nn.init.constant_(norm.bn.weight, 2)
    norm.bn = nn.BatchNorm2d(8, affine=False)  # and back, as mmengine does
    assert norm.bn.weight is norm.batch_weight and norm.batch_weight.eq(2).all()
    norm.bn = plain = nn.BatchNorm2d(8, eps=0.1)  # of one with an affine, by hand
    assert type(plain) is nn.BatchNorm2d and norm.bn.running_mean is plain.running_mean
    assert norm.bn.weight is norm.batch_weight is plain.weight and norm.eps == 0.1
    assert norm.batch_weight.eq(1).all() and len(list(norm.parameters())) == 4

    class SyncBatchNorm(nn.Module):
        """As mmcv's, which is no BatchNorm of torch."""

        def __init__(self):
            super().__init__()
            self.__dict__.update(vars(nn.BatchNorm2d(8, affine=False)), group='ranks')

    norm.bn = SyncBatchNorm()
    assert isinstance(norm.bn, nn.SyncBatchNorm) and norm.bn.process_group == 'ranks'
    assert norm.bn.weight is norm.batch_weight


def test_a_forward_of_the_child_is_said_not_to_be_called():
    """Test-time adaptation sets one on every BatchNorm, or puts in a class of its own."""

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return x

    layer = BatchChannelNorm2d(8, 4)
    with pytest.warns(UserWarning, match='forward of its own, which is not called'):
        layer.bn.forward = lambda x: x
    with pytest.warns(UserWarning, match='forward of its own, which is not called'):
        layer.bn = Own(8)


def test_loops_that_go_by_the_name_of_a_class():
    layer = BatchChannelNorm2d(8, 4)

    def visit(module):
        if type(module).__name__.find('BatchNorm2d') != -1:
            nn.init.normal_(module.weight.data, 1.0, 0.02)
            module.eval()

    layer.apply(visit)
    assert (layer.batch_weight != 1).all() and not layer.bn.training
