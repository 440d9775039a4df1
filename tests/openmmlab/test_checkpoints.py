"""wsbcn_mm.openmmlab.checkpoints, trap 16: OpenMMLab loads with strict=False and only logs."""

import pytest

pytest.importorskip('mmengine', reason="the hook is mmengine's")

import logging
import pickle
import re
from types import SimpleNamespace

import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS
from mmengine.runner import load_checkpoint
from torch import nn

from tests.openmmlab.tiny import TinyModel, make_runner, tiny_model
from wsbcn_mm.openmmlab import checkpoints, filling
from wsbcn_mm.openmmlab.checkpoints import CheckpointMismatch
from wsbcn_mm.openmmlab.filling import compare
from wsbcn_mm.openmmlab.hooks.loading import CheckpointReportHook

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
    found = compare(model, model.state_dict())
    assert found.complete and len(found.filled) == TOTAL and not found.left_over
    assert str(found) == 'fills all 9 tensors of this model'


def test_the_prefix_of_a_distributed_checkpoint_is_passed_over():
    model = tiny_model()
    for prefix in ('module.', 'module.module.'):
        state = {prefix + key: value for key, value in model.state_dict().items()}
        assert compare(model, state) == compare(model, model.state_dict())


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda s: {f'_orig_mod.{k}': v for k, v in s.items()}, "begin with '_orig_mod.'"),
        (
            lambda s: {k[4:]: v for k, v in s.items() if k.startswith('bcn.')},
            "of a part of the model alone \\('bcn.'\\)",
        ),
        (
            lambda s: {'neck.x': s['head.bias'], **{f'backbone.{k}': v for k, v in s.items()}},
            "of a whole model, .*, prefix='backbone.'",
        ),
        (lambda s: {k: v for k, v in s.items() if 'conv' not in k}, 'of another config'),
    ],
)
def test_names_that_differ_by_what_they_begin_with(change, words):
    model = tiny_model()
    assert re.search(words, str(compare(model, change(model.state_dict()))))


def test_a_batch_norm_checkpoint_leaves_the_whole_norm_unfilled():
    found = compare(tiny_model(), batch_norm_checkpoint())
    assert set(found.missing) == NORM
    assert len(found.missing) == len(NORM)  # the child `bn` is not counted twice
    assert set(found.filled) == {'conv.weight', 'head.weight', 'head.bias'}
    assert set(found.left_over) == set(batch_norm_checkpoint()) - {*found.filled}


def test_a_tensor_of_another_shape_is_unfilled_and_said_to_be():
    """One class less: all layers are there, and the classifier would keep its random weights."""
    state = tiny_model().state_dict()
    state['head.weight'] = torch.zeros(2, 8, 1, 1)
    found = compare(tiny_model(), state)
    assert not found.complete and not found.missing and not found.left_over
    assert found.other_shape == {'head.weight': ((2, 8, 1, 1), (1, 8, 1, 1))}
    assert 'head.weight: (2, 8, 1, 1) for (1, 8, 1, 1)' in str(found)


def test_every_parameter_and_buffer_counts_but_counters_do_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm2d(3))
    model.register_buffer('scale', torch.ones(2))
    assert compare(model, {}).missing == [
        'scale',
        *(f'{i}.{name}' for i in (0, 1) for name in ('weight', 'bias')),
        '1.running_mean',
        '1.running_var',
    ]


class Teacher(nn.Module):
    """Takes the weights of a plain model twice, as semi-supervised detectors do."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_load_state_dict_pre_hook(self._both)

    @staticmethod
    def _both(module, state, prefix, *_):
        for key in [key for key in state if not key.startswith(('student', 'teacher'))]:
            value = state.pop(key)
            state |= {f'student.{key}': value, f'teacher.{key}': value}


def test_a_model_that_renames_what_it_loads_is_asked_itself():
    model, state = Teacher(), nn.Linear(2, 2).state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = compare(model, state)
    assert found.complete and not found.left_over
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])  # asking copies nothing
    filling.load(model, state)
    assert torch.equal(model.teacher.weight, state['weight'])


def test_loading_is_complete_or_nothing_happens():
    model, state = tiny_model(1.0), tiny_model(2.0).state_dict()
    del state['head.bias']
    with pytest.raises(CheckpointMismatch, match=r'(?s)^x.pth does not fill 1 of the 9.*head.bias'):
        filling.load(model, state, source='x.pth')
    assert (model.head.weight == 1).all()
    found = filling.load(model, state, strict=False)
    assert found.missing == ['head.bias']
    assert (model.head.weight == 2).all() and (model.head.bias == 1).all()


@pytest.mark.parametrize('change', [lambda v: v.to('meta'), lambda v: v.to_sparse()])
def test_a_tensor_without_values_fills_nothing(change):
    """torch passes over those of the meta device with a warning."""
    model, state = tiny_model(1.0), tiny_model(2.0).state_dict()
    state['head.weight'] = change(state['head.weight'])
    with pytest.raises(CheckpointMismatch, match=r'(?s)not fill 1 of .*meta.*: head.weight$'):
        filling.load(model, state)
    with torch.device('meta'):  # of shapes alone
        assert compare(tiny_model(), tiny_model().state_dict()).complete


def test_what_others_write_into_names_and_values_is_named():
    state = tiny_model().state_dict()
    wrapped = {k.replace('.', '._checkpoint_wrapped_module.'): v for k, v in state.items()}
    assert "hold '_checkpoint_wrapped_module.', of a wrapper" in str(compare(tiny_model(), wrapped))
    arrays = {key: value.numpy() for key, value in state.items()}
    with pytest.raises(CheckpointMismatch, match='arrays of NumPy: torch.from_numpy'):
        checkpoints.state_dict_of(dict(state_dict=arrays))


def fake_runner(model=None, **cfg):
    return SimpleNamespace(
        model=tiny_model() if model is None else model,
        logger=logging.getLogger('report'),
        cfg=cfg,
        optim_wrapper=None,
        param_schedulers=None,
    )


def test_the_hook_warns_with_the_share(caplog):
    hook = HOOKS.build(dict(type='CheckpointReportHook'))
    with caplog.at_level(logging.INFO):
        hook.after_load_checkpoint(fake_runner(), dict(state_dict=batch_norm_checkpoint()))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert 'does not fill 6 of the 9 tensors of this model (67 %)' in record.message
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


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda state: dict(state_dict={k.upper(): v for k, v in state.items()}), '100 %'),
        (lambda state: dict(state_dict={k: v.numpy() for k, v in state.items()}), 'no tensors'),
        (lambda state: dict(state_dict=None), 'no tensors'),
        (lambda state: dict(ema_state_dict=state), r"no tensors(?s:.*)\['ema_state_dict'\]"),
        (lambda state: dict(optimizer=dict(state={})), 'no tensors'),
    ],
    ids=['other names', 'arrays', 'none', 'another key', 'optimizer'],
)
def test_what_fills_nothing_is_refused_in_training_too(change, words):
    runner = fake_runner()
    checkpoint = change(runner.model.state_dict())
    with pytest.raises(CheckpointMismatch, match=words):
        CheckpointReportHook().after_load_checkpoint(runner, checkpoint)


@pytest.mark.parametrize('wrappers', ['', 'module.', 'module.module.'])
def test_the_runner_finds_the_tensors_where_the_tools_find_them(wrappers, tmp_path):
    """Under `model`, behind wrappers, and what is no tensor does not count as filled."""
    file, state = tmp_path / 'a.pth', tiny_model(3.0).state_dict()
    torch.save(dict(model={wrappers + key: value for key, value in state.items()}), file)
    hooks = [dict(type='CheckpointReportHook', strict=True)]
    runner = make_runner(tmp_path / 'a', load_from=str(file), custom_hooks=hooks)
    runner.load_or_resume()
    assert torch.equal(runner.model.conv.weight, state['conv.weight'])
    state['conv.weight'] = state['conv.weight'].numpy()
    found = compare(tiny_model(), state)
    assert found.missing == ['conv.weight'] and not found.complete


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_compute_nothing(value):
    state = tiny_model().state_dict()
    state['conv.weight'][0] = value
    found = compare(tiny_model(), state)
    assert found.not_numbers == ['conv.weight'] and not found.complete
    assert 'fills all 9 tensors' in str(found) and 'a variance below 0: conv.weight' in str(found)


def test_statistics_that_are_none_compute_nothing():
    for name, value, is_right in (
        ('running_var', -0.1, False),
        ('running_var', torch.nan, False),
        ('running_mean', torch.nan, False),
        ('running_mean', -0.1, True),
        ('running_var', torch.inf, True),
    ):
        state = tiny_model().state_dict()
        (key,) = (key for key in state if key.endswith(name))
        state[key][0] = value
        assert compare(tiny_model(), state).complete == is_right


def test_nothing_is_resumed_from_weights_alone():
    runner = fake_runner(resume=True)
    state = runner.model.state_dict()
    published = dict(state_dict=state, meta=dict(iter=3, epoch=1))
    short = dict(state_dict=state, meta=dict(iter=3))
    for checkpoint in (state, dict(state_dict=state), short, published):
        with pytest.raises(CheckpointMismatch, match='no state of a training'):
            CheckpointReportHook().after_load_checkpoint(runner, dict(checkpoint))
    whole = dict(published, message_hub={})
    CheckpointReportHook().after_load_checkpoint(runner, whole)


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


def test_a_log_is_read_again_after_others_have_taken_it_off_the_list_of_torch(tmp_path):
    """As the mmengine of the fork does when it has read a file."""
    log = HistoryBuffer()
    log.update(0.5)
    torch.save(dict(state_dict={}, log=log), tmp_path / 'log.pth')
    with torch.serialization.safe_globals([HistoryBuffer]):
        pass
    assert HistoryBuffer not in torch.serialization.get_safe_globals()
    assert checkpoints.read_checkpoint(tmp_path / 'log.pth')['log'].current() == 0.5


def test_a_first_look_lists_what_is_there(tmp_path):
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'epoch_3.pth')
    checkpoints.check_checkpoint(str(tmp_path / 'epoch_3.pth'))
    checkpoints.check_checkpoint('https://example.org/epoch_4.pth')
    with pytest.raises(FileNotFoundError, match=r'(?s)epoch_4\.pth.*: epoch_3\.pth'):
        checkpoints.check_checkpoint(str(tmp_path / 'epoch_4.pth'))
    (tmp_path / 'epoch_5.pth').touch()
    with pytest.raises(ValueError, match=r'epoch_5\.pth is empty'):
        checkpoints.check_checkpoint(str(tmp_path / 'epoch_5.pth'))


# ---- what the Runner wrote ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def torch_decides(monkeypatch):
    """No switch that turns torch's check off, whatever the shell says."""
    for name in ('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir after one epoch of two iterations, as the Runner leaves it."""
    folder = tmp_path_factory.mktemp('trained')
    runner = make_runner(folder)
    runner.train()
    return folder, runner


def test_a_checkpoint_of_the_runner_loads_with_torchs_check_on(trained):
    """It holds the log's HistoryBuffer with numpy arrays, which torch >= 2.6 refuses.

    Without our entries on torch's allow-list loading raises; with them it works, nothing forced.
    """
    folder, runner = trained
    file = str(folder / 'epoch_1.pth')
    content = torch.load(file, weights_only=False)
    scalars = content['message_hub']['log_scalars'].values()
    assert any(isinstance(value, HistoryBuffer) for value in scalars)

    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(pickle.UnpicklingError, match='Weights only load failed'):
            torch.load(file, weights_only=True)
        checkpoints.allow_checkpoint_globals()
        torch.load(file, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)

    model = tiny_model(fill=0.0)
    load_checkpoint(model, file)
    for name, value in runner.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_the_runner_resumes(trained, tmp_path):
    """Epoch, iteration, weights, statistics and the log go on where they ended."""
    folder, first = trained
    second = make_runner(tmp_path, epochs=2, load_from=str(folder / 'epoch_1.pth'), resume=True)
    second.load_or_resume()
    assert (second.epoch, second.iter) == (1, 2)
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=0)
    second.train()
    assert (second.epoch, second.iter) == (2, 4)
    losses = second.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 4
    assert second.model.bcn.bn.num_batches_tracked == 4
