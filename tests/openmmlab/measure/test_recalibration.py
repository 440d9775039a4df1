"""openmmlab.measure.recalibration, and tools/model_converters/recalibrate.py that uses it."""

import pytest

pytest.importorskip('mmseg', reason='the quick segmenter is built from it')

import functools
import importlib.util
import sys

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from tests.openmmlab.tiny import tiny_model
from wsbcn_mm import shapes
from wsbcn_mm.openmmlab.measure import recalibration

QUICK = 'configs/quick/quick_deeplabv3_r18_ws-bcn_1xb1_shapes.py'


def test_training_images_get_the_pipeline_of_testing():
    train = dict(type='A', ann_file='train', pipeline=['flip'])
    mixed = dict(type='Repeat', dataset=dict(type='Mix', pipeline=['mosaic'], dataset=train))
    both = dict(type='Concat', datasets=[dict(type='Repeat', dataset=train), dict(train, type='B')])
    test = dict(dataset=dict(type='A', ann_file='test', pipeline=['resize']))
    for dataset, expected in (
        (train, dict(train, pipeline=['resize'])),
        (mixed, dict(train, pipeline=['resize'])),
        (both, dict(both, datasets=[dict(train, type=t, pipeline=['resize']) for t in 'AB'])),
    ):
        cfg = Config(dict(train_dataloader=dict(dataset=dataset), val_dataloader=test))
        assert recalibration.training_images_as_tested(cfg) == expected
        assert cfg.train_dataloader.dataset == dataset
    with pytest.raises(ValueError, match='no test_dataloader'):
        recalibration.training_images_as_tested(Config(dict(train_dataloader=dict(dataset=train))))


@pytest.mark.parametrize('stored', [dict(backend='lmdb', db_path='train'), None])
def test_training_images_are_read_from_where_they_lie(stored):
    load = dict(type='LoadImageFromFile')
    train = dict(load, backend_args=stored) if stored else load
    test = dict(load, color_type='grayscale', backend_args=dict(backend='lmdb', db_path='val'))
    loaders = {
        f'{name}_dataloader': dict(dataset=dict(type='A', pipeline=[step, dict(type='Pack')]))
        for name, step in dict(train=train, test=test).items()
    }
    found = recalibration.training_images_as_tested(Config(loaders))['pipeline']
    assert found == [dict(test, backend_args=stored), dict(type='Pack')]


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('bare', [False, True])
def test_statistics_go_into_a_checkpoint_and_nothing_else(prefix, bare):
    model, other = tiny_model(1.0), tiny_model(2.0)
    state = {prefix + key: value for key, value in other.state_dict().items()}
    checkpoint = state if bare else dict(state_dict=state, meta=dict(epoch=3))
    keys = recalibration.write_statistics(model, checkpoint)
    assert keys == [f'{prefix}bcn.bn.running_mean', f'{prefix}bcn.bn.running_var']
    for key, value in state.items():
        if value.is_floating_point():
            assert (value == (1 if key in keys else 2)).all(), key
    assert (other.conv.weight == 2).all()
    with pytest.raises(ValueError, match='no bcn.bn.running_mean'):
        recalibration.write_statistics(model, dict(state_dict={'conv.weight': torch.zeros(1)}))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where the data set is drawn in small when it is first asked for."""
    small = functools.partial(shapes.draw_dataset, num_train=4, num_val=1, size=(96, 80))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, 'draw_dataset', small)
        yield tmp_path_factory.mktemp('user')


def tool(root, *arguments):
    """Runs the tool in this process: its exit message, or None."""
    path = root / 'tools/model_converters/recalibrate.py'
    spec = importlib.util.spec_from_file_location('recalibrate_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, ['recalibrate.py', *map(str, arguments)]
    try:
        module.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


def test_the_tool(root, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    cfg = Config.fromfile(root / QUICK)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    checkpoint = dict(meta=dict(epoch=3), state_dict=model.state_dict())
    torch.save(checkpoint, 'a.pth')
    arguments = (root / QUICK, 'a.pth', '-n', '3', '--passes', '2')
    assert tool(root, *arguments) is None
    out = capsys.readouterr().out
    assert 'a_recalibrated.pth: 46 statistics of 22 layers over 3 images, 2 passes' in out
    assert 'not used by these images, unchanged: auxiliary_head.convs.0.bcn' in out

    found = torch.load('a_recalibrated.pth', weights_only=True)
    assert found['meta'] == dict(epoch=3)
    before, after = checkpoint['state_dict'], found['state_dict']
    assert list(before) == list(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 44
    assert all('running_' in key for key in changed)
    # The first layer's are those of the images themselves.
    first = 'backbone.bcn1.bn.running_mean'
    batches = recalibration.loader(recalibration.training_images_as_tested(cfg), 3)
    with torch.no_grad():
        inputs = [model.data_preprocessor(batch)['inputs'] for batch in batches]
        means = [model.backbone.conv1(x).mean((0, 2, 3)) for x in inputs]
    torch.testing.assert_close(after[first], torch.stack(means).mean(0))


def test_the_tool_keeps_the_function_of_a_backbone_and_its_model(root, folder, monkeypatch, capsys):
    """A converted ImageNet file: the backbone alone, its function right, its statistics unknown."""
    monkeypatch.chdir(folder)
    cfg = Config.fromfile(root / QUICK)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    backbone = model.backbone.state_dict()
    torch.save(dict(meta=dict(formula='paper'), state_dict=backbone), 'b.pth')
    arguments = ('-n', '3', '--passes', '2', '--keep-function')
    assert tool(root, root / QUICK, 'b.pth', *arguments) is None
    assert 'last change 0.00' in capsys.readouterr().out
    found = torch.load('b_recalibrated.pth', weights_only=True)
    assert found['meta'] == dict(formula='paper')
    after = found['state_dict']
    assert list(after) == list(backbone)
    changed = {key for key in backbone if not torch.equal(backbone[key], after[key])}
    kinds = {key.rpartition('bcn')[2][2:] for key in changed if 'bcn' in key}
    assert kinds == {
        'batch_weight',
        'batch_bias',
        'bn.running_mean',
        'bn.running_var',
        'bn.num_batches_tracked',
    }
    assert after['bcn1.bn.num_batches_tracked'] == 3  # what a warm-up of the rate goes on from
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.backbone(image)
        model.backbone.load_state_dict(after)
        for got, old in zip(model.backbone(image), expected, strict=True):
            torch.testing.assert_close(got, old, rtol=1e-4, atol=1e-4)

    torch.save(dict(meta=dict(formula='var_eps'), state_dict=backbone), 'c.pth')
    assert "formula 'var_eps'" in tool(root, root / QUICK, 'c.pth', '-n', '1')
    torch.save(dict(meta=dict(affine='channel'), state_dict=backbone), 'c.pth')
    message = tool(root, root / QUICK, 'c.pth', '-n', '1')
    assert "norm_cfg=dict(type='BCN', affine='channel')" in message
    assert not (folder / 'c_recalibrated.pth').exists()


def test_the_tool_says_what_is_wrong(root, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    torch.save(dict(state_dict=tiny_model().state_dict()), 'other.pth')
    assert 'does not fill' in tool(root, root / QUICK, 'other.pth')
    assert 'no checkpoint file missing.pth' in tool(root, root / QUICK, 'missing.pth')
    assert tool(root, root / QUICK, 'other.pth', '-n', '0') == 2
    assert '--num-images must be at least 1' in capsys.readouterr().err
    assert not (folder / 'other_recalibrated.pth').exists()
