"""The benchmark tool: it runs, it does not print the speed of wrong layers, it times real work.

No test looks at a time.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import benchmark_layers
import pytest
import torch
import torch.nn.functional as F
from benchmark import bars, gate, host_time, output, peers, sections, timing
from benchmark.settings import Skipped
from torch import nn

from tests.tool import tool
from wsbcn_mm import (
    BatchChannelNorm2d,
    WSConv2d,
    backends,
    reference,
    standardize_once_per_forward,
)
from wsbcn_mm.backends import dispatched, eager, ops

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device('cpu')


def run_tool(folder, *arguments):
    quick = ('--device', 'cpu', '--quick', '-o', folder)
    done = tool('benchmark/benchmark_layers.py', *quick, *arguments)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / 'results.json').read_text())


# ----------------------------------------------------------------------------------------------
# The tool as a whole


def test_a_quick_run_writes_everything(tmp_path):
    done, results = run_tool(tmp_path, '--only', 'host', 'norm', 'ws', 'backbone', '--threads', '1')
    assert set(results) == {
        'command',
        'date',
        'machine',
        'settings',
        'gate',
        'skipped',
        'failed',
        'host',
        'norm',
        'ws',
        'backbone',
        'bars',
    }
    assert results['command'].endswith(f'-o {tmp_path} --only host norm ws backbone --threads 1')
    assert results['machine']['threads'] == 1 and results['machine']['backend'] in done.stdout
    assert results['gate']['results'] > 0

    row = results['norm'][0]
    assert set(row['peers']) == set(peers.NORMS)
    assert set(row['peers']['BCN']['both']) == {'ms', 'iqr_ms', 'samples_ms', 'ratio'}
    assert set(row['share_of_copy_bandwidth']) == set(timing.PHASES)
    assert {'WS', 'one-call WS'} <= set(results['ws'][0]['peers'])
    row = results['backbone'][0]
    assert set(row['training']) == set(peers.backbones())
    held = {f'{name}{sections.HELD}' for name in ('WS + GN', 'WS + BCN')}
    assert set(row['evaluation']) == (set(peers.backbones()) | held) - {peers.FROZEN}
    assert set(row['ws_share']) == {'alone', 'by_difference'}
    wanted = {*host_time.OURS, *host_time.CONVOLUTIONS}
    assert wanted <= set(results['host']['ratios'])
    launcher = results['host']['launcher']
    assert launcher is None or wanted <= set(launcher['ratios'])
    assert all(t['both'] > 0 for t in results['host']['microseconds'].values())
    # Tiny shapes decide nothing.
    assert {bar['met'] for bar in results['bars']} == {None}

    for name in ('norm_float32_nchw.png', 'models.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
        assert str(tmp_path / name) in done.stdout
    assert 'norm (1, 64, 8, 8) ' in done.stderr and 'norm (1, ' not in done.stdout


def test_a_quick_run_of_the_detector(tmp_path):
    pytest.importorskip('mmdet')
    done, results = run_tool(tmp_path, '--only', 'detector')
    (row,) = results['detector']
    assert set(row['peers']) == {'GN', 'mmcv ConvWS + GN', 'WS + BCN'}
    assert 'INFO' not in done.stdout  # mmengine's log


def test_a_section_that_cannot_run_is_named_with_the_reason(tmp_path, capsys, monkeypatch):
    def skips(settings):
        raise Skipped('no such thing here')

    monkeypatch.setitem(benchmark_layers.SECTIONS, 'detector', skips)
    benchmark_layers.main(['--device', 'cpu', '--quick', '--only', 'detector', '-o', str(tmp_path)])
    assert 'Not measured: detector: no such thing here' in capsys.readouterr().out
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['skipped'] == {'detector': 'no such thing here'} and not results['failed']


def test_where_openmmlab_is_not_installed_the_detector_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wsbcn_mm.openmmlab', None)  # as if its imports failed
    _, results = run_tool(tmp_path, '--only', 'detector')
    assert 'wsbcn_mm.openmmlab' in results['skipped']['detector']


def test_what_was_measured_survives_an_end(tmp_path, capsys, monkeypatch):
    """As `timeout` ends a run: row by row, and as tables."""
    rows = []

    def ended(settings):
        for row in sections.ws(settings):
            rows.append(row)
            yield row
            assert json.loads((tmp_path / 'results.json').read_text())['ws'] == rows
            raise benchmark_layers.Ended

    monkeypatch.setitem(benchmark_layers.SECTIONS, 'ws', ended)
    with pytest.raises(SystemExit) as stopped:
        benchmark_layers.main(
            ['--device', 'cpu', '--quick', '--only', 'ws', 'norm', '-o', str(tmp_path)]
        )
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert 'Ended: ws' in printed and '| one-call WS' in printed
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['ws'] == rows and 'norm' not in results


def test_a_section_that_fails_does_not_take_the_others_with_it(tmp_path, capsys, monkeypatch):
    def fails(settings):
        raise KeyError('broken')

    monkeypatch.setitem(benchmark_layers.SECTIONS, 'host', fails)
    with pytest.raises(SystemExit) as stopped:
        benchmark_layers.main(
            ['--device', 'cpu', '--quick', '--only', 'host', 'ws', '-o', str(tmp_path)]
        )
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "Failed: host: KeyError: 'broken'" in printed.out and 'Traceback' in printed.err
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['ws'] and results['failed'] == {'host': "KeyError: 'broken'"}


def test_the_script_for_a_gpu_says_what_it_needs(root, tmp_path):
    script = ['bash', str(root / 'tools/benchmark/gpu.sh')]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and 'gpu.sh OUT' in done.stderr
    if not torch.cuda.is_available():
        env = dict(os.environ, PYTHON=sys.executable)
        command = [*script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 1 and 'sees no CUDA device' in done.stderr


def test_when_the_time_is_over_nothing_more_begins(tmp_path, capsys):
    arguments = ['--device', 'cpu', '--quick', '--seconds', '0', '-o', str(tmp_path)]
    benchmark_layers.main([*arguments, '--only', 'norm', 'ws'])
    out = capsys.readouterr().out
    assert 'No time was left for ws float32, norm (1, 64, 8, 8) float32 nchw, norm (2, ' in out
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['norm'] == results['ws'] == [] and len(results['left_out']) == 3


# ----------------------------------------------------------------------------------------------
# The check before the timing


def scaled(operator, index):
    """The operator with one result off by a thousandth."""

    def wrong(*args):
        results = operator(*args)
        if isinstance(results, torch.Tensor):
            return results * 1.001
        return tuple(r * 1.001 if i == index else r for i, r in enumerate(results))

    return wrong


def scaled_out(operator, place):
    """The operator with what it writes into its argument at this place off by a thousandth."""

    def wrong(*args):
        operator(*args)
        for result in args[place]:
            result.mul_(1.001)

    return wrong


def without_update(operator, _):
    """An operator that leaves the running statistics alone."""

    def wrong(x, num_groups, running_mean, running_var, *args):
        return operator(x, num_groups, running_mean.clone(), running_var.clone(), *args)

    return wrong


@pytest.fixture
def replace_operator(monkeypatch):
    """Calls ``replace(name, make)``: the backend's operator becomes make(the eager one)."""
    library = torch.library.Library('wsbcn_mm', 'IMPL')
    right = {name: ops.flattened(getattr(eager, name)) for name in ops.OPERATORS}
    if backends.select(torch.empty(1)) == 'eager':  # no compiled kernels
        monkeypatch.setattr(eager, 'kernels', lambda: dispatched)
        for name, function in right.items():
            library.impl(name, function, 'CPU')

    def replace(name, make):
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Warning only once for all operators')
            library.impl(name, make(right[name]), 'CPU', allow_override=True)

    yield replace
    library._destroy()


@pytest.mark.parametrize(
    'name, index, breaks, expected',
    [
        ('normalize_with_estimates', 0, scaled, 'BCN estimate.*: y:'),
        ('normalize_with_estimates', 0, scaled, 'BCN eval.*: y:'),
        ('normalize_with_estimates', None, without_update, 'BCN estimate.*: running_var:'),
        ('evaluate', None, scaled, 'BCN eval.*: y without gradient:'),
        ('normalize_with_batch', 0, scaled, 'BCN batch.*: y:'),
        ('normalize_with_batch', None, without_update, 'BCN batch.*: running_mean:'),
        ('normalize_backward', 0, scaled, 'BCN estimate.*: gradient of x:'),
        ('normalize_backward', 1, scaled, 'BCN batch.*: gradient of parameter batch_weight:'),
        ('normalize_backward', 4, scaled, 'BCN eval.*: gradient of parameter bias:'),
        ('standardize_all', 3, scaled_out, 'WS paper.*: weight:'),
        ('standardize_all_backward', -1, scaled_out, 'WS var_eps.*: gradient of parameter weight:'),
    ],
)
def test_wrong_layers_are_not_timed(
    tmp_path, capsys, replace_operator, name, index, breaks, expected
):
    replace_operator(name, lambda right: breaks(right, index))
    with pytest.raises(SystemExit) as stopped:
        benchmark_layers.main(['--device', 'cpu', '--quick', '-o', str(tmp_path / 'out')])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert re.search(expected, printed)
    assert re.search(r'\bms\b', printed) is None
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_right_layers_pass_in_half_precision(dtype):
    checked = gate.run(CPU, [dtype], list(gate.LAYOUTS), quick=True)
    assert checked.failures == [] and checked.count > 100


def test_not_a_number_is_wrong():
    checked = gate.Gate()
    truth = {'y': torch.ones(2, dtype=torch.float64)}
    checked.compare('nan', {'y': torch.tensor([1.0, torch.nan])}, truth, truth)
    assert len(checked.failures) == 1


# ----------------------------------------------------------------------------------------------
# What is timed


def test_every_training_step_standardizes_again(replace_operator):
    calls = []

    def counted(standardize):
        def run(*args):
            calls.append(args)
            return standardize(*args)

        return run

    replace_operator('standardize_all', counted)
    convs = [WSConv2d(3, 4, 3), WSConv2d(4, 4, 3)]

    class Model(nn.Sequential):
        def forward(self, x):
            return [super().forward(x)]

    model = Model(*convs)
    standardize_once_per_forward(model)
    alone = sections.standardizing(model, torch.float32)
    step = sections._training_step(model, torch.ones(1, 3, 8, 8), torch.float32)
    for case in (alone, step):
        calls.clear()
        timing.round_robin({'case': case}, CPU, repeats=1)  # one call to warm up, one timed
        assert [len(weights) for weights, *_ in calls] == 2 * [len(convs)]


def test_peers_take_turns():
    order = []
    cases = {
        name: timing.Case(
            lambda name=name: order.append(f'{name} forward'),
            lambda _, name=name: order.append(f'{name} backward'),
            lambda name=name: order.append(f'{name} prepare'),
        )
        for name in 'ab'
    }
    times = timing.round_robin(cases, CPU, repeats=1)
    call = ['{} prepare', '{} forward', '{} backward']
    assert order == [part.format(name) for name in 'abab' for part in call]
    assert set(times) == {'a', 'b'} and set(times['a']) == set(timing.PHASES)


def test_no_peer_always_comes_after_the_same_one():
    order = []
    cases = {name: timing.Case(lambda name=name: order.append(name)) for name in 'abc'}
    timing.round_robin(cases, CPU, repeats=20)
    neighbours = {(a, b) for a, b in itertools.pairwise(order) if a != b}
    assert neighbours == {(a, b) for a in 'abc' for b in 'abc' if a != b}


def test_saved_bytes_counts_storages_once_and_no_parameters():
    x = torch.randn(2, 64, 3, 5, requires_grad=True)
    norm = nn.BatchNorm2d(64)
    size = x.numel() * x.element_size()
    statistics = 2 * 64 * 4
    assert timing.saved_bytes(lambda: torch.relu_(norm(x)), norm) == 2 * size + statistics


def test_one_call_is_the_papers_formula():
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    expected = reference.weight_standardize(weight)
    torch.testing.assert_close(peers.one_call_standardize(weight), expected)
    conv = peers.OneCallWSConv2d(3, 8, 3, bias=False).double()
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, reference.weight_standardize(conv.weight)))


def test_mmcvs_formula_is_mmcvs_and_leaves_mmcv_as_it_was():
    pytest.importorskip('mmcv')
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    expected = reference.weight_standardize(weight, formula='std_eps')
    torch.testing.assert_close(peers.mmcv_standardize()(weight), expected)
    assert sys.modules['mmcv.cnn.bricks.conv_ws'].F is F


def test_the_papers_formula_is_what_the_layer_does():
    torch.manual_seed(0)
    ours, paper = BatchChannelNorm2d(64).double(), peers.PaperNorm(64).double()
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64) + 1
    for _ in range(2):
        torch.testing.assert_close(paper(x), ours(x))
    torch.testing.assert_close(paper.bn.running_var, ours.bn.running_var)


def test_the_backbone_is_a_resnet_50():
    model = peers.ResNet50(nn.Conv2d, nn.BatchNorm2d)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 53
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 - 2_049_000  # less its fc
    shapes = [tuple(y.shape) for y in model(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(1, 256, 16, 24), (1, 512, 8, 12), (1, 1024, 4, 6), (1, 2048, 2, 3)]


# ----------------------------------------------------------------------------------------------
# Bars and tables


def norm_row(shape, ratio, **changes):
    found = dict(both=dict(ratio=ratio), saved=2.00007)
    row = dict(shape=shape, dtype='float32', layout='nchw', bytes=10)
    row['peers'] = {'BCN': found, 'BCN batch': found}
    return row | changes


def verdicts(results):
    return {bar['bar']: bar['met'] for bar in bars.check(results)}


def test_bars_on_a_cpu():
    rows = [norm_row([1, 64, 200, 304], 1.10), norm_row([1, 256, 200, 304], 1.11)]
    ratios = {'BCN': 1.3, 'BCN batch': 1.5}
    settings = dict(quick=False)
    results = dict(machine=dict(device='cpu', threads=2), settings=settings, norm=rows)
    results['host'] = dict(ratios=ratios, launcher=dict(ratios={'BCN': 1.1}))
    kind = 'CPU, float32, 2 threads: BCN / GN, forward + backward, '
    found = verdicts(results)
    assert found['host time, cpu: BCN / GN, forward + backward'] is False
    assert found['host time, cpu: BCN batch / GN, forward + backward'] is True
    assert found["host time, the GPU's launcher: BCN / GN, forward + backward"] is True
    assert found['host time, cpu: what WS conv adds to conv / GN'] is None
    assert found[f'{kind}(1, 64, 200, 304)'] is True
    assert found[f'{kind}(1, 256, 200, 304)'] is False
    assert found[f'{kind}(2, 256, 50, 76)'] is None
    assert found['saved for backward, BCN + in-place ReLU, multiples of the input'] is True
    passes = dict(forward=dict(ratio=1.06), both=dict(ratio=1.12))
    results['backbone'] = [
        dict(
            size=[160, 192],
            dtype='float32',
            layout='nchw',
            training={'WS + BCN': passes},
            evaluation={'WS + BCN': passes, 'WS + BCN, weights held': passes},
        )
    ]
    peers_of_ws = {'WS': dict(both=dict(ms=14))}
    results['ws'] = [dict(dtype='float32', peers=peers_of_ws, limit_ms=10.0)]
    found = verdicts(results)
    kind = 'CPU, float32, 2 threads: '
    backbone = f'{kind}R50 WS + BCN / conv + GN, '
    assert found[f'{backbone}training step, 160x192'] is True
    assert found[f'{backbone}evaluation, weights held, 160x192'] is False
    assert found[f'{backbone}evaluation, 160x192'] is True
    assert found[f'{backbone}training step, 512x640'] is None
    whole = 'WS of all weights of R50, forward + backward / what copying allows'
    assert found[f'{kind}{whole}'] is False
    kind = f'{kind}BCN / GN, forward + backward, '
    results['machine']['threads'] = 1  # the bar is for two
    assert verdicts(results)[f'{kind}(1, 64, 200, 304)'] is None
    text = '\n'.join(output.bars(bars.check(results)))
    assert 'not measured' in text


def test_bars_on_cuda():
    share = dict(share_of_copy_bandwidth=dict(both=0.9), bytes=2**30)
    rows = [
        norm_row([1, 64, 8, 8], 0.9, **share),
        norm_row([2, 64, 8, 8], 1.2),
        norm_row([1, 64, 8, 8], 0.8, dtype='float16', **share),
    ]
    for row in rows:  # the time of the kernels counts, whatever the host takes
        found = row['peers']['BCN']
        found['gpu'], found['both'] = dict(both=found['both']), dict(ratio=5.0)

    def step(ms, peak, launches):
        return dict(both=dict(ms=ms), peak=peak, launches=launches)

    backbone = dict(
        size=[800, 1333],
        dtype='float16',
        layout='nchw',
        ws_share=dict(alone=0.03),
        training={
            'WS + BCN': step(10, 45, 900),
            'conv + GN': step(13, 100, 1000),
            'conv + BN': step(9, 45, 800),
        },
    )
    detector = dict(
        peers={
            name: dict(step=dict(ms=ms))
            for name, ms in {'WS + BCN': 98, 'GN': 100, 'frozen BN': 95}.items()
        }
    )
    results = dict(machine=dict(device='cuda', threads=2), settings=dict(quick=False))
    results |= dict(norm=rows, backbone=[backbone], detector=[detector])
    found = verdicts(results)
    kind = 'kernels of BCN / GN, forward + backward'
    assert found[f'CUDA, float32, nchw: {kind}, worst shape (2, 64, 8, 8)'] is False
    assert found[f'CUDA, float16, nchw: {kind}, worst shape (1, 64, 8, 8)'] is True
    assert found[f'CUDA, bfloat16, nchw: {kind}'] is None
    assert found['CUDA: share of copy bandwidth, tensors over 256 MB, worst'] is True
    assert found['CUDA: share of WS in an AMP step, R50, 800x1333'] is False
    r50 = 'CUDA: R50 step, WS + BCN /'
    assert found[f'{r50} conv + GN, wall, worst'] is True
    assert found[f'{r50} conv + BN, wall, worst'] is False
    assert found[f'{r50} conv + GN, launches, worst'] is True
    assert found[f'{r50} conv + GN, peak, AMP, worst'] is True
    assert found['CUDA: Mask R-CNN step, WS + BCN / GN, wall, worst'] is False
    assert found['CUDA: Mask R-CNN step, WS + BCN / frozen BN, wall, worst'] is True
    assert all(met is None for bar, met in found.items() if bar.startswith('CPU'))


def test_a_table_is_markdown():
    text = output.table(['a', 'bb'], [['ccc', 'd']])
    assert text == '| a   | bb |\n| --- | -- |\n| ccc | d  |'
