"""tools/train.py audits what it is about to train."""

import importlib.util

import pytest

pytest.importorskip('mmdet', reason='trains detectors')

from mmengine.config import Config

from tests.openmmlab.conversion.test_convert import retinanet
from tests.openmmlab.test_audit import GOOD, write
from tests.tools.conftest import TOOLS


@pytest.fixture(scope='module')
def train():
    spec = importlib.util.spec_from_file_location('train_tool', TOOLS / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(tmp_path, **backbone):
    cfg = Config.fromfile(write(tmp_path, retinanet(**(backbone or GOOD))))
    cfg.launcher = 'none'
    return cfg


def test_findings_are_printed_and_training_goes_on(train, tmp_path, capsys):
    cfg = config(tmp_path, norm_eval=False)
    train.print_audit(cfg, 'print')
    assert 'audit: error: model.backbone' in capsys.readouterr().err
    train.print_audit(cfg, 'off')
    assert capsys.readouterr().err == ''
    with pytest.raises(ValueError, match='--audit stop'):
        train.print_audit(cfg, 'stop')


def test_a_good_config_is_not_stopped(train, tmp_path, capsys):
    cfg = config(tmp_path)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=1)
    train.print_audit(cfg, 'stop')
    assert 'error' not in capsys.readouterr().err


def test_the_rate_that_auto_scale_lr_makes_is_audited(train, tmp_path, capsys):
    """0.02 for 16 images becomes 0.00125 for one: too little for 300 steps."""
    cfg = config(tmp_path)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=16)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=300)
    train.print_audit(cfg, 'print')
    assert '[rate-too-low]' in capsys.readouterr().err


def test_a_model_that_cannot_be_built_is_left_to_the_training(train, tmp_path, capsys):
    cfg = config(tmp_path)
    cfg.model.neck.type = 'NoSuchNeck'
    train.print_audit(cfg, 'stop')
    assert 'cannot be built' in capsys.readouterr().err


def test_an_audit_that_fails_does_not_stop_the_training(train, tmp_path, capsys, monkeypatch):
    from wsbcn_mm.openmmlab import audit

    def fails(*_, **__):
        raise KeyError('a shape that nobody thought of')

    monkeypatch.setattr(audit, 'audit_config', fails)
    train.print_audit(config(tmp_path), 'stop')
    assert 'not done: KeyError' in capsys.readouterr().err


@pytest.mark.parametrize('amp', [True, False])
def test_mixed_precision_is_asked_for_on_the_command_line(train, amp, tmp_path, monkeypatch):
    from wsbcn_mm.openmmlab import preflight

    file = tmp_path / 'config.py'
    config(tmp_path, **GOOD).dump(file)
    for check in ('check_data', 'check_amp', 'check_pretrained', 'check_train'):
        monkeypatch.setattr(preflight, check, lambda *_: None)
    arguments = ['train.py', str(file), '--work-dir', str(tmp_path), *['--amp'] * amp]
    monkeypatch.setattr('sys.argv', [*arguments, '--audit', 'off'])
    cfg = train.configure(train.parse_args())
    assert (cfg.optim_wrapper.type == 'AmpOptimWrapper') == amp
    assert cfg.optim_wrapper.get('loss_scale') == ('dynamic' if amp else None)
