"""Makes the tables and plots of a study from its records; trains nothing."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / 'docs' / 'study'
# Also from a clone not installed.
sys.path[:0] = [str(HERE), str(HERE.parent / 'analysis_tools'), str(HERE.parents[1])]

import matplotlib  # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from diagnosis_page import OTHER, THIS, plot_channels, plot_singularities  # noqa: E402
from experiments import grid as grids  # noqa: E402
from instances_page import AGAINST, gaps_table, plot_losses  # noqa: E402
from matplotlib.artist import Artist  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

Curve = tuple[list[int], list[float]]

COLOURS = {
    'BN': '#7a7a7a',
    'GN': '#d98032',
    'GN + WS': '#b33f62',
    'BN + WS': '#4c4c4c',
    'BCN + WS (estimate)': '#0a6c74',
    'BCN + WS (batch)': '#6fb7bd',
    'BCN': '#3f7cac',
    'BN, 8 micro-steps': '#a8a8a8',
    'BCN + WS (estimate), 8 micro-steps': '#45979e',
    'FRN + TLU': '#8a63a8',
    'EvoNorm-S0': '#b08fc7',
    'BCN + WS, warm-up': '#6fb7bd',
    'frozen BN, GN + WS in the head': '#d4798f',
    'frozen BN, BCN + WS in the head': '#5b8c3a',
}
METRICS = {
    'test': 'test',
    'val': 'validation',
    'test_recalibrated': 'test, statistics averaged anew',
}


class Study:
    """A grid and its records.

    Args:
        grid: A YAML file.
        folder: The records.
    """

    def __init__(self, grid: str | Path, folder: str | Path) -> None:
        self.grid, self.results = grids.load(grid), grids.Results(folder)
        self.cells = grids.cells(self.grid)

    def lr(self, cell: grids.Cell) -> float | None:
        """The learning rate of a cell; None while its search is not finished."""
        return grids.best_lr(self.grid, self.results, cell)

    def records(self, cell: grids.Cell) -> list[dict]:
        """The finished runs of a cell at its learning rate, one a seed."""
        lr = self.lr(cell)
        if lr is None:
            return []
        seeds = grids.seeds(self.grid, cell.task)
        specs = [grids.spec(self.grid, cell, lr, seed) for seed in seeds]
        return [r for r in map(self.results.get, specs) if r is not None]

    def values(self, cell: grids.Cell, metric: str) -> list[float]:
        """A metric in percent; a run that diverged counts as 0."""
        records = [r for r in self.records(cell) if r['diverged'] or metric in r['metrics']]
        return [0.0 if r['diverged'] else 100 * r['metrics'][metric] for r in records]

    def tasks(self) -> list[str]:
        """Tasks with at least one finished cell."""
        return [t for t in self.grid['tasks'] if any(self.records(c) for c in self.of(t))]

    def of(self, task: str) -> list[grids.Cell]:
        """The cells of a task."""
        return [cell for cell in self.cells if cell.task == task]

    def rows(self, task: str) -> list[str]:
        """Rows of a task in the order of the grid file."""
        there = {cell.row for cell in self.of(task) if self.records(cell)}
        return [row for row in self.grid['rows'] if row in there]

    def columns(self, task: str) -> list[int]:
        """Images per step of a task."""
        return sorted({cell.images_per_step for cell in self.of(task) if self.records(cell)})


def table(study: Study, task: str, metric: str) -> str:
    """Rows by images per step: mean ± deviation over the seeds, and the learning rate."""
    columns = study.columns(task)
    lines = [
        '| | ' + ' | '.join(f'{n} image{"s" * (n > 1)} per step' for n in columns) + ' |',
        '|---' * (len(columns) + 1) + '|',
    ]
    for row in study.rows(task):
        cells = [entry(study, grids.Cell(task, row, n), metric) for n in columns]
        if any(cells):
            lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) if len(lines) > 2 else ''


def entry(study: Study, cell: grids.Cell, metric: str) -> str:
    """One cell of a table; empty where nothing is finished."""
    values = study.values(cell, metric)
    if not values:
        return ''
    missing = len(grids.seeds(study.grid, cell.task)) - len(values)
    seeds = f'; {len(values)} seed{"s" * (len(values) > 1)}' if missing else ''
    diverged = sum(r['diverged'] for r in study.records(cell))
    failed = f'; {diverged} diverged' if diverged else ''
    return f'{mean(values)} (lr {study.lr(cell):g}{seeds}{failed})'


def search_table(study: Study, task: str) -> str:
    """Validation metric of every searched learning rate, first seed; empty where none is."""
    lrs = study.grid['tasks'][task]['lrs']
    if isinstance(lrs, dict) or len(lrs) == 1:
        return ''
    head = '| | images per step | ' + ' | '.join(f'lr {lr:g}' for lr in lrs) + ' |'
    lines = [head, '|---' * (len(lrs) + 2) + '|']
    for row in study.rows(task):
        for count in study.columns(task):
            cell = grids.Cell(task, row, count)
            if cell not in study.cells or grids.search_cell(study.grid, cell) != cell:
                continue
            seed = grids.seeds(study.grid, task)[0]
            found = [study.results.get(grids.spec(study.grid, cell, lr, seed)) for lr in lrs]
            texts = [
                ''
                if r is None
                else 'diverged'
                if r['diverged']
                else f'{100 * r["metrics"]["val"]:.1f}'
                for r in found
            ]
            if any(texts):
                lines.append(f'| {row} | {count} | ' + ' | '.join(texts) + ' |')
    return '\n'.join(lines)


def singularity_table(study: Study, task: str, count: int) -> str:
    """Singularity measures at the end of training, means over the seeds."""
    names = ('dead_channels', 'singularity_distance', 'stat_spread')
    lines = [
        '| | dead channels, % | distance to singularities | spread of channel statistics |',
        '|---|---|---|---|',
    ]
    for row in study.rows(task):
        records = study.records(grids.Cell(task, row, count))
        ends = [r['singularities'] for r in records if r['singularities']['step']]
        if ends:
            means = [statistics.mean(e[n][-1] for e in ends) for n in names]
            lines.append(f'| {row} | {100 * means[0]:.2f} | {means[1]:.3f} | {means[2]:.3f} |')
    return '\n'.join(lines)


OURS = 'BCN + WS (estimate)'
FROZEN = ('frozen BN, GN + WS in the head', 'frozen BN, BCN + WS in the head')


def parts_of(studies: Sequence[Study]) -> list[tuple[Study, str]]:
    """Each study with each of its tasks."""
    return [(study, task) for study in studies for task in study.tasks()]


def overview(studies: Sequence[Study]) -> str:
    """One image per step, a line a task: means and deviations of the test metric."""
    columns = [('BN',), FROZEN, ('GN',), ('GN + WS',), (OURS,)]
    names = ['BN', 'frozen BN', 'GN', 'GN + WS', 'BCN + WS']
    lines = [f'| task, test metric in % | {" | ".join(names)} |', '|---' * 6 + '|']
    for study, task in parts_of(studies):
        cells = [
            next((c for c in study.of(task) if c.row in rows and c.images_per_step == 1), None)
            for rows in columns
        ]
        texts = ['' if c is None else mean(study.values(c, 'test')) for c in cells]
        if texts[-1]:
            lines.append(f'| {task}, {metric_of(study, task)} | {" | ".join(texts)} |')
    return '\n'.join(lines)


def mean(values: list[float]) -> str:
    """Mean and deviation; empty without a value."""
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}' if values else ''


def bars(studies: Sequence[Study]) -> str:
    """What BCN + WS at one image per step must show, task by task, on both splits.

    The spread is the larger one of the two cells' deviations over the seeds.
    """
    lines = ['| task | BCN + WS at 1 image against | test | validation |', '|---' * 4 + '|']
    others = [(row, 1) for row in ('BN', *FROZEN, 'GN', 'GN + WS')] + [('BN', 8)]
    for study, task in parts_of(studies):
        for row, count in others:
            cells = grids.Cell(task, OURS, 1), grids.Cell(task, row, count)
            if not {*cells} <= {*study.cells}:
                continue
            verdicts = [
                verdict(*(study.values(cell, split) for cell in cells)) for split in ('test', 'val')
            ]
            if all(verdicts):
                name = f'{row} at {count} image{"s" * (count > 1)}'
                lines.append(f'| {task} | {name} | {" | ".join(verdicts)} |')
    return '\n'.join(lines)


def verdict(ours: list[float], theirs: list[float]) -> str:
    """The difference of two cells against the spread; empty with fewer than two runs of one."""
    if len(ours) < 2 or len(theirs) < 2:
        return ''
    difference = statistics.mean(ours) - statistics.mean(theirs)
    spread = max(statistics.stdev(ours), statistics.stdev(theirs))
    word = 'better' if difference > spread else 'worse' if -difference > spread else 'level'
    return f'{difference:+.1f}, spread {spread:.1f}: {word}'


def tables(*studies: Study) -> str:
    """All tables as Markdown."""
    parts = [
        '<!-- Made by tools/study/make_report.py from the records: do not edit. -->',
        '## At one image per step',
        overview(studies),
        '## BCN + WS at one image per step',
        bars(studies),
    ]
    for study, task in parts_of(studies):
        records = [r for cell in study.of(task) for r in study.records(cell)]
        parts.append(f'## {task}')
        for metric, name in METRICS.items():
            text = table(study, task, metric)
            if text:
                parts += [f'{records[0]["metric"]}, {name}, %:', text]
        if text := search_table(study, task):
            parts += ['Learning-rate search (validation, first seed):', text]
        for count in study.columns(task):
            if count in (1, 8):
                parts += [
                    f'End of training, {count} image{"s" * (count > 1)} per step '
                    '(one training batch, means over ReLUs and seeds):',
                    singularity_table(study, task, count),
                ]
    return '\n\n'.join(parts) + '\n'


def main_rows(study: Study, task: str) -> list[str]:
    """Rows that plots show: those with a colour."""
    return [row for row in study.rows(task) if row in COLOURS]


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, three side by side."""
    rows, columns = -(-count // 3), min(count, 3)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.5 * columns, 3.9 * rows), squeeze=False, layout='constrained'
    )
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def save(figure: Figure, target: Path) -> None:
    """Writes a figure whose axes share their rows: one legend for all, below them."""
    handles: dict[str, Artist] = {}
    for axis in figure.axes:
        handles.update({name: h for h, name in zip(*axis.get_legend_handles_labels())})
    names = [name for name in COLOURS if name in handles]
    for columns in range(min(len(names), 7), 0, -1):  # as many as there is room for
        legend = figure.legend(
            [handles[name] for name in names],
            names,
            loc='outside lower center',
            ncols=columns,
            frameon=False,
        )
        if legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.savefig(target, dpi=100)
    plt.close(figure)


def metric_of(study: Study, task: str) -> str:
    """The name of what is reported."""
    return next(r for c in study.of(task) for r in study.records(c))['metric']


def plot_one_image(study: Study, target: Path) -> None:
    """Mean and deviation of each row at one image per step, a panel for each task."""
    tasks = [t for t in study.tasks() if 1 in study.columns(t)]
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks):
        found = {r: study.values(grids.Cell(task, r, 1), 'test') for r in main_rows(study, task)}
        shown = [row for row in found if found[row]]
        for place, row in enumerate(reversed(shown)):
            values = found[row]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            colour = COLOURS[row]
            axis.errorbar(
                statistics.mean(values), place, xerr=spread, fmt='o', color=colour, capsize=3
            )
            axis.plot(values, [place] * len(values), '|', color=colour, alpha=0.6)
        axis.set_yticks(range(len(shown)), list(reversed(shown)), fontsize=8)
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.margins(x=0.08)
        axis.set(xlabel=f'{metric_of(study, task)}, test, %', title=task)
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=100)
    plt.close(figure)


def plot_metric(study: Study, target: Path) -> None:
    """Metric against images per step, for the tasks that have several columns."""
    tasks = [t for t in study.tasks() if len(study.columns(t)) > 1]
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks):
        rows, counts = main_rows(study, task), study.columns(task)
        for number, row in enumerate(rows):
            points = []
            for count in counts:
                values = study.values(grids.Cell(task, row, count), 'test')
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    # Side by side, or the bars would hide each other.
                    place = count * 2 ** (0.07 * (number - (len(rows) - 1) / 2))
                    points.append((place, statistics.mean(values), spread))
            if points:
                x, y, yerr = zip(*points)
                axis.errorbar(x, y, yerr=yerr, fmt='o-', color=COLOURS[row], capsize=2, label=row)
        axis.set_xscale('log', base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.margins(x=0.1, y=0.08)
        axis.set(xlabel='images per step', ylabel=f'{metric_of(study, task)}, test, %', title=task)
        axis.grid(alpha=0.3)
    save(figure, target)


def plot_along(study: Study, target: Path, of: Callable[[dict], Curve | None], label: str) -> None:
    """What ``of`` takes from a record, along the training at one image: means over the seeds."""
    tasks = [t for t in study.tasks() if 1 in study.columns(t)]
    curves = {
        (task, row): [
            curve
            for record in study.records(grids.Cell(task, row, 1))
            # Runs stop where they diverge: the others have all points.
            if not record['diverged'] and (curve := of(record)) is not None
        ]
        for task in tasks
        for row in main_rows(study, task)
    }
    tasks = [t for t in tasks if any(curves[t, row] for row in main_rows(study, t))]
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks):
        for row in main_rows(study, task):
            if found := curves[task, row]:
                means = [statistics.mean(v) for v in zip(*(values for _, values in found))]
                axis.plot(found[0][0], means, color=COLOURS[row], label=row)
        axis.set(xlabel='step', ylabel=label, title=f'{task}, 1 image per step')
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    save(figure, target)


def loss_of(record: dict) -> Curve:
    """Training loss of a run, averaged over parts of it."""
    return record['curve']['step'], record['curve']['loss']


def dead_channels_of(record: dict) -> Curve | None:
    """Channels whose ReLU gives 0 for the whole batch, in percent."""
    watched = record['singularities']
    if 'dead_channels' not in watched:
        return None
    return watched['step'], [100 * value for value in watched['dead_channels']]


TRACED = {
    'dead_channels': ('dead channels', 'linear'),
    'singularity_distance': ('distance to singularities', 'linear'),
    'stat_spread': ('spread of channel statistics', 'linear'),
    'mean_gap': ('gap of the estimated means, deviations', 'log'),
    'loss_range': ('range of the loss along the step', 'log'),
    'predictiveness': ('relative change of the gradient', 'log'),
    'beta': ('effective β-smoothness', 'log'),
    'gradient_ratio': ('|dL/dw| against the WS bound', 'linear'),
}


def plot_trace(record: dict, target: Path) -> None:
    """What tools/study/trace.py measured along a training."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 7), constrained_layout=True)
    for axis, (key, (label, scale)) in zip(axes.flat, TRACED.items()):
        for row, found in record['rows'].items():
            if any(v is not None for v in found[key]):
                axis.plot(found['step'], found[key], color=COLOURS.get(row), label=row)
        axis.set(xlabel='step', title=label, yscale=scale)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f'{record["task"]}, {record["images_per_step"]} image(s) per step')
    figure.savefig(target, dpi=90)
    plt.close(figure)


def trace_table(record: dict) -> str:
    """Means over the second half of the trajectory."""
    lines = [
        '| | ' + ' | '.join(label.replace('|', '\\|') for label, _ in TRACED.values()) + ' |',
        '|---' * (len(TRACED) + 1) + '|',
    ]
    for row, found in record['rows'].items():
        texts = []
        for key in TRACED:
            values = [v for v in found[key][len(found[key]) // 2 :] if v is not None]
            texts.append(f'{statistics.mean(values):.3g}' if values else '')
        lines.append(f'| {row} | ' + ' | '.join(texts) + ' |')
    return '\n'.join(lines)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('grid', nargs='?', default=str(HERE / 'grids' / 'study.yaml'))
    parser.add_argument('-r', '--results', default=str(DOCS / 'results'), help='the records')
    parser.add_argument('-o', '--out', default=str(DOCS), help='folder of tables and plots')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Writes tables.md and the plots."""
    args = parse_args(arguments)
    try:
        study = Study(args.grid, args.results)
        if not study.tasks():
            raise FileNotFoundError(f'no finished cell below {args.results}: run run_grid.py first')
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f'error: {error}')
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    longer = Study(HERE / 'grids' / 'longer.yaml', args.results)
    text = tables(study, longer)
    plot_one_image(study, out / 'one_image.png')
    plot_metric(study, out / 'metric.png')
    plot_along(study, out / 'loss.png', loss_of, 'training loss')
    plot_along(study, out / 'dead_channels.png', dead_channels_of, 'dead channels, %')
    for path in sorted(Path(args.results).glob('trace_*.json')):
        record = json.loads(path.read_text())
        plot_trace(record, out / f'{path.stem}.png')
        text += (
            f'\n## Along the training: {record["task"]}, {record["images_per_step"]} image(s) per '
            f'step, lr {record["lr"]:g}\n\nMeans over the second half:\n\n{trace_table(record)}\n'
        )
    if longer.tasks():
        plot_one_image(longer, out / 'longer.png')
        plot_along(longer, out / 'longer_loss.png', loss_of, 'training loss')
    instances = Study(HERE / 'grids' / 'instances.yaml', args.results)
    for task in instances.tasks():
        rows = {r: instances.records(grids.Cell(task, r, 1)) for r in instances.rows(task)}
        plot_losses(rows, out / f'{task}.png')
        text += (
            f'\n## {task}: each row against {AGAINST}\n\nLosses of the trained model over the '
            f'whole held-out images:\n\n{gaps_table(rows)}\n'
        )
    # What analysis_tools/diagnose.py measured on two models.
    pages = [Path(args.results) / f'diagnose_{name}.json' for name in ('gn', 'ws-bcn')]
    if all(page.is_file() for page in pages):
        numbers = [json.loads(page.read_text()) for page in pages]
        models = list(zip(numbers, (OTHER, THIS), ('GN', 'BCN + WS')))
        plot_singularities(models).savefig(out / 'diagnose_layers.png', dpi=90)
        plot_channels(models).savefig(out / 'diagnose_channels.png', dpi=90)
        plt.close('all')
    (out / 'tables.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main()
