"""wsbcn_mm.checkpoint_layouts: state dicts of exactly the published layouts, key by key.

The files themselves are not here; what is known of their keys and shapes is built. The equality of
whole models is shown in tests/openmmlab/test_convert_checkpoint.py.
"""

import pytest
import torch

from tests.published_layouts import affine, authors_bcn, batch_norm, module, resnet
from wsbcn_mm import reference
from wsbcn_mm.checkpoint_layouts import FORMULAS, SOURCES, convert_state, guess_source

# ---- the published layouts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    'depth, groups, tensors, millions',
    [('50', 1, 426, 25.560424), ('101', 1, 834, 44.555816), ('50', 32, 426, 25.032296)],
)
def test_the_authors_bcn_files(depth, groups, tensors, millions):
    """rn50, rn101, rx50: the numbers of tensors and parameters are those of the files."""
    state = module(resnet(depth, authors_bcn, groups))
    assert len(state) == tensors
    parameters = sum(
        value.numel()
        for key, value in state.items()
        if 'running' not in key and 'tracked' not in key
    )
    assert parameters == pytest.approx(millions * 1e6)
    done = convert_state(state, 'authors-bcn', 'bcn-ws')
    assert not done.left and not done.added
    assert set(done.dropped) == {'fc.weight', 'fc.bias'}
    assert len(done.moved) == tensors - 2
    assert (done.formula, done.affine, done.num_groups) == ('var_eps', 'group', 32)
    assert done.preserves
    keys = dict(done.moved)
    at = 'layer1.0.downsample.1'
    assert keys[f'{at}.pbn.running_mean'] == f'{at}.bn.running_mean'
    assert keys[f'{at}.pbn.weight'] == f'{at}.batch_weight'
    assert keys['layer3.2.bn2.pbn.num_batches_tracked'] == 'layer3.2.bcn2.bn.num_batches_tracked'
    for old, new in keys.items():
        assert torch.equal(done.state[new].flatten(), state[f'module.{old}'].flatten())
    assert done.state['bcn1.weight'].shape == (32,)
    assert done.state['layer4.2.conv3.weight'] is state['module.layer4.2.conv3.weight']


@pytest.mark.parametrize('source', ['authors-gn-ws', 'openmmlab-gn-ws'])
@pytest.mark.parametrize('prefix', [module, dict])
def test_gn_ws_files_keep_their_function(source, prefix):
    state = prefix(resnet('50', affine))
    norms = 53
    done = convert_state(state, source, 'bcn-ws')
    assert not done.left
    assert (done.formula, done.affine, done.preserves) == ('std_eps', 'channel', True)
    assert len(done.moved) == len(state) - 2
    assert len(done.added) == 5 * norms
    bn = done.state['bcn1.bn.running_var'], done.state['bcn1.bn.running_mean']
    scale = done.state['bcn1.batch_weight'] / (bn[0] + 1e-5).sqrt()
    assert torch.allclose(scale, torch.ones(64), rtol=0, atol=1e-7)
    assert not bn[1].any() and not done.state['bcn1.batch_bias'].any()

    same = convert_state(state, source, 'gn-ws')
    assert not same.left and not same.added
    assert (same.formula, same.affine) == ('std_eps', None)
    assert {'gn1.weight', 'layer1.0.gn3.bias', 'layer1.0.downsample.1.weight'} <= set(same.state)


@pytest.mark.parametrize('source', ['openmmlab-bn', 'torchvision', 'timm'])
def test_batch_norm_networks_are_a_starting_point(source):
    torch.manual_seed(0)
    state = resnet('50', batch_norm, shape=torch.randn)
    for key in list(state):
        if key.endswith('running_mean'):
            state[key] = torch.randn_like(state[key])
    done = convert_state(state, source, 'bcn-ws')
    assert not done.left and not done.preserves
    assert (done.formula, done.affine) == ('paper', 'group')
    assert set(done.dropped) == {'fc.weight', 'fc.bias'}
    assert done.state['layer2.0.bcn1.weight'].tolist() == [1.0] * 32
    assert done.state['layer2.0.bcn1.bias'].tolist() == [0.0] * 32
    # The statistics are divided as the weights: exact where a filter has mean 0.
    for conv, norm, new in (
        ('conv1', 'bn1', 'bcn1'),
        ('layer2.0.conv3', 'layer2.0.bn3', 'layer2.0.bcn3'),
        ('layer2.0.downsample.0', 'layer2.0.downsample.1', 'layer2.0.downsample.1'),
    ):
        weight = state[f'{conv}.weight'].double()
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        ratio = (weight / reference.weight_standardize(weight)).flatten(1)[:, 0]
        mean, var = (state[f'{norm}.running_{kind}'].double() for kind in ('mean', 'var'))
        got = [done.state[f'{new}.bn.running_{kind}'].double() for kind in ('mean', 'var')]
        torch.testing.assert_close(got[0], mean / ratio, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got[1], var / ratio.square(), rtol=1e-5, atol=1e-7)

    to_gn = convert_state(state, source, 'gn-ws')
    assert not to_gn.left and not to_gn.preserves
    assert sum('statistics' in why for why in to_gn.dropped.values()) == 3 * 53
    assert to_gn.state['layer1.0.gn2.weight'].shape == (64,)


def test_whole_models_of_openmmlab_keep_what_has_no_norm():
    state = {f'backbone.{k}': v for k, v in resnet('50', affine).items() if k[:2] != 'fc'}
    state |= {
        'neck.lateral_convs.0.conv.weight': torch.zeros(64, 64, 1, 1),
        **affine('neck.lateral_convs.0.gn', 64),
        'rpn_head.rpn_conv.weight': torch.zeros(64, 64, 3, 3),
        'roi_head.bbox_head.fc_cls.weight': torch.zeros(81, 64),
        'backbone.stem.0.weight': torch.zeros(32, 3, 3, 3),
        **affine('backbone.stem.1', 32),
    }
    done = convert_state(state, 'openmmlab-gn-ws', 'bcn-ws')
    assert not done.left and not done.dropped
    keys = dict(done.moved)
    assert keys['neck.lateral_convs.0.gn.weight'] == 'neck.lateral_convs.0.bcn.weight'
    assert keys['roi_head.bbox_head.fc_cls.weight'] == 'roi_head.bbox_head.fc_cls.weight'
    assert 'backbone.stem.1.batch_weight' in done.added  # a deep stem has its norms by number
    assert 'rpn_head.rpn_conv.weight' in done.state


# ---- what does not fit -------------------------------------------------------------------------


def test_nothing_is_lost_silently():
    """Every key is moved, dropped with a reason, or left with a reason."""
    state = module(resnet('50', authors_bcn))
    state['module.aspp.conv1.weight'] = torch.zeros(8, 8, 3, 3)
    state |= authors_bcn('module.aspp.bn1', 64)
    state['module.layer1.0.bn1.pbn.gamma'] = torch.zeros(64)
    del state['module.layer1.0.bn2.pbn.running_var']
    state['module.layer1.0.bn3.pbn.weight'] = torch.zeros(3)
    done = convert_state(state, 'authors-bcn', 'bcn-ws')
    accounted = {old for old, _ in done.moved} | set(done.dropped) | set(done.left)
    assert {key.removeprefix('module.') for key in state} <= accounted
    assert 'aspp.conv1.weight' in done.left and 'aspp.bn1.pbn.running_mean' in done.left
    assert 'no such tensor' in done.left['layer1.0.bn1.pbn.gamma']
    assert done.left['layer1.0.bn2.pbn.running_var'] == 'is not in the checkpoint'
    assert done.left['layer1.0.bn3.pbn.running_mean'].startswith('shape')


@pytest.mark.parametrize('source', SOURCES)
def test_another_layout_than_the_one_named_is_refused(source):
    layouts = {
        'authors-bcn': authors_bcn,
        'openmmlab-bn': batch_norm,
        'openmmlab-gn-ws': affine,
    }
    for found, norm in layouts.items():
        state = {**norm('bn1', 64), 'conv1.weight': torch.zeros(64, 3, 7, 7)}
        assert guess_source(module(state)) == found
        right = source == found or (
            FORMULAS.get(source) == FORMULAS.get(found) and source != 'authors-bcn'
        )
        if right:
            assert not convert_state(state, source, 'bcn-ws').left
        else:
            with pytest.raises(ValueError, match=f'not in the layout {source!r}\n.*{found!r}'):
                convert_state(state, source, 'bcn-ws')


def test_what_cannot_be_is_refused():
    state = {**authors_bcn('bn1', 64), 'conv1.weight': torch.zeros(64, 3, 7, 7)}
    with pytest.raises(ValueError, match='cannot become GN'):
        convert_state(state, 'authors-bcn', 'gn-ws')
    with pytest.raises(ValueError, match="source must be one of 'authors-bcn'"):
        convert_state(state, 'mmpretrain', 'bcn-ws')
    with pytest.raises(ValueError, match="target must be one of 'bcn-ws'"):
        convert_state(state, 'authors-bcn', 'bn')
    done = convert_state(state, 'authors-bcn', 'bcn-ws')
    with pytest.raises(ValueError, match="looks like 'bcn-ws'"):
        convert_state(done.state, 'authors-bcn', 'bcn-ws')
    with pytest.raises(ValueError, match='48 channels, which 32 groups do not divide'):
        convert_state(batch_norm('bn1', 48), 'torchvision', 'bcn-ws')
    both = {**affine('layer1.0.bn1', 64), **affine('layer1.0.gn1', 64)}
    with pytest.raises(ValueError, match='both become layer1.0.bcn1.weight'):
        convert_state(both, 'openmmlab-gn-ws', 'bcn-ws')


def test_the_source_is_not_changed():
    state = resnet('50', affine)
    before = {key: value.clone() for key, value in state.items()}
    convert_state(state, 'openmmlab-gn-ws', 'bcn-ws')
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())
