"""wsbcn_mm.openmmlab.checkpoints, trap 16: OpenMMLab loads with strict=False and only logs."""

import pytest

pytest.importorskip('mmengine', reason="the hook is mmengine's")

import logging
from types import SimpleNamespace

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS
from torch import nn

from tests.openmmlab.tiny import TinyModel, make_runner, tiny_model
from wsbcn_mm.openmmlab.checkpoints import CheckpointMismatch, CheckpointReportHook, missing_tensors

NORM = {
    f'bcn.{name}'
    for name in (
        'weight',
        'bias',
        'batch_weight',
        'batch_bias',
        'bn.running_mean',
        'bn.running_var',
    )
}
TOTAL = len(NORM) + 3  # conv.weight, head.weight, head.bias


def batch_norm_checkpoint():
    """The same architecture trained with plain convolutions and BN."""
    model = nn.ModuleDict(
        dict(conv=nn.Conv2d(3, 8, 3, bias=False), bn=nn.BatchNorm2d(8), head=nn.Conv2d(8, 1, 1))
    )
    return model.state_dict()


def test_a_checkpoint_of_the_model_fills_everything():
    model = tiny_model()
    assert missing_tensors(model, model.state_dict()) == ([], TOTAL)


def test_the_prefix_of_a_distributed_checkpoint_is_passed_over():
    model = tiny_model()
    state = {f'module.{key}': value for key, value in model.state_dict().items()}
    assert missing_tensors(model, state) == ([], TOTAL)


def test_a_batch_norm_checkpoint_leaves_the_whole_norm_unfilled():
    missing, total = missing_tensors(tiny_model(), batch_norm_checkpoint())
    assert total == TOTAL
    assert set(missing) == NORM
    assert len(missing) == len(NORM)  # the child `bn` is not counted twice


def test_a_tensor_of_another_shape_is_unfilled():
    state = tiny_model().state_dict()
    state['conv.weight'] = torch.zeros(8, 3, 5, 5)
    assert missing_tensors(tiny_model(), state) == (['conv.weight'], TOTAL)


def test_other_layers_and_counters_do_not_count():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm2d(3))
    missing, total = missing_tensors(model, {})
    assert total == 4
    assert missing == ['1.weight', '1.bias', '1.running_mean', '1.running_var']


def fake_runner(model=None):
    return SimpleNamespace(
        model=tiny_model() if model is None else model, logger=logging.getLogger('report')
    )


def test_the_hook_warns_with_the_share(caplog):
    hook = HOOKS.build(dict(type='CheckpointReportHook'))
    with caplog.at_level(logging.INFO):
        hook.after_load_checkpoint(fake_runner(), dict(state_dict=batch_norm_checkpoint()))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert 'does not fill 6 of the 9 conv and norm tensors of this model (67 %)' in record.message
    assert 'bcn.weight' in record.message
    assert 'initial values' in record.message


@pytest.mark.parametrize('strict', [False, True])
def test_the_hook_is_silent_when_all_is_filled(strict, caplog):
    runner = fake_runner()
    state = runner.model.state_dict()
    with caplog.at_level(logging.INFO):
        CheckpointReportHook(strict).after_load_checkpoint(runner, dict(state_dict=state))
        CheckpointReportHook(strict).after_load_checkpoint(runner, state)  # a bare state dict
    assert not caplog.records


def test_the_strict_hook_raises():
    with pytest.raises(CheckpointMismatch, match='6 of the 9'):
        CheckpointReportHook(strict=True).after_load_checkpoint(
            fake_runner(), dict(state_dict=batch_norm_checkpoint())
        )
    assert issubclass(CheckpointMismatch, ValueError)  # what the tools turn into a message


def test_the_hook_sees_through_a_wrapped_model(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1
    )
    try:
        runner = fake_runner(MMDistributedDataParallel(TinyModel(), device_ids=None))
        state = runner.model.module.state_dict()
        CheckpointReportHook(strict=True).after_load_checkpoint(runner, dict(state_dict=state))
        with pytest.raises(CheckpointMismatch, match='6 of the 9'):
            CheckpointReportHook(strict=True).after_load_checkpoint(
                runner, dict(state_dict=batch_norm_checkpoint())
            )
    finally:
        torch.distributed.destroy_process_group()


def test_trap_16_the_runner_alone_says_nothing_and_ours_stops_it(tmp_path):
    """Without the hook a half-loaded model trains and tests as if nothing had happened."""
    file = str(tmp_path / 'bn.pth')
    torch.save(dict(state_dict=batch_norm_checkpoint(), meta={}), file)
    make_runner(tmp_path / 'a', load_from=file).load_or_resume()  # the trap: no exception

    hooks = [dict(type='CheckpointReportHook', strict=True)]
    runner = make_runner(tmp_path / 'b', load_from=file, custom_hooks=hooks)
    before = runner.model.conv.weight.clone()
    with pytest.raises(CheckpointMismatch):
        runner.load_or_resume()
    assert torch.equal(runner.model.conv.weight, before)  # raised before anything was copied
