"""Traps of OpenMMLab in training: repeated passes, no RoIs, one image, precision, layouts, decay.

The traps 8 to 15 of those in test_traps.py, whose docstring holds here, too.
"""

import pytest

pytest.importorskip('mmengine', reason="the traps are OpenMMLab's")
pytest.importorskip('mmcv', reason='layers are built by mmcv')
pytest.importorskip('mmdet', reason="backbones and heads are mmdet's")
pytest.importorskip('mmseg', reason="the ASPP head is mmseg's")

import copy

import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.models.backbones import ResNet
from mmdet.models.roi_heads.bbox_heads import Shared4Conv1FCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import DefaultScope
from mmseg.models.decode_heads import ASPPHead

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
from tests.openmmlab.naive import BatchEstimateNorm
from wsbcn_mm import WSConv2d


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
