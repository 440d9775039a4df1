"""deploy.inference and parts: models of configs fold, whole and part by part."""

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import copy
import warnings

import torch
from mmengine.config import Config
from torch import nn

from tests.openmmlab.deploy.models import QUICK, SIZE, as_trained, error, image_of, our_layers
from wsbcn_mm import BatchChannelNorm2d, fold, folding
from wsbcn_mm.layers import BatchChannelNorm
from wsbcn_mm.openmmlab import config
from wsbcn_mm.openmmlab.checkpoints import CheckpointMismatch
from wsbcn_mm.openmmlab.deploy import inference, parts

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures


def test_folded_equals_original(trained):
    cfg, model, plan = trained
    assert plan.left == {}
    norms = sum(isinstance(m, BatchChannelNorm) for m in model.modules())
    assert sum(change.norm is not None for change in plan.folds) == norms
    folded = plan.apply(model)
    assert our_layers(folded) == []
    assert error(model, folded, image_of(model, cfg)) < 1e-5
    double = copy.deepcopy(model).double()
    assert error(double, plan.apply(double), image_of(double, cfg)) < 1e-10


def test_parts_are_those_of_the_model(trained):
    cfg, model, _ = trained
    found = parts.tensor_parts(model, image_of(model, cfg))
    if cfg.default_scope == 'mmdet':
        assert [p.name for p in found] == ['image', 'bbox_head', 'mask_head']
        assert found[0].outputs[:2] == ['feature_0', 'feature_1']
    else:
        assert [p.name for p in found] == ['image', 'auxiliary_head_0']
        (scores,) = found[0].module(found[0].input)
        assert scores.shape == (1, 6, *SIZE)


def test_planning_runs_each_part_once(trained):
    cfg, model, _ = trained
    model = copy.deepcopy(model)
    parts_of_it = {part.name for part in parts.tensor_parts(model, image_of(model, cfg))}
    seen = []
    part = model.rpn_head if hasattr(model, 'rpn_head') else model.decode_head.conv_seg
    part.register_forward_hook(lambda *_: seen.append('image'))
    run = inference.run_on(cfg, inference.random_image(*SIZE))
    assert len(run(model)) == len(parts_of_it) and seen == ['image']


def test_a_model_without_a_layer_of_ours_is_not_run_to_plan_its_folding():
    plan = folding.plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), run=pytest.fail)
    assert not plan.folds and not plan.left


def test_without_a_run_the_parts_of_a_detector_are_found_as_well(trained):
    """Nobody says how to call it: backbone, neck and heads are tried on their own."""
    _, model, plan = trained
    assert set(folding.plan(model).folds) == set(plan.folds)


def test_an_image_that_is_too_small_is_named():
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor'),
        backbone=dict(type='MobileNetV3', arch='small', out_indices=(0, 1, 12)),
        decode_head=dict(
            type='LRASPPHead',
            in_channels=(16, 16, 576),
            channels=8,
            in_index=(0, 1, 2),
            input_transform='multiple_select',
            num_classes=2,
            loss_decode=dict(type='CrossEntropyLoss'),
        ),
        test_cfg=dict(mode='whole'),
    )
    cfg = Config(dict(default_scope='mmseg', model=model))
    run = inference.run_on(cfg, inference.random_image(*SIZE))
    with pytest.raises(ValueError, match='does not run on an image of 64x96'):
        run(inference.build_model(cfg))


def test_a_tracker_takes_no_image():
    from mmdet.models.mot import BaseMOTModel

    class Follows(BaseMOTModel):
        loss = predict = None

    cfg = Config(dict(default_scope='mmdet', model=dict(type=Follows)), format_python_code=False)
    with pytest.raises(ValueError, match=r'Follows follows objects through videos.*\n  tools/test'):
        inference.build_model(cfg)
    with pytest.raises(ValueError, match='follows objects through videos'):  # other tools
        config.refuse_tracker(Follows())


def test_devices_and_sizes_that_there_are_not():
    assert inference.device_of('cpu').type == 'cpu'
    for name in ('gpu0', 'cuda:999'):
        with pytest.raises(ValueError, match=f'--device {name}: '):
            inference.device_of(name)
    with pytest.raises(ValueError, match=r'at least 1\n  got 0 64'):
        inference.random_image(0, 64)


def test_a_wrong_model_is_seen(trained):
    """The comparison that guards the tools: one shift in one norm is found."""
    cfg, model, plan = trained
    wrong = plan.apply(model)
    norm = next(m for m in wrong.modules() if isinstance(m, nn.GroupNorm))
    norm.bias.data[0] += 0.1
    assert error(model, wrong, image_of(model, cfg)) > 1e-4
    norm.bias.data[0] = float('nan')
    assert not error(model, wrong, image_of(model, cfg)) <= 1e9


def test_checkpoint_of_another_model():
    cfg = config.load_config(str(QUICK['deeplabv3']))
    with pytest.raises(CheckpointMismatch, match='does not fill'):
        inference.load_model(cfg, dict(state_dict={'backbone.conv1.weight': torch.zeros(1)}))


def test_torch_export_and_trace(trained):
    cfg, model, plan = trained
    part = parts.tensor_parts(plan.apply(model), image_of(model, cfg))[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = part.module(part.input)
        exported = torch.export.export(part.module, (part.input,)).module()
        traced = torch.jit.trace(part.module, part.input, check_trace=False)
        for other in (exported, traced):
            for got, want in zip(other(part.input), expected):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.15), (torch.float16, 0.03)])
def test_half_precision(trained, dtype, bound):
    cfg, model, plan = trained
    part = parts.tensor_parts(plan.apply(model), image_of(model, cfg))[0]
    with torch.no_grad():
        expected = part.module(part.input)
        found = part.module.to(dtype)(part.input.to(dtype))
    for got, want in zip(found, expected):
        assert got.dtype == dtype and got.isfinite().all()
        scale = want.abs().max()
        assert ((got.float() - want).abs().max() / scale).item() < bound


def test_fold_on_mmcvs_convmodule_with_the_norm_elsewhere():
    """The orders of a ConvModule: only a norm right behind the convolution is folded."""
    from mmcv.cnn import ConvModule

    for order, folds in (
        (('conv', 'norm', 'act'), True),
        (('conv', 'act', 'norm'), False),
        (('norm', 'act', 'conv'), False),
    ):
        layers = dict(norm_cfg=dict(type='BCN', num_groups=2), conv_cfg=dict(type='WSConv2d'))
        module = ConvModule(8, 8, 3, padding=1, order=order, **layers)
        module = as_trained(module).double().eval()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            folded = fold(module)
        assert type(folded.norm) is (nn.GroupNorm if folds else BatchChannelNorm2d), order
        assert type(folded.conv) is nn.Conv2d
        x = torch.randn(2, 8, 9, 9).double()
        torch.testing.assert_close(folded(x), module(x), rtol=1e-11, atol=1e-11)
