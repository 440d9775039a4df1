"""What a run may have besides BN, GN, BCN: weights of another task, micro-steps, other norms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmseg', reason='the study builds its models with mmcv and mmseg')
pytest.importorskip('sklearn', reason='the digits of the smallest task')

ROOT = Path(__file__).parents[2]
STUDY = ROOT / 'tools/study'


@pytest.fixture(autouse=True)
def import_from_tools(monkeypatch):
    from mmengine.logging import MMLogger

    MMLogger.get_instance('study', log_level='ERROR')  # mmseg's models log their initialisation
    monkeypatch.syspath_prepend(str(STUDY))
    from experiments import loop

    monkeypatch.setattr(loop, 'CALIBRATION_IMAGES', 4)


def test_micro_steps_of_one_image_are_a_step_of_eight():
    from experiments import loop, tasks

    # Two steps: in more of them rounding decides what a ReLU does with a value near 0.
    task = tasks.Digits(blocks=1, width=8, num_train=16)
    spec = dict(norm=dict(type='GN', num_groups=4), conv=dict(type='WSConv2d'), lr=0.01, seed=3)
    spec |= dict(epochs=1, weight_decay=1e-4)
    trained = []
    for count, more in ((8, {}), (1, dict(accumulate=8))):
        loop.run(task, dict(spec, images_per_step=count, **more), after=trained.append)
    for a, b in zip(*(model.parameters() for model in trained)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A grid with folders of images that pretrain, and a drawn set in small."""
    from experiments import grid as grids

    from wsbcn_mm import shapes

    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for name in ('a', 'b'):
            (tmp_path / 'classes' / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / f'classes/{split}/{name}/{i}.png')
    shapes.draw_dataset(tmp_path / 'shapes', num_train=8, num_val=4, size=(64, 64))
    monkeypatch.setattr(shapes, 'draw_dataset', lambda root: None)  # it is drawn, in small
    common = dict(epochs=1, weight_decay=0.0, num_groups=4, lrs=[0.01], seeds=[0])
    before = dict(task='classes', images_per_step=8, seed=0, lr=dict(BN=0.01))
    of_classes = dict(root=str(tmp_path / 'classes'), width=8)
    of_shapes = dict(root=str(tmp_path / 'shapes'), size=[64, 64], crop=48, width=8, head=8)
    content = dict(
        seeds=[0],
        tasks=dict(
            classes=dict(dataset='cifar', arguments=of_classes, **common),
            after=dict(dataset='shapes', arguments=of_shapes, pretraining=before, **common),
        ),
        rows={
            'BN': dict(norm=dict(type='BN')),
            'GN': dict(norm=dict(type='GN', num_groups='task')),
            'frozen': dict(norm=dict(type='BN'), frozen=True, pretrained_as='BN', head='GN'),
        },
        order=[
            dict(tasks=['classes'], images_per_step=[8], rows=['BN']),
            dict(tasks=['after'], images_per_step=[1], rows=['frozen']),
        ],
    )
    file = tmp_path / 'grid.yaml'
    file.write_text(json.dumps(content))
    return grids.load(file), file


def test_a_frozen_backbone_keeps_its_pretrained_norms(small, tmp_path):
    from experiments import grid as grids
    from experiments import loop, pretrained, tasks

    grid, _ = small
    run = grids.spec(grid, grids.Cell('after', 'frozen', 1), 0.01, 0)
    assert run['pretraining'] == grids.spec(grid, grids.Cell('classes', 'BN', 8), 0.01, 0)
    assert run['head'] == dict(norm=dict(type='GN', num_groups=4), conv=None)
    said: list[str] = []
    weights = pretrained.weights(run['pretraining'], tmp_path / 'kept', said.append)
    (again,) = (tmp_path / 'kept').iterdir()
    torch.save({'from': torch.ones(1)}, again)  # what is kept is not made anew
    assert list(pretrained.weights(run['pretraining'], tmp_path / 'kept', print)) == ['from']

    trained = []
    task = tasks.make(run['dataset'], run['arguments'])
    loop.run(task, run, weights=weights, after=trained.append)
    (model,) = trained
    changed = {
        key for key, value in model.backbone.state_dict().items() if not value.equal(weights[key])
    }
    assert changed and all('conv' in key or 'downsample.0' in key for key in changed)
    head = [type(m).__name__ for m in model.head.modules() if 'Norm' in type(m).__name__]
    assert head and set(head) == {'GroupNorm'}


def test_the_grid_pretrains_by_itself(small, tmp_path, monkeypatch, capsys):
    import run_grid

    monkeypatch.setattr(run_grid, 'WEIGHTS', tmp_path / 'kept')
    run_grid.main([str(small[1]), '-o', str(tmp_path / 'results')])
    assert {p.parent.name for p in (tmp_path / 'results').rglob('*.json')} == {'classes', 'after'}
    assert len(list((tmp_path / 'kept').iterdir())) == 1
    assert 'pretraining' not in capsys.readouterr().out  # the search's own run is taken


def test_the_grid_for_a_gpu_names_networks_that_train(tmp_path):
    from experiments import detection, tasks
    from experiments import grid as grids
    from mmdet.registry import MODELS

    from wsbcn_mm.openmmlab.config import use_scope

    grid = grids.load(STUDY / 'grids/gpu.yaml')
    model = tasks.DeepLabV3(dict(type='BN'), None, 3, width=4, head=8, depth=50)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0

    run = grids.spec(grid, grids.Cell('instances_r50', 'GN', 1), 0.001, 0)
    run['arguments']['root'] = str(tmp_path / 'shapes/coco')
    from wsbcn_mm import shapes

    shapes.draw_dataset(tmp_path / 'shapes', num_train=1, num_val=1, size=(64, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, 'draw_dataset', lambda root: None)
        cfg = detection.config(run, tmp_path)
    use_scope(cfg)
    detector = MODELS.build(cfg.model)
    assert detector.backbone.depth == 50
    maps = detector.neck(detector.backbone(torch.randn(1, 3, 64, 64)))
    assert [m.shape[1] for m in maps] == [64] * 4


def test_the_detector_begins_with_a_pretrained_backbone(tmp_path, monkeypatch):
    from experiments import detection, loop, tasks
    from experiments import grid as grids
    from mmengine.runner import Runner

    from wsbcn_mm import shapes

    grid = grids.load(STUDY / 'grids/study.yaml')
    cell = grids.Cell('nuclei_pretrained', 'frozen BN, BCN + WS in the head', 1)
    run = grids.spec(grid, cell, 0.001, 0)
    before = run['pretraining']
    weights = tasks.backbone(
        loop.norm_config(before['norm'], 1), before['conv'], before['arguments']['width']
    ).state_dict()
    shapes.draw_dataset(tmp_path / 'shapes', num_train=2, num_val=2, size=(64, 64))
    monkeypatch.setattr(detection, 'draw_dataset', lambda root: None)
    run['dataset'] = 'shapes_instances'
    run['arguments'].update(
        root=str(tmp_path / 'shapes/coco'), images=4, val_images=1, test_images=1
    )
    # A row's options come last.
    run['options'] = {
        'model.roi_head.mask_head.norm_cfg': dict(_delete_=True, type='GN', num_groups=8),
        'custom_hooks': [dict(type='EstimatesHook', freeze_after=1)],
    }
    cfg = detection.config(run, tmp_path, weights)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.type = 'CocoDataset'  # ours draws what is missing
    runner = Runner.from_cfg(cfg)
    recorder = detection.Recorder(4)
    runner.register_hook(recorder)
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'EstimatesHook')
    assert hook.freeze_after == 1
    runner.train()
    norms = {type(m).__name__ for m in runner.model.roi_head.mask_head.modules()}
    assert 'GroupNorm' in norms and 'BatchChannelNorm2d' not in norms
    parts = {'loss', 'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'}
    assert {*recorder.curve} == {'step', *parts}
    losses = detection.trained_losses(runner, runner.model)
    assert {*losses['crops']} == {*losses['images']} == parts
    for found in (*losses.values(), {k: v[-1] for k, v in recorder.curve.items()}):
        assert found['loss'] == pytest.approx(sum(found[part] for part in parts - {'loss'}))
    after = runner.model.backbone.state_dict()
    assert list(after) == list(weights)
    changed = {key for key, value in after.items() if not value.equal(weights[key])}
    assert changed and all('conv' in key or 'downsample.0' in key for key in changed)
    kinds = {
        type(m).__name__
        for part in (runner.model.neck, runner.model.roi_head)
        for m in part.modules()
    }
    assert {'BatchChannelNorm2d', 'WSConv2d'} <= kinds and 'BatchNorm2d' not in kinds


def test_rates_of_the_pretraining_are_those_that_its_search_found():
    from experiments import grid as grids

    grid = grids.load(STUDY / 'grids/study.yaml')
    results = grids.Results(ROOT / 'docs/study/results')
    for task in grid['tasks'].values():
        before = task.get('pretraining', dict(lr={}))
        for row, lr in before['lr'].items():
            cell = grids.Cell(before['task'], row, before['images_per_step'])
            assert grids.best_lr(grid, results, cell) == lr, row


def test_norms_that_bring_their_activation():
    from experiments import tasks
    from experiments.other_norms import FRN, EvoNormS0

    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    frn = FRN(4).double()
    torch.nn.init.normal_(frn.weight)
    torch.nn.init.normal_(frn.bias)
    torch.nn.init.normal_(frn.threshold)
    expected = torch.empty_like(x)
    for n in range(2):
        for c in range(4):
            root = (sum(v * v for v in x[n, c].flatten()) / 15 + 1e-6).sqrt()
            expected[n, c] = frn.weight[c] * x[n, c] / root + frn.bias[c]
    torch.testing.assert_close(frn(x), expected)
    frn.activates = True
    torch.testing.assert_close(frn(x), expected.maximum(frn.threshold.view(4, 1, 1)))

    evo = EvoNormS0(4, 2).double()
    torch.nn.init.normal_(evo.v)
    evo.activates = True
    pairs = x.view(2, 2, 2, 5, 3)
    root = (pairs.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt()
    gate = 1 / (1 + (-evo.v.view(4, 1, 1) * x).exp())
    torch.testing.assert_close(evo(x), (pairs / root).view_as(x) * gate)

    task = tasks.Digits(blocks=1, width=8, num_train=32)
    model = task.build(dict(type='EvoNormS0', num_groups=4), None)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, EvoNormS0)}
    assert {name for name, m in norms.items() if not m.activates} == {
        name for name in norms if 'conv2' in name or 'skip' in name
    }
    assert not any(getattr(m, 'with_activation', False) for m in model.modules())
