"""wsbcn_mm.openmmlab.config: messages that tell a user what to do, before anything is started."""

import re

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmcv', reason='a config is not read without mmcv')

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS

from wsbcn_mm.openmmlab import compat, config, loaders


@pytest.fixture
def file(tmp_path):
    """A config of no package."""
    path = tmp_path / 'mask-rcnn_tiny.py'
    path.write_text('lr = 0.1\nmodel = dict(backbone=dict(depth=50))\n')
    return path


def test_load_config_reads_and_overrides(file):
    cfg = config.load_config(str(file), {'model.backbone.depth': 101})
    assert (cfg.lr, cfg.model.backbone.depth) == (0.1, 101)


@pytest.mark.parametrize(
    'text, reason',
    [
        ('lr = (0.1\n', 'SyntaxError'),
        ('lr = undefined\n', "NameError: name 'undefined'"),
        ('a = 1\nlr = undefined\n', 'stops at line 2 of '),
    ],
)
def test_a_file_that_is_no_config_says_so_in_two_lines(file, text, reason):
    file.write_text(text)
    with pytest.raises(ValueError, match=f'{file.name} cannot be read as a config') as error:
        config.load_config(str(file))
    assert reason in str(error.value) and len(str(error.value).splitlines()) == 2


def test_what_a_config_in_pure_python_holds_is_found_by_its_name(file):
    """As a name, an operator is looked up among the operators, and L1Loss's module is hidden."""
    pytest.importorskip('mmdet')
    file.write_text("""
from mmcv.ops import ModulatedDeformConv2dPack, RoIAlign, nms
from mmdet.models.detectors import MaskRCNN
from mmdet.models.losses.smooth_l1_loss import L1Loss
from mmdet.models.losses.smooth_l1_loss import Missing
from torch.nn import GroupNorm
model = dict(
    type=MaskRCNN, missing=dict(type=Missing), loss=dict(type=L1Loss), norm=dict(type=GroupNorm),
    roi_layer=dict(type=RoIAlign), conv=[dict(type=ModulatedDeformConv2dPack)], nms=dict(type=nms))
""")
    model = config.load_config(str(file)).model
    found = {name: getattr(part, 'type', None) for name, part in model.items()}
    assert (found['roi_layer'], found['nms']) == ('RoIAlign', 'nms')
    assert found['missing'] == 'mmdet.models.losses.smooth_l1_loss.Missing'  # not our business
    assert MODELS.get(found['loss']).__name__ == 'L1Loss'
    assert MODELS.get(found['norm']).__name__ == 'GroupNorm'
    assert MODELS.get(model.conv[0].type).__name__ == 'ModulatedDeformConv2dPack'


def test_a_config_of_a_former_major_version_says_so(file):
    old = 'data = dict(train=dict(type="CocoDataset"))\nlr_config = dict(policy="step")\n'
    file.write_text(file.read_text() + old)
    with pytest.raises(ValueError, match='(?s)MMDetection 2.* has data, lr_config, .*Migration'):
        config.load_config(str(file))
    file.write_text(file.read_text() + 'optim_wrapper = dict(type="OptimWrapper")\n')
    assert config.load_config(str(file)).data.train.type == 'CocoDataset'


def test_a_missing_base_is_named(file):
    file.write_text("_base_ = 'wsbcn_mm::mask_rcnn/mask-rcnn_r50_fpn_ws-bnc_8xb1-2x_coco.py'\n")
    with pytest.raises(FileNotFoundError, match='(?s)has no such config.*ws-bcn_8xb1-2x_coco'):
        config.load_config(str(file))


def test_a_missing_import_of_a_config_stays_an_import_error(file):
    file.write_text(file.read_text() + "custom_imports = dict(imports=['no_such_package'])\n")
    with pytest.raises(ImportError, match='no_such_package'):
        config.load_config(str(file))


@pytest.mark.parametrize(
    'kind, scope, found',
    [
        ('RetinaNet', 'mmdet', 'mmdet'),
        ('mmseg.models.EncoderDecoder', None, 'mmseg'),
        ('OwnDetector', None, 'mmdet'),  # by its bases
        ('OwnDetector', 'own_scope', 'mmdet'),
        ('mmseg.EncoderDecoder', 'own_scope', 'mmseg'),
        ('OwnModel', None, None),
        ('RetinaNet', 'mmsegmentation', None),
    ],
)
def test_the_host_of_a_config(kind, scope, found):
    pytest.importorskip('mmdet', reason='one model derives from its')
    from mmdet.models import BaseDetector

    MODELS.register_module(name='OwnDetector', module=type('D', (BaseDetector,), {}), force=True)
    MODELS.register_module(name='OwnModel', module=type('M', (BaseModel,), {}), force=True)
    cfg = Config(dict(default_scope=scope, model=dict(type=kind)))
    assert config.find_scope(cfg) == found
    if found is None:
        with pytest.raises(ValueError, match=f'is needed\n  got default_scope {scope!r}'):
            config.scope_of(cfg)


def test_load_config_wants_a_model(file):
    file.write_text('lr = 0.1\n')
    with pytest.raises(ValueError, match=f'{file.name} has no model'):
        config.load_config(str(file))


def test_a_checkpoint_in_the_place_of_a_config(file):
    weights = file.with_suffix('.pth')
    weights.touch()
    with pytest.raises(ValueError, match='is a file of weights: the config comes first'):
        config.load_config(str(weights))


def test_load_config_names_files_that_may_have_been_meant(file):
    with pytest.raises(FileNotFoundError) as error:
        config.load_config(str(file.with_name('mask_rcnn_tiny.py')))
    assert str(error.value).startswith(f'no config file {file.with_name("mask_rcnn_tiny.py")}')
    assert f'did you mean\n    {file}' in str(error.value)
    # A folder may hold the whole disk below it.
    below = file.parent / 'below'
    below.mkdir()
    file.rename(below / file.name)
    with pytest.raises(FileNotFoundError) as error:
        config.load_config(str(file.with_name('mask_rcnn_tiny.py')))
    assert 'below' not in str(error.value)


def test_load_config_names_our_configs_from_any_folder(tmp_path, monkeypatch, root):
    """From a folder that has no configs, those of the package are known."""
    monkeypatch.chdir(tmp_path)
    known = next((root / 'configs' / 'quick').glob('*mask-rcnn*.py'))
    with pytest.raises(FileNotFoundError, match=known.name):
        config.load_config(f'configs/quick/{known.stem[:-1]}.py')


def test_load_config_does_not_guess_wildly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        config.load_config('zzzzzzzz.py')
    assert 'did you mean' not in str(error.value)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_load_config_asks_for_the_package_of_the_scope(scope, file, monkeypatch):
    file.write_text(f"default_scope = '{scope}'\n")
    find_spec = compat.find_spec
    monkeypatch.setattr(compat, 'find_spec', lambda n: None if n == scope else find_spec(n))
    with pytest.raises(ModuleNotFoundError, match=f'(?s){scope} is not installed.*pip install'):
        config.load_config(str(file))


# ---- the walk over datasets --------------------------------------------------------------------


def test_the_walk_finds_what_the_wrappers_hold():
    a, b = dict(type='A'), dict(type='B')
    both = dict(type='Concat', datasets=[dict(type='Repeat', dataset=a), b])
    cfg = Config(dict(train_dataloader=dict(dataset=both), val_dataloader=None))
    assert loaders.datasets_of(cfg, 'train_dataloader', 'val_dataloader', 'no_dataloader') == [
        ('train_dataloader', a),
        ('train_dataloader', b),
    ]
    assert loaders.single_pass(both) == dict(both, datasets=[a, b])
    built = [1, 2]  # a dataset need not be a config
    assert loaders.inner_datasets(built) == loaders.inner_datasets(None) == []


def test_what_is_tested_on_comes_from_validation_where_there_is_no_test():
    data = dict(type='A', pipeline=[dict(type='Load')])
    cfg = Config(dict(test_dataloader=None, val_dataloader=dict(dataset=data)))
    assert loaders.datasets_of_test(cfg) == [data]
    with pytest.raises(ValueError, match='no test_dataloader and no val_dataloader'):
        loaders.datasets_of_test(Config(dict(model={})))


def test_a_type_is_known_by_its_name_whatever_form_it_has():
    for value in (dict(type='Config'), dict(type='mmengine.config.Config'), dict(type=Config)):
        assert config.type_name(value) == 'Config'
    assert config.type_name(Config()) == 'Config'  # built already


def test_add_hook_keeps_the_hooks_of_the_config():
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    config.add_hook(cfg, dict(type='CheckpointReportHook'))
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'CheckpointReportHook']
    cfg = Config(dict())
    config.add_hook(cfg, dict(type='CheckpointReportHook'))
    assert [hook.type for hook in cfg.custom_hooks] == ['CheckpointReportHook']


@pytest.mark.parametrize(
    'text, words',
    [
        (
            'train_pipeline = [2]',
            'train_pipeline is set, .*\n  set train_dataloader.data',
        ),
        ('rate = dict(lr=2)', 'rate is set, .*\n  set optim_wrapper.optimizer'),
        ('max_epochs = 3', 'max_epochs is set, .*\n  set train_cfg.max_epochs'),
        (
            'train_pipeline = [2]\ntrain_dataloader = dict(dataset=dict(pipeline=train_pipeline))',
            None,
        ),
        ('max_epochs = 3\ntrain_cfg = dict(max_epochs=3)', None),
        ('max_epochs = 2\nnote = 7\nwork_dir = "w"', None),
    ],
)
@pytest.mark.parametrize(
    'inherit', ['_base_ = ["base.py"]', 'with read_base():\n    from .base import *']
)
def test_variables_of_a_base_that_are_set_in_vain(inherit, text, words, tmp_path, capsys):
    base = """
train_pipeline, rate, max_epochs, note = [1], dict(type='SGD', lr=1), 2, 1
model = dict(type='A')
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=rate)
train_cfg = dict(max_epochs=max_epochs)
"""
    (tmp_path / 'base.py').write_text(base)
    pure = 'read_base' in inherit
    imports = 'from mmengine.config import read_base\n' if pure else ''
    (tmp_path / 'c.py').write_text(f'{imports}{inherit}\n{text}\n')
    config.load_config(str(tmp_path / 'c.py'))
    warned = capsys.readouterr().err
    assert re.search(words, warned) if words else not warned
