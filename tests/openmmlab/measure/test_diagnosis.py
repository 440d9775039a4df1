"""Diagnostics in OpenMMLab: the hook in a Runner, and the page of analysis_tools/diagnose.py."""

import base64
import importlib
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from tests.openmmlab.tiny import TinyModel
from tests.tool import tool
from wsbcn_mm.openmmlab.hooks.diagnostics import DiagnosticsHook

ROOT = Path(__file__).parents[3]


class TinyRelu(TinyModel):
    def forward(self, inputs, mode='tensor', **kwargs):
        x = torch.relu(self.bcn(self.conv(torch.stack(list(inputs)))))
        output = self.head(x)
        return dict(loss=(output - 1).square().mean()) if mode == 'loss' else [output]


def train(work_dir, **hook):
    torch.manual_seed(0)
    data = [dict(inputs=torch.randn(3, 6, 6) + 1) for _ in range(4)]
    loader = dict(dataset=data, batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler'))
    model = TinyRelu()
    runner = Runner(
        model,
        str(work_dir),
        train_dataloader=loader,
        val_dataloader=dict(loader),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        val_cfg=dict(),
        val_evaluator=[],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[dict(type='DiagnosticsHook', **hook)] if hook else [],
        experiment_name=f'diagnostics_{work_dir.name}',
        log_level='ERROR',
        randomness=dict(seed=0),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
    )
    runner.train()
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    return model, [json.loads(line) for line in file.read_text().splitlines()]


def test_hook_logs_and_changes_nothing(tmp_path):
    plain, _ = train(tmp_path / 'plain')
    model, lines = train(tmp_path / 'watched', interval=3, per_layer=True)
    for (key, value), other in zip(plain.state_dict().items(), model.state_dict().values()):
        assert torch.equal(value, other), key
    seen = [line for line in lines if 'diagnostics/dead_channels' in line]
    assert [line['step'] for line in seen] == [1, 3, 6]
    for line in seen:
        assert 0 <= line['diagnostics/dead_channels'] <= 1
        assert 0 < line['diagnostics/singularity_distance'] <= 1
        assert 0 < line['diagnostics/weight_gradient_ratio'] <= 1
        assert line['diagnostics/weight_gradient'] > 0
        assert line['diagnostics/conv/weight_gradient'] > 0
        assert math.isfinite(line['diagnostics/stat_spread'])
    gaps = [line for line in lines if 'diagnostics/mean_gap' in line]
    assert [line['step'] for line in gaps] == [4, 8]
    # The estimates start at variance 1; behind a WS convolution it is about the fan-in.
    assert gaps[0]['diagnostics/std_gap'] > 0.1
    assert gaps[0]['diagnostics/bcn/drift_share'] > 0


@pytest.mark.parametrize('interval', [0, -1, 1.5])
def test_hook_refuses(interval):
    with pytest.raises(ValueError, match='interval must be an integer >= 1'):
        DiagnosticsHook(interval)


# ----------------------------------------------------------------------------------------------
# The page

CONFIG = """
_base_ = [r'{root}/configs/quick/quick_deeplabv3_r18_ws-bcn_1xb1_shapes.py']
model = dict(data_preprocessor=dict(type='AsksHowFar'))
data_root = r'{data}/VOCdevkit/VOC2012'
classes = ('background', 'ellipse', 'rectangle', 'triangle', 'star', 'cross')
train_dataloader = dict(dataset=dict(
    type='BaseSegDataset', data_root=data_root, img_suffix='.jpg', seg_map_suffix='.png',
    metainfo=dict(classes=classes)))
val_dataloader = dict(dataset=dict(
    type='BaseSegDataset', data_root=data_root, img_suffix='.jpg', seg_map_suffix='.png',
    metainfo=dict(classes=classes)))
"""


TWICE = 'val_dataloader.dataset.metainfo.classes=[disc,disc]'


@pytest.fixture(scope='module')
def model_files(tmp_path_factory):
    """A config on four small images and a checkpoint of its untrained model."""
    pytest.importorskip('mmseg', reason='the quick segmenter is built from it')
    from mmengine.logging import MessageHub
    from mmseg.models import SegDataPreProcessor
    from mmseg.registry import MODELS

    from wsbcn_mm import shapes
    from wsbcn_mm.openmmlab.config import load_config

    @MODELS.register_module(force=True)
    class AsksHowFar(SegDataPreProcessor):
        """As BatchSyncRandomResize and TOOD's head do."""

        def forward(self, data, training=False):
            hub = MessageHub.get_current_instance()
            assert not training or hub.get_info('iter') + hub.get_info('epoch') == 0
            return super().forward(data, training)

    folder = tmp_path_factory.mktemp('diagnose')
    shapes.draw_dataset(folder / 'data', 2, 2, (64, 48))
    config = folder / 'small.py'
    config.write_text(CONFIG.format(root=ROOT, data=folder / 'data'))
    torch.manual_seed(0)
    model = MODELS.build(load_config(str(config)).model)
    torch.save(dict(state_dict=model.state_dict()), folder / 'model.pth')
    half = {k: v for k, v in model.state_dict().items() if 'decode_head' not in k}
    torch.save(dict(state_dict=half), folder / 'half.pth')
    return folder


def diagnose(folder, *arguments):
    return tool('analysis_tools/diagnose.py', *arguments, cwd=folder)


class Balanced(HTMLParser):
    """Fails on a tag that is closed where it was not opened."""

    def __init__(self):
        super().__init__()
        self.open, self.images = [], []

    def handle_starttag(self, tag, attributes):
        if tag == 'img':
            self.images.append(dict(attributes)['src'])
        elif tag != 'meta':
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(model_files, tmp_path, monkeypatch):
    result = diagnose(
        model_files,
        'small.py',
        'model.pth',
        '-o',
        tmp_path / 'report',
        '--images',
        2,
        '--train-batches',
        1,
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / 'report/diagnostics.json').read_text())
    assert numbers['images'] == 2
    assert numbers['layers']['BatchChannelNorm2d'] == numbers['layers']['WSConv2d'] == 23
    assert len(numbers['estimates']) == 22  # the auxiliary head takes no part in evaluation
    assert 0 < numbers['summary']['gradient_ratio'] < 1
    # Untrained: nothing has been estimated yet.
    assert numbers['summary']['drift_share'] > 0.5
    assert all(0 <= v['dead_channels'] <= 1 for v in numbers['activations'].values())
    page = Balanced()
    page.feed((tmp_path / 'report/index.html').read_text())
    assert page.open == [] and len(page.images) == 5
    for source in page.images:
        assert base64.b64decode(source.partition('base64,')[2])[:4] == b'\x89PNG'
    text = re.sub('<[^>]*>', ' ', (tmp_path / 'report/index.html').read_text())
    value = numbers['summary']['singularity_distance']
    assert f'distance to singularities   {value:.3g}' in text

    # Against another model: both are in the page.
    monkeypatch.syspath_prepend(str(ROOT / 'tools/analysis_tools'))
    from diagnosis_page import read_numbers, write_page

    other = read_numbers(tmp_path / 'report/diagnostics.json')
    other['summary']['singularity_distance'], other['estimates'] = 0.123, {}
    write_page(numbers, tmp_path / 'both.html', other)
    text = re.sub('<[^>]*>', ' ', (tmp_path / 'both.html').read_text())
    assert f'{value:.3g}  0.123' in text


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['small.py', 'half.pth'], 'does not fill'),
        (['small.py', 'none.pth'], 'no checkpoint file'),
        (['small.py', 'model.pth', '--images', '0'], '--images must be positive'),
        (['small.py', 'model.pth', '--against', 'small.py'], 'small.py is not JSON'),
        (
            ['small.py', 'model.pth', '--cfg-options', TWICE],
            "BaseSegDataset: classes names 'disc' twice",
        ),
        (
            ['small.py', 'model.pth', '--cfg-options', 'val_dataloader=None'],
            'small.py has no val_dataloader',
        ),
    ],
)
def test_tool_says_what_is_wrong(model_files, tmp_path, monkeypatch, arguments, words):
    monkeypatch.syspath_prepend(str(ROOT / 'tools/analysis_tools'))
    monkeypatch.chdir(model_files)
    tool = importlib.import_module('diagnose')
    monkeypatch.setattr(sys, 'argv', ['diagnose.py', *arguments, '-o', str(tmp_path / 'report')])
    with pytest.raises(SystemExit, match=re.escape(words)) as error:
        tool.main()
    assert str(error.value).startswith('error: ')
    assert not (tmp_path / 'report/index.html').exists()
