"""Tables in Markdown and charts, made of results.json alone."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

from benchmark.peers import NORMS
from benchmark.timing import PHASES

Lines = Iterator[str]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with columns padded to one width."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    cells = [header, ['-' * width for width in widths], *rows]
    padded = [[text.ljust(width) for text, width in zip(row, widths)] for row in cells]
    return '\n'.join(f'| {" | ".join(row)} |' for row in padded)


def _time(found: dict) -> str:
    return f'{found["ms"]:.4g} ±{found["iqr_ms"]:.2g}'


def _ratio(found: dict) -> str:
    return f'{found["ratio"]:.2f} ({_time(found)})'


def _shape(row: dict) -> str:
    return '×'.join(map(str, row['shape']))


def _kinds(rows: list[dict]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row['dtype'], row['layout']) for row in rows))


def _of_kind(rows: list[dict], kind: tuple[str, str]) -> list[dict]:
    return [row for row in rows if (row['dtype'], row['layout']) == kind]


# ----------------------------------------------------------------------------------------------
# Tables


def host(found: dict) -> Lines:
    """Microseconds per layer."""
    yield '\n### Host time of one layer on a tiny map, one thread: microseconds\n'
    yield from _host_table(found)
    yield '\n/ GN: forward + backward in multiples of GroupNorm; of WS, what it adds to conv.'
    if found.get('launcher'):
        yield "\n### The same of the GPU's launcher, with a driver that does nothing\n"
        yield from _host_table(found['launcher'])


def _host_table(found: dict) -> Lines:
    ratios = {name: f'{ratio:.2f}' for name, ratio in found['ratios'].items()}
    cells = [
        [name, *[f'{phases[phase]:.1f}' for phase in PHASES], ratios.get(name, '-')]
        for name, phases in found['microseconds'].items()
    ]
    yield table(['', 'forward', 'backward', 'forward + backward', '/ GN'], cells)


def norm(rows: list[dict]) -> Lines:
    """Times per phase, then memory and bandwidth, for every dtype and layout."""
    if not rows:
        return
    names = list(rows[0]['peers'])
    yield 'Peers: ' + '; '.join(f'{name}: {NORMS[name]}' for name in names) + '.'
    for kind in _kinds(rows):
        chosen = _of_kind(rows, kind)
        if 'gpu' in chosen[0]['peers']['GN']:
            yield from _gpu_norms(chosen, names, kind)
        for phase in PHASES if 'gpu' not in chosen[0]['peers']['GN'] else ['both']:
            title = 'forward + backward' if phase == 'both' else phase
            yield f'\n### Norms, {" ".join(kind)}, {title}: ratio to GN (ms ±IQR)\n'
            cells = [
                [_shape(row), _time(row['peers']['GN'][phase])]
                + [_ratio(row['peers'][name][phase]) for name in names[1:]]
                for row in chosen
            ]
            yield table(['shape', *names], cells)
        yield f'\n### Norms, {" ".join(kind)}: memory, and BCN against the copy bandwidth\n'
        yield (
            'Saved: bytes kept for the backward pass by norm and in-place ReLU, in multiples of '
            'the input. Peak: CUDA memory at the peak of forward + backward, likewise. Share of '
            f'the copy bandwidth ({chosen[0]["copy_bandwidth"] / 1e9:.1f} GB/s, read + written, '
            'tensors of 256 MB), where forward is counted as 2 reads and 1 write of the tensor, '
            'backward as 4 reads and 1 write; more than 100 % where tensors fit a cache.\n'
        )
        yield table(
            [
                'shape',
                'MB',
                *[f'saved {name}' for name in names],
                'peak BCN / GN',
                *[f'share {phase}' for phase in PHASES],
            ],
            [_memory_cells(row) for row in chosen],
        )


def _gpu_norms(rows: list[dict], names: list[str], kind: tuple[str, str]) -> Lines:
    """Both phases in one table."""
    yield f'\n### Norms, {" ".join(kind)}, kernels alone (graph replay): ratio to GN (us)\n'
    cells = [
        [
            _shape(row),
            *[
                f'{found["ratio"]:.2f} ({found["ms"] * 1e3:.1f})'
                for phase in ('forward', 'both')
                for found in [row['peers'][name]['gpu'][phase] for name in names]
            ],
        ]
        for row in rows
    ]
    titles = [f'{name}, {phase}' for phase in ('forward', 'forward + backward') for name in names]
    yield table(['shape', *titles], cells)


def _memory_cells(row: dict) -> list[str]:
    peers = row['peers']
    peaks = [f'{peers[name]["peak"]:.2f}' for name in ('BCN', 'GN') if 'peak' in peers[name]]
    return [
        _shape(row),
        f'{row["bytes"] / 2**20:.1f}',
        *[f'{found["saved"]:.2f}' for found in peers.values()],
        ' / '.join(peaks) or '-',
        *[f'{row["share_of_copy_bandwidth"][phase]:.0%}' for phase in PHASES],
    ]


def ws(rows: list[dict]) -> Lines:
    """Times per dtype; ratios are to ours."""
    for row in rows:
        yield (
            f'\n### Standardizing the 53 weights of R50 (float32 to {row["dtype"]}): '
            'ratio to WS (ms ±IQR)\n'
        )
        cells = [
            [name, *[_ratio(phases[phase]) for phase in PHASES]]
            for name, phases in row['peers'].items()
        ]
        yield table(['', 'forward', 'backward', 'forward + backward'], cells)
        share = row['peers']['WS']['both']['ms'] / row['limit_ms']
        yield (
            f'\nWS takes {share:.2f} times what the copy bandwidth allows '
            f'({row["limit_ms"]:.1f} ms at {row["copy_bandwidth"] / 1e9:.1f} GB/s).'
        )


def backbone(rows: list[dict]) -> Lines:
    """Times per size, dtype and layout."""
    for row in rows:
        yield f'\n### R50, 1 image, {_backbone_title(row)}: ratio to conv + GN (ms ±IQR)\n'
        passes, cells = row['evaluation'], []
        for name in dict.fromkeys((*row['training'], *sorted(passes))):
            step = row['training'].get(name, {})
            cells.append(
                [
                    name,
                    _ratio(step['both']) if step else '-',
                    _ratio(passes[name]['forward']) if name in passes else '-',
                    *_gpu_cells(step),
                ]
            )
        yield table(['', 'training step', 'evaluation, forward', *GPU_HEADER], cells)
        alone, difference = row['ws_share']['alone'], row['ws_share']['by_difference']
        yield (
            f'\nShare of WS in the WS + BCN step: {alone:.1%} (timed alone), {difference:.1%} '
            '(difference to conv + BCN).'
        )


GPU_HEADER = ['host ms: forward, backward, optimizer', 'kernels ms', 'launches', 'peak MB']


def _gpu_cells(step: dict) -> list[str]:
    """What is measured on a GPU alone, of a training step."""
    if 'peak' not in step:
        return ['-'] * len(GPU_HEADER)
    formats = {'kernels_ms': '.2f', 'launches': '.0f'}  # a detector has none
    cells = [f'{step[name]:{how}}' if name in step else '-' for name, how in formats.items()]
    host = [f'{ms:.2f}' for ms in step.get('host', {}).values()] or ['-']
    return [', '.join(host), *cells, f'{step["peak"] / 2**20:.0f}']


def _backbone_title(row: dict) -> str:
    return f'{row["size"][0]}x{row["size"][1]}, {row["dtype"]}, {row["layout"]}'


def detector(rows: list[dict]) -> Lines:
    """A table per dtype."""
    for row in rows:
        yield f'\n### Training step of {_detector_title(row)}: ratio to GN (ms ±IQR)\n'
        cells = [[n, _ratio(p['step']), *_gpu_cells(p)] for n, p in row['peers'].items()]
        yield table(['', 'step', *GPU_HEADER], cells)


def _detector_title(row: dict) -> str:
    size = f', {row["size"][0]}x{row["size"][1]}' if row['size'] else ''
    return f'{row["config"]}, 1 image{size}, {row["dtype"]}'


def whole(rows: list[dict]) -> Lines:
    """One table; what raised says what."""
    yield '\n### R50, 1 image, 800x1333, the network as a whole: ms\n'
    names = list(rows[0]['peers']) if rows else []
    cells = []
    for row in rows:
        found = [row['peers'][name] for name in names]
        times = [f'{f["ms"]:.2f}' if 'ms' in f else f['error'] for f in found]
        cells.append([f'{row["way"]}, {row["dtype"]}', *times])
    yield table(['', *names], cells)


def bars(rows: list[dict]) -> Lines:
    """The project's bars."""
    yield '\n### Bars\n'
    words = {True: 'met', False: 'NOT MET', None: 'not measured'}
    cells = [
        [
            row['bar'],
            '-' if row['measured'] is None else f'{row["measured"]:.3f}',
            f'{">=" if row["at_least"] else "<="} {row["limit"]:.2f}',
            words[row['met']],
        ]
        for row in rows
    ]
    yield table(['bar', 'measured', 'limit', ''], cells)


# ----------------------------------------------------------------------------------------------
# Charts

_OURS, _OTHERS = '#1b7837', '#9a9a9a'
OURS = ('WS', 'WS + GN', 'conv + BCN', 'WS + BCN')


def draw(results: dict, folder: Path) -> list[Path]:
    """Writes the charts of the sections that ran; their paths.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use('Agg')
    files = []
    rows = results.get('norm') or []
    for kind in _kinds(rows):
        files.append(folder / f'norm_{"_".join(kind)}.png')
        _draw_norms(_of_kind(rows, kind), results, files[-1])
    panels = list(_model_panels(results))
    if panels:
        files.append(folder / 'models.png')
        _draw_panels(panels, results, files[-1])
    return files


def _draw_norms(rows: list[dict], results: dict, file: Path) -> None:
    """A column of bars per peer, a line per shape."""
    import matplotlib.pyplot as plt

    names = list(rows[0]['peers'])[1:]
    on_gpu = 'gpu' in rows[0]['peers']['GN']
    labels = [_shape(row) for row in rows]
    figure, axes = plt.subplots(
        1,
        len(names),
        sharex=True,
        sharey=True,
        layout='constrained',
        figsize=(2 + 2.2 * len(names), 1.6 + 0.24 * len(rows)),
    )
    columns = [
        [(p['gpu'] if on_gpu else p)['both']['ratio'] for p in (row['peers'][name] for row in rows)]
        for name in names
    ]
    for axis, name, values in zip(axes, names, columns):
        title = f'{name}\n{textwrap.fill(NORMS[name], 28)}'
        _draw_bars(axis, title, labels, values, [name.startswith('BCN')] * len(values))
    _set_scale(axes[0], [value for values in columns for value in values])
    kind = f'{rows[0]["dtype"]} {rows[0]["layout"]}'
    figure.suptitle(
        f'Norm, forward + backward, {kind}: time {"of the kernels " if on_gpu else ""}'
        'as a multiple of GroupNorm(32)\n'
        f'{_machine(results)}',
        fontsize=10,
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _model_panels(results: dict) -> Iterator[tuple[str, dict[str, float]]]:
    for row in results.get('ws') or []:
        ratios = {name: phases['both']['ratio'] for name, phases in row['peers'].items()}
        yield f'WS of all R50 weights to {row["dtype"]}\nmultiple of ours', ratios
    for row in results.get('backbone') or []:
        for part, phase in (('training', 'both'), ('evaluation', 'forward')):
            ratios = {name: phases[phase]['ratio'] for name, phases in row[part].items()}
            what = 'training, forward + backward' if part == 'training' else 'evaluation, forward'
            yield f'R50 {_backbone_title(row)}\n{what}: multiple of conv + GN', ratios
    for row in results.get('detector') or []:
        ratios = {name: phases['step']['ratio'] for name, phases in row['peers'].items()}
        yield f'{_detector_title(row)}\ntraining step: multiple of GN', ratios


def _draw_panels(panels: list[tuple[str, dict[str, float]]], results: dict, file: Path) -> None:
    import matplotlib.pyplot as plt

    lines = -(-len(panels) // 2)
    figure, grid = plt.subplots(
        lines, 2, squeeze=False, layout='constrained', figsize=(12, 1 + 2.4 * lines)
    )
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    everything = [value for _, ratios in panels for value in ratios.values()]
    for axis, (title, ratios) in zip(grid.flat, panels):
        ours = [name.partition(',')[0] in OURS for name in ratios]
        _draw_bars(axis, title, list(ratios), list(ratios.values()), ours)
        _set_scale(axis, everything)  # one scale: panels are compared
    figure.suptitle(_machine(results), fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _draw_bars(axis, title: str, labels: list[str], values: list[float], ours: list[bool]) -> None:
    """Bars from 1, to the right what takes longer, to the left what takes less."""
    colours = [_OURS if own else _OTHERS for own in ours]
    positions = range(len(values))
    axis.set_xscale('log')
    axis.barh(positions, [value - 1 for value in values], left=1, color=colours, height=0.7)
    for y, value in zip(positions, values):
        axis.text(max(value, 1) * 1.06, y, f'{value:.2f}', va='center', fontsize=8)
    axis.axvline(1, color='black', linewidth=1)
    axis.set_yticks(positions, labels, fontsize=8)
    axis.set_ylim(len(values) - 0.4, -0.6)  # the first on top
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=8)


def _set_scale(axis, values: list[float]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_xlim(min(0.7, 0.8 * min(values)), max(2.8 * max(values), 2.0))  # room for numbers
    low, high = axis.get_xlim()
    steps = [2.0**power for power in range(-6, 12) if low <= 2.0**power <= high]
    axis.set_xticks(steps, [f'{step:g}' for step in steps])
    axis.xaxis.set_minor_locator(NullLocator())


def _machine(results: dict) -> str:
    machine = results['machine']
    return f'{machine["name"]}, torch {machine["torch"]}, {machine["threads"]} CPU threads'
