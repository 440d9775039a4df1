"""The child ``bn`` is a BatchNorm in all that others do to the BatchNorms of a model."""

import copy
import pickle

import pytest
import torch
from torch import nn

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


def test_freezing_batch_norms_by_their_weights():
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.weight.requires_grad = module.bias.requires_grad = False
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
