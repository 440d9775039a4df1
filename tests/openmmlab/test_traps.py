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

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer, fuse_conv_bn
from mmdet.models.backbones import ResNet
from mmdet.models.roi_heads.bbox_heads import Shared4Conv1FCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmengine.model import BaseModule, convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from mmseg.models.decode_heads import ASPPHead
from torch import nn

from tests.openmmlab.naive import BatchEstimateNorm, SubclassBCN, WrapperBCN
from wsbcn_mm import BatchChannelNorm2d, WSConv2d

BCN = dict(type='BCN', num_groups=2)
WS = dict(type='WSConv2d')
MODES = pytest.mark.parametrize('mode', ['estimate', 'batch'])


def resnet(norm_cfg=BCN, conv_cfg=WS, stages=1, **kwargs):
    """A real mmdet ResNet with bottlenecks, narrow and short."""
    arguments = dict(
        depth=50,
        base_channels=8,
        num_stages=stages,
        strides=(1, 2)[:stages],
        dilations=(1, 1)[:stages],
        out_indices=(stages - 1,),
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        norm_eval=False,
    )
    model = ResNet(**{**arguments, **kwargs})
    model.train()  # answers None
    return model


def image(n=2, size=32, channels=3):
    """Off-centre: zero means would hide wrong ones."""
    return 2 * torch.randn(n, channels, size, size) + 1


def backward(output):
    (output * torch.randn_like(output)).sum().backward()


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, BatchChannelNorm2d)]


def statistics(model):
    """Every running buffer, by name."""
    return {k: v.clone() for k, v in model.named_buffers() if 'running' in k or 'tracked' in k}


def unchanged(before, after):
    """The names of those that kept their value."""
    return {name for name in before if torch.equal(before[name], after[name])}


# ------------------------------------------------------------------------------------------------


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


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


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


@pytest.mark.parametrize(
    'conv, norm, may_refuse',
    [
        (nn.Conv2d, lambda: nn.BatchNorm2d(8), False),
        (WSConv2d, lambda: nn.BatchNorm2d(8), True),
        (nn.Conv2d, lambda: BatchChannelNorm2d(8, 2), True),
        (WSConv2d, lambda: BatchChannelNorm2d(8, 2), True),
    ],
)
def test_trap_04_mmengines_graph_shortcut_refuses_or_is_right(conv, norm, may_refuse):
    """`turn_on_efficient_conv_bn_eval` rewrites a traced graph; a plain pair stays right.

    With layers of ours it may refuse (it cannot trace them), it may not answer wrongly.
    """
    model = nn.Module()
    model.part = nn.Sequential(conv(4, 8, 3), norm()).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(5, 20)
    x = image(channels=4).double()
    before = model.part(x)
    try:
        turn_on_efficient_conv_bn_eval(model, 'part')
    except (TypeError, KeyError, RuntimeError, torch.fx.proxy.TraceError):
        assert may_refuse
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
    assert type(ours.bcn.bn) is nn.SyncBatchNorm
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


def mask_head(norm_cfg, conv_cfg=WS):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return FCNMaskHead(
            num_convs=2,
            in_channels=8,
            conv_out_channels=8,
            num_classes=3,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg,
        )


def box_head(norm_cfg, conv_cfg=WS):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return Shared4Conv1FCBBoxHead(
            in_channels=8,
            conv_out_channels=8,
            fc_out_channels=16,
            roi_feat_size=7,
            num_classes=3,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg,
        )


@MODES
def test_trap_08_with_cp_updates_once_and_keeps_the_gradients(mode):
    """`with_cp=True` runs every block's forward pass twice."""

    def run(with_cp):
        torch.manual_seed(0)
        net = ResNet(
            18,
            base_channels=8,
            norm_cfg=dict(BCN, mode=mode, momentum=0.3),
            conv_cfg=WS,
            norm_eval=False,
            frozen_stages=-1,
            with_cp=with_cp,
        ).double()
        net.train()
        for _ in range(2):
            # The input needs a gradient, or reentrant checkpointing would give none to the stem.
            x = (torch.randn(2, 3, 64, 64, dtype=torch.float64) + 1).requires_grad_()
            outs = net(x)
            sum((o * torch.randn_like(o)).sum() for o in outs).backward()
        return {n: p.grad for n, p in net.named_parameters()} | dict(net.named_buffers())

    plain, checkpointed = run(False), run(True)
    assert checkpointed['bcn1.bn.num_batches_tracked'] == 2
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-8, atol=1e-8, msg=name)


@MODES
@pytest.mark.parametrize('head', [mask_head, box_head])
@pytest.mark.filterwarnings('ignore:var:UserWarning')  # of the naive design
def test_trap_09_zero_rois_train_and_leave_no_trace(head, mode):
    """An image without objects gives N = 0 RoIs.

    A view with -1 raises, and an update from nothing writes NaN into the statistics for ever.
    """
    nothing = torch.zeros(0, 8, 7, 7)
    naive = head(dict(type=BatchEstimateNorm)).train()
    with pytest.raises(RuntimeError, match='ambiguous'):
        naive(nothing)
    assert all(v.isnan().all() for v in list(statistics(naive).values())[:2])

    ours = head(dict(BCN, mode=mode)).train()
    before = statistics(ours)
    assert before
    outputs = ours(nothing.requires_grad_())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(len(output) == 0 for output in outputs)
    backward(torch.cat([output.flatten() for output in outputs]))
    assert unchanged(before, statistics(ours)) == before.keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name  # NaN is any(), too
    outputs = ours(torch.randn(5, 8, 7, 7))  # the next image is as good as new
    assert all(output.isfinite().all() for output in (outputs if head is box_head else [outputs]))
    assert not unchanged(before, statistics(ours))


def aspp_head(norm_cfg):
    with DefaultScope.overwrite_default_scope('mmseg'):
        return ASPPHead(
            in_channels=8,
            in_index=0,
            channels=8,
            num_classes=3,
            dilations=(1, 2),
            conv_cfg=WS,
            norm_cfg=norm_cfg,
        )


@MODES
def test_trap_10_image_pooling_of_one_image_trains(mode):
    """ASPP pools an image to one value per channel: BN and SyncBN cannot train on it.

    Estimates have no such limit; in batch mode the running statistics stand in, unchanged.
    """
    x = [image(1, 9, channels=8)]
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        aspp_head(dict(type='BN')).train()(x)

    head = aspp_head(dict(BCN, mode=mode)).train()
    pooled = head.image_pool[1]
    before = statistics(pooled)
    output = head(x)
    assert output.shape == (1, 3, 9, 9)
    backward(output)
    kept = unchanged(before, statistics(pooled))
    assert kept == (before.keys() if mode == 'batch' else set())
    for name, parameter in head.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert pooled.conv.weight.grad.any()
    assert pooled.bcn.batch_weight.grad.any()


@MODES
def test_trap_11_autocast_keeps_the_low_precision_dtype(mode):
    """A norm that answers float32 under autocast loses the memory that AMP was switched on for."""
    module = ConvModule(4, 8, 3, conv_cfg=WS, norm_cfg=dict(BCN, mode=mode), inplace=False)
    seen = []
    module.bcn.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    x = image(channels=4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    backward(output)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    assert module.bcn.bn.running_var.dtype == torch.float32
    module.eval()
    expected = module(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(module(x).float(), expected, rtol=0.05, atol=0.1)


@MODES
def test_trap_11_float16_squares_do_not_overflow(mode):
    """float16 ends at 65504: squares of 300 are inf, and WS outputs are that large."""
    x = (300 * torch.randn(2, 8, 9, 9).sign() + torch.randn(2, 8, 9, 9)).half()
    assert x.square().isinf().all()  # the trap
    results = {}
    for dtype in (torch.float16, torch.float32):
        norm = build_norm_layer(dict(BCN, mode=mode), 8)[1]
        leaf = x.to(dtype, copy=True).requires_grad_()
        output = norm(leaf)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (output * cotangent).sum().backward()
        assert output.dtype == leaf.grad.dtype == dtype
        results[dtype] = output.float(), norm.batch_weight.grad, norm.bn.running_var
    for low, full in zip(*results.values()):
        assert low.isfinite().all()
        torch.testing.assert_close(low, full, rtol=5e-3, atol=5e-3)


@MODES
def test_trap_12_channels_last_goes_through_a_resnet(mode):
    """``view`` of a channels_last tensor raises; a silent ``contiguous`` loses the format."""
    naive = BatchEstimateNorm(8)
    with pytest.raises(RuntimeError, match='view size is not compatible'):
        naive(image(channels=8).to(memory_format=torch.channels_last))

    model = resnet(dict(BCN, mode=mode))
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    kept = []
    for norm in norms_of(twin):
        norm.register_forward_hook(
            lambda m, args, out: kept.append(
                args[0].is_contiguous(memory_format=torch.channels_last)
                and out.is_contiguous(memory_format=torch.channels_last)
            )
        )
    x = image()
    y, y_last = model(x)[0], twin(x.to(memory_format=torch.channels_last))[0]
    assert len(kept) == len(norms_of(twin)) > 10
    assert all(kept)
    torch.testing.assert_close(y_last, y, rtol=1e-4, atol=1e-4)
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()
    (y_last * cotangent).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert relative(q.grad, p.grad) < 1e-3, name


def test_trap_14_init_rules_for_conv2d_and_group_norm_reach_our_layers():
    """``init_cfg`` compares names: the class and its **direct** bases, no deeper."""

    class OneLevelDeeper(WSConv2d):
        pass

    def initialised(conv, rule):
        module = BaseModule(init_cfg=rule)
        module.conv, module.norm = conv, build_norm_layer(BCN, 8)[1]
        module.init_weights()
        return module

    constant = dict(type='Constant', val=3.0, bias=4.0, layer=['Conv2d', 'GroupNorm'])
    naive = initialised(OneLevelDeeper(4, 8, 3), constant)
    assert not (naive.conv.weight == 3).any()

    ours = initialised(WSConv2d(4, 8, 3), constant)
    assert (ours.conv.weight == 3).all()
    assert (ours.norm.weight == 3).all()
    assert (ours.norm.bias == 4).all()
    assert (ours.norm.batch_weight == 1).all()

    kaiming = dict(type='Kaiming', mode='fan_in', nonlinearity='relu', layer='Conv2d')
    ours = initialised(WSConv2d(64, 64, 3), kaiming)
    assert ours.conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def decays(norm_cfg):
    """The weight decay of every parameter of a ResNet, by name."""
    model = resnet(norm_cfg=norm_cfg)
    constructor = DefaultOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5)),
        paramwise_cfg=dict(norm_decay_mult=0.0),
    )
    groups = constructor(model).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    return {name: decay[id(p)] for name, p in model.named_parameters()}


def test_trap_15_norm_decay_mult_reaches_all_four_parameters():
    """The rule knows torch's norm classes alone: a plain nn.Module norm gets weight decay."""
    naive = decays(dict(type=BatchEstimateNorm))
    assert naive['layer1.0.bn1.weight'] == 0.5  # the trap

    ours = decays(BCN)
    for name in ('weight', 'bias', 'batch_weight', 'batch_bias'):
        assert ours[f'layer1.0.bcn1.{name}'] == 0
    for name, decay in ours.items():
        assert decay == (0 if 'bcn' in name or '.downsample.1.' in name else 0.5), name


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
    assert module._fuse_conv_bn.handles_standardized_weights
