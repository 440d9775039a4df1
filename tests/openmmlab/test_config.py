"""wsbcn_mm.openmmlab.config: messages that tell a user what to do, before anything is started."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmcv', reason='a config is not read without mmcv')

import torch
from mmengine.config import Config

from wsbcn_mm.openmmlab import command_line, compat, config


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
    ],
)
def test_a_file_that_is_no_config_says_so_in_two_lines(file, text, reason):
    file.write_text(text)
    with pytest.raises(ValueError, match=f'{file.name} cannot be read as a config') as error:
        config.load_config(str(file))
    assert reason in str(error.value) and len(str(error.value).splitlines()) == 2


def test_a_missing_base_is_named(file):
    file.write_text("_base_ = 'wsbcn_mm::mask_rcnn/mask-rcnn_r50_fpn_ws-bnc_8xb1-2x_coco.py'\n")
    with pytest.raises(FileNotFoundError, match='(?s)has no such config.*ws-bcn_8xb1-2x_coco'):
        config.load_config(str(file))


def test_a_missing_import_of_a_config_stays_an_import_error(file):
    file.write_text(file.read_text() + "custom_imports = dict(imports=['no_such_package'])\n")
    with pytest.raises(ImportError, match='no_such_package'):
        config.load_config(str(file))


def test_errors_in_one_line():
    """A mistake of the user ends the program; a defect keeps its traceback."""
    with pytest.raises(SystemExit) as ended, command_line.errors_in_one_line():
        raise ValueError('lr must be positive')
    assert ended.value.code == 'error: lr must be positive'
    with pytest.raises(AttributeError), command_line.errors_in_one_line():
        raise AttributeError('a defect')


def test_load_config_wants_a_model(file):
    file.write_text('lr = 0.1\n')
    with pytest.raises(ValueError, match=f'{file.name} has no model'):
        config.load_config(str(file))


def test_load_config_names_files_that_may_have_been_meant(file):
    with pytest.raises(FileNotFoundError) as error:
        config.load_config(str(file.with_name('mask_rcnn_tiny.py')))
    assert str(error.value).startswith(f'no config file {file.with_name("mask_rcnn_tiny.py")}')
    assert f'did you mean\n    {file}' in str(error.value)


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


# ---- data --------------------------------------------------------------------------------------


def coco(root):
    return dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
    )


def voc(root):
    return dict(
        type='PascalVOCDataset',
        data_root=str(root),
        ann_file='ImageSets/Segmentation/train.txt',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    )


PARTS = {
    coco: ['annotations/instances_train2017.json', 'train2017'],
    voc: ['ImageSets/Segmentation/train.txt', 'JPEGImages', 'SegmentationClass'],
}
LAYOUT = {coco: 'instances_{train,val}2017.json', voc: 'VOC2012/ImageSets/Segmentation'}
WRAPPERS = {
    'plain': lambda d: d,
    'repeat': lambda d: dict(type='RepeatDataset', times=2, dataset=d),
    'concat': lambda d: dict(type='ConcatDataset', datasets=[dict(type='ShapesCocoDataset'), d]),
    'nested': lambda d: dict(
        type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[d, d])
    ),
}


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if path.suffix else path.mkdir()


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('dataset', [coco, voc])
def test_check_data_names_each_missing_path_until_all_are_there(dataset, wrapper, tmp_path):
    inner = dataset(tmp_path)
    cfg = Config(dict(train_dataloader=dict(dataset=WRAPPERS[wrapper](inner))))
    for part in PARTS[dataset]:
        with pytest.raises(FileNotFoundError) as error:
            config.check_data(cfg, 'train_dataloader')
        message = str(error.value)
        first = f'train_dataloader: {inner["type"]} needs {tmp_path / part}, which does not exist'
        assert message.splitlines()[0] == first
        assert LAYOUT[dataset] in message
        assert '--cfg-options train_dataloader.dataset.data_root=' in message
        make(tmp_path / part)
    config.check_data(cfg, 'train_dataloader')


def test_check_data_looks_at_the_loaders_it_is_told(tmp_path):
    cfg = Config(dict(val_dataloader=dict(dataset=coco(tmp_path)), test_dataloader=None))
    config.check_data(cfg, 'train_dataloader', 'test_dataloader')
    with pytest.raises(FileNotFoundError, match='val_dataloader'):
        config.check_data(cfg, 'train_dataloader', 'val_dataloader')


def test_check_data_lets_the_embedded_dataset_draw_itself(tmp_path):
    dataset = dict(coco(tmp_path / 'absent'), type='ShapesCocoDataset')
    config.check_data(Config(dict(train_dataloader=dict(dataset=dataset))), 'train_dataloader')
    assert not (tmp_path / 'absent').exists()


def test_check_checkpoint_file_lists_what_is_there(tmp_path):
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'epoch_3.pth')
    config.check_checkpoint_file(str(tmp_path / 'epoch_3.pth'))
    config.check_checkpoint_file('https://example.org/epoch_4.pth')
    with pytest.raises(FileNotFoundError, match=r'(?s)epoch_4\.pth.*: epoch_3\.pth'):
        config.check_checkpoint_file(str(tmp_path / 'epoch_4.pth'))
    (tmp_path / 'epoch_5.pth').touch()
    with pytest.raises(ValueError, match=r'epoch_5\.pth is empty'):
        config.check_checkpoint_file(str(tmp_path / 'epoch_5.pth'))


# ---- options of the tools ----------------------------------------------------------------------


def test_work_dir_comes_from_the_argument_then_the_config_then_the_name():
    assert config.work_dir(Config(dict(work_dir='b')), 'configs/c.py', 'a') == 'a'
    assert config.work_dir(Config(dict(work_dir='b')), 'configs/c.py', None) == 'b'
    assert config.work_dir(Config(dict()), 'configs/c.py', None) == './work_dirs/c'


def test_add_hook_keeps_the_hooks_of_the_config():
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    config.add_hook(cfg, dict(type='CheckpointReportHook'))
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'CheckpointReportHook']
    cfg = Config(dict())
    config.add_hook(cfg, dict(type='CheckpointReportHook'))
    assert [hook.type for hook in cfg.custom_hooks] == ['CheckpointReportHook']


def test_draw_pictures_needs_the_hook():
    cfg = Config(dict(default_hooks=dict(timer=dict(type='IterTimerHook'))))
    with pytest.raises(ValueError, match=r'default_hooks\.visualization'):
        config.draw_pictures(cfg, True, None, 0)
    cfg = Config(dict(default_hooks=dict(visualization=dict(type='DetVisualizationHook'))))
    config.draw_pictures(cfg, True, 'pictures', 1.5)
    assert cfg.default_hooks.visualization == dict(
        type='DetVisualizationHook', draw=True, show=True, wait_time=1.5, test_out_dir='pictures'
    )


def test_augment_test_replaces_the_innermost_pipeline():
    with pytest.raises(ValueError, match='tta_model and tta_pipeline'):
        config.augment_test(Config(dict(model=dict(type='M'))))
    inner = dict(type='D', pipeline=[dict(type='Old')])
    cfg = Config(
        dict(
            model=dict(type='M'),
            tta_model=dict(type='T'),
            tta_pipeline=[dict(type='New')],
            test_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=inner)),
        )
    )
    config.augment_test(cfg)
    assert cfg.model == dict(type='T', module=dict(type='M'))
    assert cfg.test_dataloader.dataset.dataset.pipeline == [dict(type='New')]


@pytest.mark.parametrize('evaluators', [dict(type='CocoMetric'), [dict(type='CocoMetric')]])
def test_keep_predictions_of_detection_adds_an_evaluator(evaluators):
    cfg = Config(dict(default_scope='mmdet', test_evaluator=evaluators))
    with pytest.raises(ValueError, match=r'(?s)\.pkl.*got out\.json'):
        config.keep_predictions(cfg, 'out.json')
    config.keep_predictions(cfg, 'out.pkl')
    assert [e.type for e in cfg.test_evaluator] == ['CocoMetric', 'DumpDetResults']
    assert cfg.test_evaluator[1].out_file_path == 'out.pkl'


def test_keep_predictions_of_segmentation_names_a_folder():
    cfg = Config(dict(default_scope='mmseg', test_evaluator=dict(type='IoUMetric')))
    config.keep_predictions(cfg, 'masks')
    assert cfg.test_evaluator == dict(type='IoUMetric', output_dir='masks', keep_results=True)
