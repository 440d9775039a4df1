"""Mistakes in a config: one sentence with the field, what belongs there and what is there.

Each is made in a config that trains otherwise, and goes through what the tools run it with.
"""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmcv', reason='builds norms')

import itertools
import re

import numpy as np
import torch
from mmcv.cnn import build_norm_layer
from mmcv.ops import batched_nms
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS, VISBACKENDS
from mmengine.visualization import LocalVisBackend
from torch import nn

from wsbcn_mm.openmmlab import command_line, config, explain
from wsbcn_mm.openmmlab.deploy import inference
from wsbcn_mm.openmmlab.places import place_of

_numbers = itertools.count()


@MODELS.register_module()
class BodyOfMistakes(BaseModule):
    def __init__(
        self,
        channels,
        in_channels=3,
        strides=(1,),
        norm_cfg=None,
        year=None,
        nms=None,
        size=None,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        if channels < 1:
            raise ValueError(f'no channels: {channels}')
        self.conv = nn.Conv2d(in_channels, channels, 3, strides[0])
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.nms, self.size = nms, size

    def forward(self, x):
        if self.nms is not None:
            batched_nms(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1), self.nms)
        if self.size is not None:
            x = cropped(x, self.size)
        return self.norm(self.conv(x))


def cropped(x, size):
    return x[..., : size[0], : size[1]]


@MODELS.register_module()
class ModelOfMistakes(BaseModel):
    def __init__(self, backbone, mode='whole', share=False):
        super().__init__()
        if mode == 'teacher':
            backbone.update(more=1)  # as a detector's train_cfg goes into its heads
            raise FileNotFoundError('no teacher')
        self.backbone = MODELS.build(backbone)
        self.head = nn.Conv2d(8, 1, 1)
        self.twin = nn.Sequential(self.head) if share else nn.Identity()
        self.mode = mode

    def forward(self, inputs, mode='tensor', **_):
        if self.mode != 'whole':
            raise AssertionError
        output = self.head(self.backbone(torch.stack(list(inputs))))
        return dict(loss=output.square().mean()) if mode == 'loss' else [output]


@DATASETS.register_module()
class DataOfMistakes(BaseDataset):
    def load_data_list(self):
        return [dict(inputs=torch.ones(3, 6, 6)) for _ in range(2)]


@METRICS.register_module()
class MetricOfMistakes(BaseMetric):
    def __init__(self, metric='bbox'):
        super().__init__()
        self.metric = metric

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        if self.metric != 'bbox':
            raise KeyError(f'metric {self.metric} is not supported')
        return dict(bbox=1.0)


@TRANSFORMS.register_module()
class StepOfMistakes(BaseTransform):
    def transform(self, results):
        raise RuntimeError('no masks')


OF_MMENGINE = dict(__name__='mmengine.visualization')
exec('def init_env(self):\n    raise ImportError("Please run pip")', OF_MMENGINE)


@VISBACKENDS.register_module()
class BackendOfMistakes(LocalVisBackend):
    _init_env = OF_MMENGINE['init_env']


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """A config that trains a step and validates."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)  # asks compilers
    loader = dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='DataOfMistakes', pipeline=[], serialize_data=False),
    )
    return Config(
        dict(
            model=dict(
                type='ModelOfMistakes',
                backbone=dict(
                    type='BodyOfMistakes', channels=8, norm_cfg=dict(type='BCN', num_groups=2)
                ),
            ),
            train_dataloader=loader,
            val_dataloader=loader,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1),
            val_cfg=dict(type='ValLoop'),
            val_evaluator=dict(type='MetricOfMistakes'),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1),
                paramwise_cfg=dict(norm_decay_mult=0.0),
            ),
            param_scheduler=[dict(type='LinearLR', start_factor=0.1)],
            default_hooks=dict(checkpoint=None),
            custom_hooks=[],
            env_cfg=dict(),
            randomness=dict(seed=0),
            log_level='ERROR',
            work_dir=str(tmp_path),
            experiment_name=f'mistakes_{next(_numbers)}',
        )
    )


def put(cfg, key, value):
    """Sets a value, removes it where it is `MISSING`."""
    *place, last = [int(part) if part.isdigit() else part for part in key.split('.')]
    at = cfg._cfg_dict
    for part in place:
        at = at[part]
    if value is MISSING:
        del at[last]
    else:
        at[last] = value


def said_of(cfg):
    """The sentence in which a run ends."""
    with pytest.raises(SystemExit) as end, command_line.errors_of_a_run(cfg):
        command_line.build_runner(cfg).train()
    assert end.value.code.startswith('error: ')
    return end.value.code.removeprefix('error: ')


def test_the_config_of_these_tests_trains(cfg):
    command_line.build_runner(cfg).train()


MISSING = object()
NORM, LOADER = 'model.backbone.norm_cfg', 'train_dataloader'
MULTI = dict(type='MultiStepLR', milestones=[1])
MISTAKES = [
    # names
    (
        'model.backbone.type',
        'BodyOfMistake',
        r"{0}: 'BodyOfMistake' is not known .*\n.*'BodyOfM.*s'",
    ),
    ('model.backbone.type', MISSING, 'model.backbone has no type'),
    ('model.type', 'ModelOfMistake', r"{0}: 'ModelOfMistake' is not known"),
    (f'{NORM}.type', 'BNC', r"{0}: 'BNC' is not known .*\n  did you mean .*'BCN'"),
    ('optim_wrapper.optimizer.type', 'SDG', r"{0}: 'SDG' is not known .*\n  did you mean 'SGD'"),
    ('optim_wrapper.constructor', 'MyConstructor', "{0}: 'MyConstructor' is not known"),
    ('param_scheduler.0.type', 'LinearLr', r"param_scheduler\[0\].type: 'LinearLr' is not known"),
    (f'{LOADER}.dataset.type', 'CocoDatset', "{0}: 'CocoDatset' is not known"),
    (f'{LOADER}.sampler.type', 'DefaultSample', "{0}: 'DefaultSample' is not known"),
    (f'{LOADER}.collate_fn', dict(type='pseudo_colate'), "{0}.type: 'pseudo_colate' is not known"),
    (f'{LOADER}.dataset.pipeline', [dict(type='RandomFlp')], r'{0}\[0\].type: .*\n  did you mean'),
    ('val_evaluator.type', 'MetricOfMistake', "{0}: 'MetricOfMistake' is not known"),
    ('val_cfg.type', 'ValLop', "{0}: 'ValLop' is not known"),
    ('custom_hooks', [dict(type='EMAHok')], r"{0}\[0\].type: 'EMAHok' is not known"),
    ('log_processor', dict(type='LogProcesor'), "{0}.type: 'LogProcesor' is not known"),
    ('runner_type', 'Runer', "{0}: 'Runer' is not known"),
    # files
    ('model.mode', 'teacher', r'model: ModelOfMistakes cannot be made\n  FileNotFoundError: no t'),
    # arguments
    ('model.backbone.chanels', 8, '{0}: BodyOfMistakes has no such argument\n  did you mean chan'),
    ('model.backbone.channels', MISSING, 'model.backbone: BodyOfMistakes needs channels'),
    (f'{NORM}.momentun', 0.1, '{0}: BatchChannelNorm2d has no such argument'),
    ('optim_wrapper.optimizer.momentm', 0.1, '{0}: SGD has no such argument'),
    ('param_scheduler.0.start_facto', 0.1, r'param_scheduler\[0\].start_facto: LinearLR has no'),
    (f'{LOADER}.batchsize', 1, '{0}: DataLoader has no such argument\n  did you mean batch_size'),
    (f'{LOADER}.samples_per_gpu', 1, '{0}: DataLoader has no such .*\n  did you mean batch_size'),
    (f'{LOADER}.dataset', MISSING, 'train_dataloader has no dataset'),
    (f'{LOADER}.dataset.labels', 'x', r'{0}: DataOfMistakes has no such .*\n.*\n.*_delete_=True'),
    ('train_cfg.max_epoch', 3, '{0}: IterBasedTrainLoop has no such argument'),
    ('train_cfg.max_iters', MISSING, 'train_cfg: IterBasedTrainLoop needs max_iters'),
    ('randomness.sed', 0, '{0}: set_randomness has no such argument\n  did you mean seed'),
    ('log_processor', dict(by_epochs=True), 'log_processor cannot be used\n  TypeError: .*by_ep'),
    (
        'custom_hooks',
        [dict(type='EMAHook', momentm=0.1)],
        r'custom_hooks\[0\]: EMAHook .*\n.*momentm',
    ),
    ('optim_wrapper.clip_grad', dict(max_norms=1), '{0}.max_norms: clip_grad_norm_ has no such'),
    # values
    ('optim_wrapper.optimizer.lr', '1e-3', "{0} must be a number\n  got '1e-3': .* write 0.001 "),
    ('optim_wrapper.optimizer.lr', (0.01,), r'{0} must be a number\n  got \(0.01,\): a comma'),
    ('optim_wrapper.optimizer.lr', -1, 'optim_wrapper.optimizer: SGD .*\n  ValueError: .* -1'),
    ('optim_wrapper.accumulative_counts', '4', '{0} must be a number'),
    ('optim_wrapper.clip_grad', 10, r'optim_wrapper: OptimWrapper .*\n.*`clip_grad`.*\n.*\n.*=10'),
    (
        'optim_wrapper.paramwise_cfg',
        dict(custom_keys=dict(conv=0.1)),
        '{0} cannot be used',
    ),
    ('model.backbone.channels', '8', "{0} must be a number\n  got '8': a text; write 8"),
    (
        'model.backbone.channels',
        0,
        'model.backbone: BodyOf.*\n  ValueError: no channels: 0',
    ),
    ('model.backbone.strides', 1, r'{0} must be a list such as \(1,\)\n  got 1'),
    (NORM, 'BCN', r"{0} must be a dict with a type\n  got 'BCN'"),
    (f'{NORM}.num_groups', 3, '(?s)model.backbone.norm_cfg: .*num_groups=3'),
    (f'{NORM}.num_groups', '2', "(?s)model.backbone.norm_cfg: .*TypeError.*got '2'"),
    ('param_scheduler', dict(MULTI, milestones=8), '{0}.milestones must be a list\n  got 8'),
    ('param_scheduler.0.end', '9', r'param_scheduler\[0\].end must be a number'),
    ('param_scheduler.0.begin', 2**31 - 1, r'param_scheduler\[0\]: LinearLR .*\n  ValueError'),
    ('param_scheduler.0', (MULTI,), r'(?s){P} cannot .*\[0\]: a comma at the end of its line'),
    (f'{LOADER}.batch_size', '2', "{0} must be a number\n  got '2'"),
    (f'{LOADER}.batch_size', (2,), r'{0} must be a number\n  got \(2,\): a comma'),
    (f'{LOADER}.dataset.pipeline', [(dict(type='RandomFlip'),)], r'(?s){0} .*\[0\]: a comma'),
    (f'{LOADER}.dataset.ann_file', ['a', 'b'], '{0} must be a text\n  got '),
    (f'{LOADER}.dataset.data_prefix', 'images', '{0} must be a dict such as '),
    ('train_cfg.max_iters', '1', '{0} must be a number'),
    ('train_cfg.val_interval', '1', '{0} must be a number'),
    (
        'val_evaluator.metric',
        'bbx',
        '{0}: MetricOfMistakes stopped at it\n  KeyError: metric bbx',
    ),
    ('custom_hooks', [dict(type='EMAHook', momentum='0.1')], r'{P}\[0\].momentum must be a number'),
    ('custom_hooks', [dict(type='EMAHook', priority='HIGHST')], 'custom_hooks cannot be used'),
    ('env_cfg', 'x', 'env_cfg cannot be used'),
    ('log_level', 'LOUD', 'log_level cannot be used'),
    ('randomness.seed', '0', '{0} must be a number'),
    ('val_cfg', MISSING, 'val_cfg is missing, and val_dataloader and val_evaluator there'),
    ('model.mode', 'hole', 'model: ModelOfMistakes stopped\n  .*raise AssertionError'),
    ('model.backbone.in_channels', 4, '(?s)model.backbone: .*in_channels=4\n.*takes 4, and got 3'),
    ('model.backbone.init_cfg', dict(type='Pretrain'), "{0}.type: 'Pretrain' is not known"),
    ('model.backbone.init_cfg', dict(layer='x'), '{0}: BodyOf.* stopped at it\n  KeyError: '),
    ('model.backbone.init_cfg', 'Kaiming', "{0}: BodyOf.* stopped at it\n.*\n  got 'Kaiming'"),
    # what a layer or a function of the hosts stops at
    (
        'model.backbone.nms',
        dict(type='nmss'),
        r"{0}.type: BodyOf.*\n  NameError.*nmss.*\n  got 'nmss'\n  at mmcv.ops.nms: nms_op",
    ),
    (
        'model.backbone',
        dict(type='mmseg.FCNHead', _scope_='mmseg', in_channels=3, channels=8, num_classes=3)
        | dict(in_index=5),
        r'{0}.in_index: FCNHead stopped at it\n  .*\n  got 5\n  at .*\n  with inputs of shape',
    ),
    ('model.backbone.size', (4,), r'{0} must be a number, or several\n  got \(4,\): a comma'),
    (
        'model.backbone',
        dict(type='mmdet.FPN', _scope_='mmdet', in_channels=[3], out_channels=8, num_outs=2)
        | dict(start_level=7),
        r'(?s){0}: FPN stopped\n  IndexError.*\n  from .*start_level=7',
    ),
    (
        'model.backbone',
        dict(type='BodyOfMistakes', channels=8, size=(3, 3), norm_cfg=dict(type='BN')),
        r'(?s){0}: .*Expected more than 1 value per channel.*convert_config\.py puts BCN there',
    ),
    ('train_cfg.val_interval', 0, '{0}: IterBasedTrainLoop stopped at it\n  ZeroDivisionError: '),
    (
        'default_hooks.checkpoint',
        dict(type='CheckpointHook', save_best='mAP', rule='greater'),
        '{0}.save_best: CheckpointHook stopped at it\n  KeyError: mAP\n  there are bbox\n',
    ),
    (
        f'{LOADER}.dataset.pipeline',
        [dict(type='StepOfMistakes')],
        r'{0}\[0\]: StepOfMistakes stopped\n  RuntimeError: no masks',
    ),
    (
        'visualizer',
        dict(type='Visualizer', vis_backends=[dict(type='BackendOfMistakes')]),
        r'{0}.vis_backends\[0\]: BackendOfMistakes stopped\n  ImportError: Please run',
    ),
    ('compile', dict(backend='inductr'), "compile cannot be used\n  .*'inductr'"),
]


@pytest.mark.parametrize('key, value, said', MISTAKES)
def test_a_mistake_is_one_sentence_with_its_field(cfg, key, value, said):
    put(cfg, key, value)
    said = said.replace('{0}', re.escape(key)).replace('{P}', re.escape(key.partition('.')[0]))
    assert re.match(said, said_of(cfg)), said_of(cfg)


def test_shared_parameters_with_settings_by_parameter(cfg):
    cfg.model.share = True
    words = 'optim_wrapper.paramwise_cfg: layers of the model share parameters (twin.0.weight is '
    assert said_of(cfg).startswith(words) and 'bypass_duplicate=True' in said_of(cfg)
    cfg.optim_wrapper.paramwise_cfg.bypass_duplicate = True
    command_line.build_runner(cfg).train()


def test_arrays_are_no_values_of_a_config():
    root = dict(model=dict(a=dict(b=1)))
    assert place_of(root, dict(b=torch.ones(2), c=1), ()) is None
    assert place_of(root, dict(b=1, c=torch.ones(2)), ()) == ('model', 'a')


def test_a_flexible_runner_without_env_cfg(cfg):
    cfg.runner_type = 'FlexibleRunner'
    put(cfg, 'env_cfg', MISSING)
    assert said_of(cfg).startswith('env_cfg is missing')


def test_a_default_scope_that_is_no_package(cfg):
    cfg.default_scope = 'mmdt'
    cfg.model.type = 'RetinaNet'
    assert "default_scope is 'mmdt'" in said_of(cfg)


@pytest.mark.parametrize(
    'defect, raised', [(lambda self, x: x.no_such_thing, AttributeError), (len, TypeError)]
)
def test_a_defect_keeps_its_traceback(cfg, monkeypatch, defect, raised):
    """Neither raised on purpose, nor about a field: folders and years may be texts of digits."""
    cfg.train_dataloader.dataset.data_prefix = dict(img_path='2017')
    cfg.model.backbone.year = '2012'
    monkeypatch.setattr(BodyOfMistakes, 'forward', defect)
    with pytest.raises(raised), command_line.errors_of_a_run(cfg):
        command_line.build_runner(cfg).train()


def test_a_package_that_a_layer_of_the_hosts_lacks(cfg, monkeypatch):
    fpn = pytest.importorskip('mmdet.models.necks.fpn')
    names = dict(__name__=fpn.__name__)
    exec('def forward(self, inputs):\n    import no_such_package', names)
    monkeypatch.setattr(fpn.FPN, 'forward', names['forward'])
    cfg.model.backbone = dict(type='mmdet.FPN', _scope_='mmdet', in_channels=[3])
    cfg.model.backbone.update(out_channels=8, num_outs=1)
    said = said_of(cfg)
    assert re.match(r"model\.backbone: FPN stopped\n  ModuleNotFoundError: No module .*'no_s", said)


@pytest.mark.parametrize('module', ['numpy', 'yaml'])  # one says itself what it has
def test_what_the_installed_version_of_a_package_no_longer_has(cfg, monkeypatch, module):
    """Evaluators call packages older than the numpy beside them; a user's own code is none."""

    def uses_it(name):
        names = dict(__name__=name)
        exec(f'import {module}\ndef compute_metrics(self, results): {module}.gone', names)
        monkeypatch.setattr(MetricOfMistakes, 'compute_metrics', names['compute_metrics'])

    uses_it('mmcv.evaluation')
    words = rf'mmcv [\d.]+ uses {module}\.gone, and the installed {module} [\d.]+ has none\n'
    said = said_of(cfg)
    assert re.match(words, said) and 'at mmcv.evaluation' in said and 'custom_imports' in said
    uses_it('my_metrics')
    with pytest.raises(AttributeError), command_line.errors_of_a_run(cfg):
        command_line.build_runner(cfg).train()


def test_errors_of_what_is_built_outside_of_a_run(cfg):
    cfg.model.backbone.type = 'BodyOfMistake'
    with pytest.raises(explain.ConfigError, match=r'^model\.backbone\.type: ') as error:
        with explain.named(cfg):
            MODELS.build(cfg.model)
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    'text, words',
    [
        (
            '_base_ = ["nowhere.py"]',
            r'inherits \(_base_\) from .*nowhere\.py, which does not exist',
        ),
        ('_base_ = ("nowhere.py",)', r'_base_ must be a path or a list of paths: .*a comma'),
    ],
)
def test_a_base_that_is_none(tmp_path, text, words):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        config.read_config(tmp_path / 'c.py')


def test_lr_of_yaml(cfg, tmp_path):
    """YAML 1.1 takes 1e-3 for a text."""
    (tmp_path / 'c.yml').write_text('lr: 1e-3\n')
    cfg.optim_wrapper.optimizer.lr = Config.fromfile(str(tmp_path / 'c.yml')).lr
    assert 'write 0.001 (YAML takes it for a text)' in said_of(cfg)


@pytest.mark.parametrize(
    'shapes, words',
    [
        ([(3, 32, 32), (3, 40, 32)], 'images of other sizes make no batch'),
        ([(1, 32, 32)], 'turns BGR to RGB .* gets images of 1 channels\n  .* in_channels=1'),
    ],
)
def test_images_that_the_preprocessor_does_not_take(shapes, words):
    pytest.importorskip('mmseg', reason='its segmenter and its preprocessor')
    cfg = config.load_config('configs/quick/quick_deeplabv3_r18_ws-bcn_1xb1_shapes.py')
    cfg.model.data_preprocessor = dict(type='SegDataPreProcessor', size=(40, 32), bgr_to_rgb=True)
    if len(shapes) == 1:
        cfg.model.data_preprocessor = dict(type='ImgDataPreprocessor', bgr_to_rgb=True)
    model = inference.build_model(cfg)
    inputs = [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]
    with pytest.raises(explain.ConfigError, match=words), explain.named(cfg):
        model.test_step(dict(inputs=inputs, data_samples=[]))


def test_a_config_that_cannot_be_written(formatted_configs):
    cfg = Config(dict(model=dict(type='A'), kind=nn.ReLU, values=np.ones(2)))
    words = 'kind is .*ReLU.*\n.*`del kind, values`'
    with pytest.raises(explain.ConfigError, match=words), explain.named(cfg):
        str(cfg.pretty_text)
