"""Under OpenMMLab's loops each weight is standardized once per pass, and is never an old one."""

import contextlib

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from torch import nn

import wsbcn_mm
from tests.openmmlab.tiny import make_runner
from wsbcn_mm import reference
from wsbcn_mm.layers import standardization


class Accepts(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {}


class Witness(Hook):
    """Compares every result of validation with what the weights of that moment give."""

    priority = 'LOWEST'

    def __init__(self, fail=False):
        self.fail, self.seen, self.weights = fail, 0, []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = runner.model
        weight = reference.weight_standardize(model.conv.weight)
        x = torch.stack(list(data_batch['inputs']))
        expected = model.head(model.bcn(nn.functional.conv2d(x, weight)))
        torch.testing.assert_close(outputs, expected)
        self.seen += 1
        self.weights.append(model.conv.weight.detach().clone())
        if self.fail:
            raise ValueError('the loop ends here')


def runner_with(tmp_path, witness, *hooks):
    data = [dict(inputs=torch.randn(3, 6, 6)) for _ in range(3)]
    loader = dict(dataset=data, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False))
    runner = make_runner(
        tmp_path,
        epochs=2,
        val_dataloader=loader,
        val_cfg=dict(),
        val_evaluator=dict(type=Accepts),
        custom_hooks=[dict(type='StandardizationHook'), *hooks],
    )
    runner.register_hook(witness)
    return runner


def test_validation_of_an_average(tmp_path, calls):
    """EMAHook exchanges weights through .data in front of the first image, and after the last."""
    witness = Witness()
    runner = runner_with(tmp_path, witness, dict(type='EMAHook', momentum=0.5))
    runner.train()
    assert witness.seen == 6
    assert calls == [1] * 2 * (2 + 1)  # of both epochs: two steps, and the whole validation
    assert not torch.equal(witness.weights[0], witness.weights[-1])
    assert not torch.equal(witness.weights[-1], runner.model.conv.weight)  # the average
    assert standardization.open_scopes() == 0


def test_a_loop_that_fails_leaves_nothing(tmp_path):
    runner = runner_with(tmp_path, Witness(fail=True))
    with contextlib.suppress(ValueError):
        runner.train()
    conv, x = runner.model.conv, torch.randn(1, 3, 6, 6)
    conv.weight.data.normal_()
    expected = nn.functional.conv2d(x, reference.weight_standardize(conv.weight))
    torch.testing.assert_close(conv(x), expected)
    assert standardization.open_scopes() == 0


def test_with_estimates_hook_alone_steps_share(tmp_path, calls):
    runner = make_runner(tmp_path, custom_hooks=[dict(type='EstimatesHook')])
    seen = []
    runner.model.conv.register_forward_hook(lambda *_: seen.append(standardization.open_scopes()))
    runner.train()
    assert seen == [1, 1]
    assert calls == [1, 1]


def test_the_shared_head_of_retinanet_standardizes_each_weight_once(calls):
    pytest.importorskip('mmdet')
    from mmdet.models.dense_heads import RetinaHead
    from mmdet.utils import register_all_modules
    from mmengine.registry import init_default_scope

    register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')
    head = RetinaHead(
        num_classes=2,
        in_channels=8,
        feat_channels=8,
        stacked_convs=2,
        conv_cfg=dict(type='WSConv2d'),
        norm_cfg=dict(type='BCN', num_groups=2),
    )
    levels = [torch.randn(1, 8, size, size) for size in (8, 4, 4, 2, 2)]
    undo = wsbcn_mm.standardize_once_per_forward(head)
    shared = head(levels)
    assert sum(calls) == 4  # two convolutions for classes, two for boxes
    assert len(calls) == 1
    calls.clear()
    undo()
    head(levels)
    assert calls == [1] * 4 * 5
    assert all(y.requires_grad for ys in shared for y in ys)
