"""One test per trap of OpenMMLab that lies in the layers themselves.

Each test builds the real host object from a config dict, and where it is cheap shows first how a
naive design (naive.py) falls into the trap, so that the trap is known to be there. The traps that
lie in configs are in test_traps_configs.py. Losses are inner products with random cotangents: the
sum of a normalised output has gradient zero.
"""

import pytest

pytest.importorskip('mmengine', reason="the traps are OpenMMLab's")
pytest.importorskip('mmcv', reason='layers are built by mmcv')
pytest.importorskip('mmdet', reason="backbones and heads are mmdet's")
pytest.importorskip('mmseg', reason="the ASPP head is mmseg's")

import copy
import importlib
from functools import partial

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer, fuse_conv_bn
from mmdet.models.necks import CTResNetNeck
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.runner.checkpoint import load_state_dict
from mmseg.models.backbones import PIDNet
from mmseg.models.decode_heads import DDRHead
from torch import nn

from tests.openmmlab.hosts import (
    BCN,
    MODES,
    WS,
    backward,
    image,
    norms_of,
    relative,
    resnet,
    statistics,
    unchanged,
)
from tests.openmmlab.naive import BatchEstimateNorm, SubclassBCN, WrapperBCN
from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.convert import convert_model

AUTO = dict(type='BCN', num_groups='auto')


def test_trap_01_attribute_names_do_not_collide_with_those_of_batch_norm():
    """mmcv infers attribute names from class names: one with "batch" in it becomes ``bn1``.

    Without `_abbr_` a plain BN checkpoint loads silently into tensors that mean something else.
    """
    batch_norm = resnet(norm_cfg=dict(type='BN'), conv_cfg=None)
    for parameter in batch_norm.parameters():
        nn.init.constant_(parameter, 7.0)

    naive = resnet(norm_cfg=dict(type=BatchEstimateNorm))
    load_state_dict(naive, batch_norm.state_dict())  # as the host: strict=False
    assert naive.bn1.weight[0] == 7  # the trap

    ours = resnet()
    block = ours.layer1[0]
    assert [block.norm1_name, block.norm2_name, block.norm3_name] == ['bcn1', 'bcn2', 'bcn3']
    assert ours.norm1 is ours.bcn1
    load_state_dict(ours, batch_norm.state_dict())
    for name, parameter in ours.named_parameters():
        is_conv = 'conv' in name or '.downsample.0.' in name
        assert (parameter == 7).any() == is_conv, name
    # `norm`, `conv` and `activate` would recurse or replace another layer of a ConvModule.
    module = ConvModule(3, 8, 3, conv_cfg=WS, norm_cfg=BCN)
    assert [name for name, _ in module.named_children()] == ['conv', 'bcn', 'activate']


def test_trap_02_constructor_takes_the_channel_count_first_and_eps():
    """mmcv calls ``layer(num_features, eps=..., **cfg)`` unless the class is nn.GroupNorm itself.

    A subclass of nn.GroupNorm that keeps its signature gets the channel count as ``num_groups``.
    """

    class KeepsSignature(nn.GroupNorm):
        pass

    with pytest.raises(TypeError, match='num_groups'):
        build_norm_layer(dict(type=KeepsSignature, num_groups=2), 16)

    norm = build_norm_layer(BCN, 16)[1]
    assert (norm.num_channels, norm.num_groups, norm.eps, norm.bn.eps) == (16, 2, 1e-5, 1e-5)
    assert all(p.requires_grad for p in norm.parameters())
    norm = build_norm_layer(dict(BCN, eps=1e-3, requires_grad=False), 16)[1]
    assert (norm.eps, norm.bn.eps) == (1e-3, 1e-3)
    assert len(list(norm.parameters())) == 4
    assert not any(p.requires_grad for p in norm.parameters())


def branch_gradient(norm_cfg):
    """Largest gradient in the three convolutions and the last norm's scales of a first step."""
    model = resnet(norm_cfg=norm_cfg, zero_init_residual=True)
    model.init_weights()
    block = model.layer1[0]
    backward(model(image())[0])
    scales = [p.grad for n, p in block.norm3.named_parameters() if n.endswith('weight')]
    convs = [getattr(block, f'conv{i}').weight.grad for i in (1, 2, 3)]
    return max(g.abs().max().item() for g in convs), max(g.abs().max().item() for g in scales)


def test_trap_03_zero_init_residual_leaves_a_living_branch():
    """From scratch the host zeroes every ``.weight`` below norm3.

    A wrapper around an affine BN then has both scales at 0, and the branch never gets a gradient; a
    subclass of BN normalises zeros and sends back gradients 1/sqrt(eps) too large. With an outer
    ``weight`` alone at 0 the branch adds nothing, and its scale learns.
    """
    assert branch_gradient(dict(type=WrapperBCN)) == (0, 0)  # dead for ever

    model = resnet(zero_init_residual=True)
    model.init_weights()
    norm3 = model.layer1[0].norm3
    assert not norm3.weight.any()
    assert (norm3.batch_weight == 1).all()
    convs, scales = branch_gradient(BCN)
    assert convs == 0 < scales  # as with BN: the scale moves first, then the branch learns
    reference = branch_gradient(dict(type='GN', num_groups=2))
    assert reference[0] == 0
    assert scales < 20 * reference[1]
    naive = branch_gradient(dict(type=SubclassBCN))
    assert naive[1] > 50 * reference[1]


def fold_case(conv_type, norm_cfg, **kwargs):
    """A conv and a norm with statistics of their own, in eval mode."""
    module = ConvModule(4, 8, 3, conv_cfg=dict(type=conv_type), norm_cfg=norm_cfg, **kwargs)
    nn.init.normal_(module.conv.weight, 0.3, 0.2)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(5, 20)
    return module.double().eval()


def test_trap_04_fuse_conv_bn_folds_into_the_standardized_weight():
    """`fuse_conv_bn` multiplies BN into the raw weight: wrong by a factor for any WS convolution.

    mmcv's own ConvWS falls into it without a warning.
    """
    x = image(channels=4).double()
    naive = fold_case('ConvWS', dict(type='BN'))
    before = naive(x)
    assert relative(fuse_conv_bn(naive)(x), before) > 0.1

    ours = fold_case('WSConv2d', dict(type='BN'))
    before = ours(x)
    fused = fuse_conv_bn(ours)
    assert isinstance(fused.bn, nn.Identity)
    assert type(fused.conv) is nn.Conv2d
    torch.testing.assert_close(fused(x), before)


@pytest.mark.parametrize('conv', ['Conv2d', 'WSConv2d'])
def test_trap_04_bcn_survives_fuse_conv_bn(conv):
    """A norm derived from BatchNorm is folded, and its channel stage is gone."""
    x = image(channels=4).double()
    naive = fold_case(conv, dict(type=SubclassBCN))
    before = naive(x)
    assert relative(fuse_conv_bn(naive)(x), before) > 0.1

    ours = fold_case(conv, BCN)
    before = ours(x)
    weight = ours.conv.weight
    fused = fuse_conv_bn(ours)
    assert type(fused.bcn) is BatchChannelNorm2d
    assert isinstance(fused.bcn.bn, nn.BatchNorm2d)
    assert fused.conv.weight is weight
    torch.testing.assert_close(fused(x), before, rtol=0, atol=0)


def test_trap_04_efficient_conv_bn_eval_never_uses_the_raw_weight():
    """`efficient_conv_bn_eval` convolves with raw weight times BN scale.

    mmcv's ConvWS answers with something else; ours refuses, and says what to do.
    """
    x = image(channels=4).double()
    results = {}
    for conv in ('Conv2d', 'ConvWS', 'WSConv2d'):
        plain = fold_case(conv, dict(type='BN'))
        short = ConvModule(
            4, 8, 3, conv_cfg=dict(type=conv), norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True
        )
        short.double().eval().load_state_dict(plain.state_dict())
        results[conv] = plain(x), short
    assert relative(results['Conv2d'][1](x), results['Conv2d'][0]) < 1e-12
    assert relative(results['ConvWS'][1](x), results['ConvWS'][0]) > 0.1  # the trap
    with pytest.raises(RuntimeError, match=r'(?s)WSConv2d.*efficient_conv_bn_eval.*to_plain'):
        results['WSConv2d'][1](x)


def test_trap_04_efficient_conv_bn_eval_leaves_bcn_alone():
    """BCN is no BatchNorm: the shortcut does not see it, and results stay."""
    x = image(channels=4).double()
    plain = fold_case('WSConv2d', BCN)
    short = ConvModule(4, 8, 3, conv_cfg=WS, norm_cfg=BCN, efficient_conv_bn_eval=True)
    short.double().eval().load_state_dict(plain.state_dict())
    torch.testing.assert_close(short(x), plain(x), rtol=0, atol=0)


def test_trap_04_efficient_conv_bn_eval_ends_where_a_model_is_converted():
    """The shortcut was chosen for the BatchNorm. mmcv's ConvWS keeps its eps."""
    conv, norm = dict(type='ConvWS', eps=0.1), dict(type='BN')
    module = ConvModule(4, 8, 3, conv_cfg=conv, norm_cfg=norm, efficient_conv_bn_eval=True)
    model, x = nn.Sequential(module).eval(), image(channels=4)
    before = module.conv(x)
    assert {line.after for line in convert_model(model).changed} == {
        'WSConv2d',
        'BatchChannelNorm2d',
    }
    torch.testing.assert_close(module.conv(x), before)
    assert model(x).isfinite().all()


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, partial(BatchChannelNorm2d, num_groups=2)])
@pytest.mark.parametrize('conv', [nn.Conv2d, WSConv2d])
def test_trap_04_mmengines_graph_shortcut_is_right_or_refused(conv, norm):
    """`turn_on_efficient_conv_bn_eval` rewrites a traced graph, for evaluation.

    A plain convolution stays right, with BCN too. With WS it is refused when it is switched on, not
    in the first validation.
    """
    model = nn.Module()
    model.part = nn.Sequential(conv(4, 8, 3), norm(8)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(5, 20)
    x = image(channels=4).double()
    before = model.part(x)
    if conv is WSConv2d:
        with pytest.raises(RuntimeError, match='a weight that is not its own'):
            turn_on_efficient_conv_bn_eval(model, 'part')
    else:
        turn_on_efficient_conv_bn_eval(model, 'part')
    assert relative(model.part(x), before) < 1e-12


@pytest.mark.parametrize(
    'arguments', [dict(bias=True), dict(groups=2), dict(padding_mode='circular')]
)
@pytest.mark.parametrize('norm', ['BN', 'SyncBN', 'MicroBN'])
def test_trap_04_fuse_conv_bn_on_every_kind_of_pair(norm, arguments):
    """Bias, groups, padding; norms derived from BatchNorm, which the host fuses as well."""
    x = image(channels=4).double()
    ours = fold_case('WSConv2d', dict(type=norm), padding=1, **arguments)
    before = ours(x)
    fused = fuse_conv_bn(copy.deepcopy(ours))
    assert isinstance(fused.bn, nn.Identity)
    torch.testing.assert_close(fused(x), before)


@MODES
def test_trap_05_sync_conversion_and_reversion_touch_the_inner_statistics_only(mode):
    """``sync_bn`` replaces whatever derives from BatchNorm, and every non-distributed run reverts.

    A subclass of BN comes back as a plain BN: the group stage is gone.
    """
    x = image(channels=4)
    naive = fold_case('Conv2d', dict(type=SubclassBCN)).float()
    before = naive(x)
    assert relative(revert_sync_batchnorm(convert_sync_batchnorm(naive))(x), before) > 0.1

    ours = ConvModule(4, 8, 3, conv_cfg=WS, norm_cfg=dict(BCN, mode=mode, momentum=0.3))
    ours(x)  # statistics of its own
    twin = copy.deepcopy(ours)

    def same_as_twin(module):
        assert module.state_dict().keys() == twin.state_dict().keys()
        for a, b in zip(module.state_dict().values(), twin.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        for training in (False, True):
            a, b = module.train(training)(x), twin.train(training)(x)
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    ours = convert_sync_batchnorm(ours)
    assert type(ours.bcn) is BatchChannelNorm2d
    assert isinstance(ours.bcn.bn, nn.SyncBatchNorm)
    assert ours.bcn.momentum == 0.3
    same_as_twin(ours)
    ours = revert_sync_batchnorm(ours)
    assert type(ours.bcn) is BatchChannelNorm2d
    assert isinstance(ours.bcn.bn, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(ours.bcn.bn, nn.SyncBatchNorm)
    assert ours.bcn.momentum == 0.3
    same_as_twin(ours)


@MODES
def test_trap_06_norm_eval_freezes_the_statistics(mode):
    """``ResNet.train()`` with ``norm_eval`` (mmdet's default) calls eval() on BatchNorm instances.

    Home-made running buffers go on moving in a model that claims to be frozen.
    """
    naive = resnet(norm_cfg=dict(type=BatchEstimateNorm), norm_eval=True)
    before = statistics(naive)
    naive(image())
    assert not unchanged(before, statistics(naive))

    frozen = resnet(dict(BCN, mode=mode), norm_eval=True)
    before = statistics(frozen)
    output = frozen(image())[0]
    assert unchanged(before, statistics(frozen)) == before.keys()
    assert all(p.requires_grad for n in norms_of(frozen) for p in n.parameters())
    backward(output)  # the scales still learn
    assert frozen.bcn1.batch_weight.grad.any()

    moving = resnet(dict(BCN, mode=mode), norm_eval=False)
    before = statistics(moving)
    moving(image())
    assert not unchanged(before, statistics(moving))


@MODES
def test_trap_06_frozen_stages_freeze_parameters_and_statistics(mode):
    """``frozen_stages=1``, mmdet's default, must hold for the statistics too."""
    model = resnet(dict(BCN, mode=mode), stages=2, frozen_stages=1)
    before = statistics(model)
    backward(model(image())[0])
    frozen = {name for name in before if name.startswith(('bcn1.', 'layer1.'))}
    assert unchanged(before, statistics(model)) == frozen
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(('conv1.', 'bcn1.', 'layer1.'))
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name


def test_naive_designs_are_the_same_operation():
    """What the naive designs compute is right: they fail for the host's sake only."""
    x = image(channels=8).double()
    ours = BatchChannelNorm2d(8, 2, mode='batch').double()
    expected = F.group_norm(F.batch_norm(x, None, None, training=True), 2)
    for norm in (ours, WrapperBCN(8).double(), SubclassBCN(8).double()):
        torch.testing.assert_close(norm.train()(x), expected, rtol=1e-6, atol=1e-6)


def test_the_patched_fuse_is_the_one_that_the_host_calls():
    """`fuse_conv_bn` looks its helper up in its own module, where ours stands."""
    module = importlib.import_module('mmcv.cnn.utils.fuse_conv_bn')
    assert module.fuse_conv_bn is fuse_conv_bn
    assert module._fuse_conv_bn.surrounded_by == 'wsbcn_mm.openmmlab.compat._fuse_standardized'


def center_net():
    model = CTResNetNeck(16, (8,), (4,), use_dcn=False)
    convert_model(model)
    return model


@pytest.mark.parametrize(
    'make',
    [
        lambda: PIDNet(3, 8, 8, num_stem_blocks=1, num_branch_blocks=1, norm_cfg=AUTO),
        lambda: DDRHead(16, 8, 2, norm_cfg=AUTO),
        center_net,
    ],
    ids=['PIDNet', 'DDRNet', 'CenterNet'],
)
def test_networks_that_initialise_the_batch_norms_they_find(make):
    """With constants, by class; a child without an affine has no weight to give."""
    model = make()
    norms = norms_of(model)
    for norm in norms:
        nn.init.normal_(norm.batch_weight)
    model.init_weights()
    assert norms and all((norm.batch_weight == 1).all() for norm in norms)
