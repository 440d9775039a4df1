"""The study: a tiny grid runs and resumes, and the committed records make the tables and plots."""

import json
import re
from pathlib import Path

import pytest

from tests.tool import tool

pytest.importorskip('mmseg', reason='the study builds its models with mmcv and mmseg')
pytest.importorskip('sklearn', reason='the digits of the smallest task')

ROOT = Path(__file__).parents[2]
STUDY = ROOT / 'tools/study'


@pytest.fixture(autouse=True)
def import_from_tools(monkeypatch):
    from mmengine.logging import MMLogger

    MMLogger.get_instance('study', log_level='ERROR')  # mmseg's models log their initialisation
    monkeypatch.syspath_prepend(str(ROOT / 'tools/analysis_tools'))
    monkeypatch.syspath_prepend(str(STUDY))


@pytest.fixture(scope='module', autouse=True)
def few_images_for_statistics():
    """A grid of the tests averages over 16 images after each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        from experiments import loop

        patch.setattr(loop, 'CALIBRATION_IMAGES', 16)
        yield


def run_grid(*arguments):
    return tool('study/run_grid.py', *arguments)


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    """The records of the smoke grid."""
    folder = tmp_path_factory.mktemp('smoke')
    result = run_grid('--smoke', '-o', folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('digits') == 24
    return folder


def records(folder):
    return {p.name: json.loads(p.read_text()) for p in folder.glob('digits/*.json')}


def test_smoke_grid(smoke):
    found = records(smoke)
    # Rows x (searched rates at 1 and 8, other seeds at 1, 2 and 8, first seed at 2).
    assert len(found) == 3 * (2 * 2 + 3 + 1)
    for record in found.values():
        assert record['metric'] == 'accuracy' and not record['diverged']
        assert 0 <= record['metrics']['test'] <= 1
        assert record['steps'] == 16 // record['images_per_step']
        assert record['curve']['step'][-1] == record['steps']
        assert record['singularities']['step'][-1] == record['steps'] - 1
        assert {'torch', 'wsbcn_mm'} <= set(record['versions'])
    with_estimates = [r for r in found.values() if r['row'] != 'GN + WS']
    assert all('test_recalibrated' in r['metrics'] for r in with_estimates)
    # The rate of the estimates counts images.
    norm = found['bcn-ws-estimate_n8_lr0.01_s0.json']['norm']
    assert norm == dict(type='BCN', num_groups=2, momentum_per_image=0.01)


def test_what_is_finished_is_not_run_again(smoke):
    from experiments import grid as grids

    grid = grids.load(STUDY / 'grids/smoke.yaml')
    results = grids.Results(smoke)
    assert list(grids.missing_runs(grid, results)) == []
    victim = next(smoke.glob('digits/bn_n2*s1.json'))
    text = victim.read_text()
    victim.unlink()
    (missing,) = grids.missing_runs(grid, results)
    assert results.path(missing) == victim
    with grids.Claim(victim) as first, grids.Claim(victim) as second:
        assert first and not second  # two processes never do the same run
    victim.write_text(text)
    # A run of other settings is not taken for one of these.
    grid['tasks']['digits']['epochs'] = 2
    with pytest.raises(ValueError, match='another epochs'):
        list(grids.missing_runs(grid, results))


def test_a_part_runs_seed_by_seed_each_row_at_its_own_rates(tmp_path):
    from experiments import grid as grids

    task = dict(dataset='digits', epochs=1, weight_decay=0, num_groups=2)
    grid = dict(
        seeds=[0, 1],
        tasks={
            'a': dict(task, lrs=dict(BN=[0.1], GN=[0.2, 0.3])),
            'b': dict(task, lrs=[0.4]),
        },
        rows=dict(BN=dict(norm=dict(type='BN')), GN=dict(norm=dict(type='GN', num_groups='task'))),
        order=[dict(tasks=['a', 'b'], images_per_step=[1], rows=['BN', 'GN'])],
    )
    results, done = grids.Results(tmp_path), []
    while run := next(grids.missing_runs(grid, results), None):
        results.put(dict(run, metrics=dict(val=run['lr'])))
        done.append((run['task'], run['row'], run['lr'], run['seed']))
    first = [
        ('a', 'BN', 0.1),
        ('a', 'GN', 0.2),
        ('a', 'GN', 0.3),
        ('b', 'BN', 0.4),
        ('b', 'GN', 0.4),
    ]
    best = [run for run in first if run[2] != 0.2]
    assert done == [(*run, 0) for run in first] + [(*run, 1) for run in best]


def test_the_rate_is_chosen_on_validation(smoke):
    from experiments import grid as grids

    grid = grids.load(STUDY / 'grids/smoke.yaml')
    results = grids.Results(smoke)
    cell = grids.Cell('digits', 'BN', 2)
    assert grids.search_cell(grid, cell).images_per_step == 1
    values = {
        lr: results.get(grids.spec(grid, grids.Cell('digits', 'BN', 1), lr, 0))['metrics']['val']
        for lr in (0.01, 0.03)
    }
    assert values[grids.best_lr(grid, results, cell)] == max(values.values())


def test_runs_repeat(smoke):
    from experiments import grid as grids
    from experiments import loop, tasks

    grid = grids.load(STUDY / 'grids/smoke.yaml')
    run = grids.spec(grid, grids.Cell('digits', 'BCN + WS (estimate)', 1), 0.01, 0)
    again = loop.run(tasks.make(run['dataset'], run['arguments']), run)
    first = grids.Results(smoke).get(run)
    assert again['curve'] == first['curve'] and again['metrics'] == first['metrics']


def test_every_row_builds_and_trains_a_step_of_segmentation():
    import torch
    from experiments import grid as grids
    from experiments import loop, tasks

    grid = grids.load(STUDY / 'grids/study.yaml')
    for row in grid['rows']:
        norm = grids.spec(grid, grids.Cell('camvid', row, 1), 0.01, 0)['norm']
        model = tasks.DeepLabV3(
            loop.norm_config(norm, 1), grid['rows'][row].get('conv'), 3, width=8, head=16
        )
        loss = model(torch.randn(1, 3, 32, 32)).square().mean()
        loss.backward()
        assert loss.isfinite(), row


@pytest.mark.parametrize('row', ['GN', 'BCN + WS (estimate)'])
def test_the_detector_gets_the_norm_everywhere(row, tmp_path, monkeypatch):
    from experiments import detection
    from experiments import grid as grids
    from mmdet.registry import MODELS

    from wsbcn_mm import shapes

    grid = grids.load(STUDY / 'grids/study.yaml')
    run = grids.spec(grid, grids.Cell('nuclei', row, 2), 0.01, 1)
    shapes.draw_dataset(tmp_path / 'shapes', num_train=1, num_val=5, size=(64, 64))
    monkeypatch.setattr(detection, 'draw_dataset', lambda root: None)  # it is drawn, in small
    run['dataset'] = 'shapes_instances'
    run['arguments'] = dict(
        root=str(tmp_path / 'shapes/coco'), images=40, val_images=2, test_images=2
    )
    cfg = detection.config(run, tmp_path)
    found = [json.loads((tmp_path / f'{split}.json').read_text()) for split in ('val', 'test')]
    ids = [{i['id'] for i in part['images']} for part in found]
    assert [len(i) for i in ids] == [2, 2] and not ids[0] & ids[1]
    assert all({a['image_id'] for a in p['annotations']} <= i for p, i in zip(found, ids))
    assert cfg.train_cfg['max_iters'] == 20 and cfg.train_dataloader.batch_size == 2
    assert cfg.optim_wrapper.optimizer['lr'] == 0.02 and cfg.randomness['seed'] == 1
    kinds = [type(m).__name__ for m in MODELS.build(cfg.model).modules()]
    used, other = ('GroupNorm', 'BatchChannelNorm2d')[:: 1 if row == 'GN' else -1]
    assert kinds.count(used) == 31 and kinds.count(other) == 0
    assert kinds.count('WSConv2d') == (0 if row == 'GN' else 31)


def test_unfinished_searches_and_divergence_are_shown(smoke, tmp_path):
    import make_report

    (tmp_path / 'digits').mkdir()
    for name, record in records(smoke).items():
        if record['row'] == 'BN' and record['images_per_step'] == 8:
            continue
        if name == 'gn-ws_n1_lr0.03_s0.json':
            record.update(diverged=True, metrics={})
        (tmp_path / 'digits' / name).write_text(json.dumps(record))
    study = make_report.Study(STUDY / 'grids/smoke.yaml', tmp_path)
    text = make_report.tables(study)
    (bn,) = [line for line in text.splitlines() if line.startswith('| BN | ') and '±' in line][:1]
    assert bn.endswith('|  |')  # the cell without a search is empty
    assert 'diverged' in text


def test_tables_and_plots_regenerate_from_the_committed_records(tmp_path, monkeypatch):
    """Pictures in the coarsest grain: that they are drawn is what is seen here."""
    import make_report
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, target, **_: save(self, target, dpi=10))
    make_report.main(['-o', str(tmp_path)])
    committed = ROOT / 'docs/study'
    assert (tmp_path / 'tables.md').read_text() == (committed / 'tables.md').read_text()
    pictures = {p.name for p in committed.glob('*.png')}
    assert {'metric.png', 'loss.png', 'trace_digits.png'} <= pictures
    assert pictures == {p.name for p in tmp_path.glob('*.png')}


@pytest.mark.parametrize('page', ['study.md', 'which_norm.md'])
def test_the_pages_quote_the_tables(page):
    text = (ROOT / 'docs' / page).read_text()
    quoted = re.findall('<!-- from tables.md -->(.*?)<!-- end -->', text, re.DOTALL)
    assert quoted
    made = set((ROOT / 'docs/study/tables.md').read_text().splitlines())
    for block in quoted:
        rows = [line for line in block.splitlines() if line.startswith('|')]
        assert len(rows) > 2 and set(rows) <= made


def test_no_records_is_said_in_a_line(tmp_path):
    import make_report

    with pytest.raises(SystemExit, match='run run_grid.py first'):
        make_report.main(['-r', str(tmp_path), '-o', str(tmp_path / 'out')])


def test_a_grid_with_a_wrong_name_is_refused(tmp_path):
    from experiments import grid as grids

    path = tmp_path / 'grid.yaml'
    path.write_text(
        'seeds: [0]\ntasks: {a: {}}\nrows: {BN: {}}\norder: '
        '[{tasks: [b], images_per_step: [1], rows: [BN]}]'
    )
    with pytest.raises(ValueError, match=r"order names \['b'\]"):
        grids.load(path)
    path.write_text(
        'seeds: [0]\ntasks: {a: {lrs: {GN: [0.1]}}}\nrows: {BN: {}}\norder: '
        '[{tasks: [a], images_per_step: [1], rows: [BN]}]'
    )
    with pytest.raises(ValueError, match='lrs of a has no rate for BN'):
        grids.load(path)
    path.write_text('seeds: [0]')
    with pytest.raises(ValueError, match='lacks order, rows, tasks'):
        grids.load(path)
    path.write_text('seeds: [0')
    with pytest.raises(ValueError, match='is not YAML'):
        grids.load(path)
