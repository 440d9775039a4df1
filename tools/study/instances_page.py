"""Table and picture of grids/instances.yaml: what BCN + WS lacks in instance segmentation."""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt

Rows = dict[str, list[dict]]  # records by row, one a seed

AGAINST = 'GN + WS'
LOSSES = {
    'RPN': ('loss_rpn_cls', 'loss_rpn_bbox'),
    'classification': ('loss_cls',),
    'box': ('loss_bbox',),
    'mask': ('loss_mask',),
}
WINDOW = 5  # points of a curve that a drawn one averages: images differ more than rows do


def gaps_table(rows: Rows) -> str:
    """Each row against GN + WS: mean and deviation of the differences, seed by seed; its mAP."""
    theirs = {record['seed']: record for record in rows[AGAINST]}
    head = [f'{name} loss, %' for name in LOSSES]
    head += ['segm mAP, points', 'segm mAP', 'statistics averaged anew']
    lines = [f'| | seeds | {" | ".join(head)} |', '|---' * (len(head) + 2) + '|']
    for row, records in rows.items():
        pairs = [(r, theirs[r['seed']]) for r in records if r['seed'] in theirs]
        if not pairs:
            continue
        own = [
            _spread([100 * r['metrics'][key] for r, _ in pairs if key in r['metrics']], '.1f')
            for key in ('test', 'test_recalibrated')
        ]
        if row == AGAINST:
            lines.append(f'| {row} | {len(pairs)} {"| " * len(LOSSES)}| | {" | ".join(own)} |')
            continue
        gaps = [
            [100 * (_loss(ours, name) / _loss(other, name) - 1) for ours, other in pairs]
            for name in LOSSES
        ]
        gaps.append([100 * (a['metrics']['test'] - b['metrics']['test']) for a, b in pairs])
        lines.append(f'| {row} | {len(pairs)} | {" | ".join([*map(_spread, gaps), *own])} |')
    return '\n'.join(lines)


def _loss(record: dict, name: str) -> float:
    """Of the trained model, over the whole held-out images."""
    return sum(record['losses']['images'][part] for part in LOSSES[name])


def _spread(values: list[float], form: str = '+.1f') -> str:
    if not values:
        return ''
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{spread}'


def plot_losses(rows: Rows, target: Path) -> None:
    """Mask and RPN loss along the training, means over the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(13.5, 5), layout='constrained')
    for axis, name in zip(axes, ('mask', 'RPN')):
        for number, (row, records) in enumerate(rows.items()):
            curves = [_curve(record['curve'], name) for record in records]
            means = [statistics.mean(values) for values in zip(*curves)]
            steps = records[0]['curve']['step'][WINDOW - 1 :]
            runs = f'{len(records)} run{"s" * (len(records) > 1)}'
            style = '-' if len(records) > 1 else '--'
            axis.plot(steps, means, style, color=f'C{number}', label=f'{row} ({runs})')
        axis.set(xlabel='step', ylabel=f'{name} loss, training', yscale='log')
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks('{x:.2g}')
        axis.grid(alpha=0.3, which='both')
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=3, frameon=False)
    figure.savefig(target, dpi=100)
    plt.close(figure)


def _curve(curve: dict, name: str) -> list[float]:
    values = [sum(parts) for parts in zip(*(curve[part] for part in LOSSES[name]))]
    ends = range(WINDOW, len(values) + 1)
    return [statistics.mean(values[end - WINDOW : end]) for end in ends]
