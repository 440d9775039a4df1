"""Trains a task once per row and measures what `wsbcn_mm.diagnostics` offers along the way.

Singularities and gaps of the estimates over the same training images in evaluation mode, smoothness
(Santurkar et al., 2018) and weight gradients on the batch of the step.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / 'docs' / 'study' / 'results'
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # also from a clone not installed

IMAGES = 32
MEASURES = (
    'step',
    'loss',
    'dead_channels',
    'singularity_distance',
    'stat_spread',
    'mean_gap',
    'drift_share',
    'loss_range',
    'predictiveness',
    'beta',
    'gradient_ratio',
)
ROWS = ('BN', 'GN', 'GN + WS', 'BCN + WS (estimate)')


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('grid', nargs='?', default=str(HERE / 'grids' / 'study.yaml'))
    parser.add_argument('--task', default='digits')
    parser.add_argument('--rows', nargs='+', default=ROWS)
    parser.add_argument('--lr', type=float, default=0.01, help='per image of a step, for every row')
    parser.add_argument('--images-per-step', type=int, default=1)
    parser.add_argument('--points', type=int, default=24, help='measurements along the way')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('-o', '--out', help='default: docs/study/results/trace_<task>.json')
    return parser.parse_args(arguments)


def trace(task, run: dict, points: int) -> dict[str, list]:
    """Trains one row; measures at ``points`` steps, evenly spaced."""
    import numpy as np
    import torch
    from experiments import loop

    from wsbcn_mm.diagnostics import (
        ActivationObserver,
        EstimateObserver,
        WeightGradientObserver,
        estimate_gaps,
        singularities,
        smoothness,
    )

    found: dict[str, list] = {name: [] for name in MEASURES}
    steps = run['epochs'] * (task.num_train // 8 * 8) // run['images_per_step']
    # The same training images for every row and every point.
    rng = np.random.default_rng(0)
    fixed = [task.train_batch([i], rng)[0] for i in rng.permutation(task.num_train)[:IMAGES]]

    def measure(step: int, model, loss) -> None:
        if step % max(1, steps // points) != 0:
            return
        model.eval()
        with torch.no_grad(), ActivationObserver(model) as seen, EstimateObserver(model) as gaps:
            for image in fixed:
                model(image)
        model.train()
        values: dict[str, float | None] = {**singularities(seen.layers())}
        values.update(estimate_gaps(gaps.layers()) if gaps.layers() else {})
        there = smoothness(model, loss, run['lr'] * run['images_per_step'])
        with WeightGradientObserver(model) as observer:
            before = [b.clone() for b in model.buffers()]
            loss().backward()
            for buffer, value in zip(model.buffers(), before):
                buffer.copy_(value)
            model.zero_grad()
        ratios = [g.ratio for g in observer.layers().values() if g.ratio is not None]
        values.update(
            step=step,
            loss=there.loss,
            loss_range=there.loss_range,
            beta=there.beta,
            predictiveness=max(there.gradient_distances) / there.gradient_norm,
            gradient_ratio=sum(ratios) / len(ratios) if ratios else None,
        )
        for name in MEASURES:
            found[name].append(values.get(name))

    loop.run(task, run, before_step=measure)
    return found


def finished_rows(out: Path, settings: dict) -> dict:
    """The rows of a record with the same settings; an interrupted call goes on behind them.

    Raises:
        ValueError: the record has other settings.
    """
    if not out.is_file():
        return {}
    record = json.loads(out.read_text())
    rows = record.pop('rows')
    if record != settings:
        raise ValueError(f'{out} has settings {record}\n  asked for {settings}\n  delete it first')
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Traces every row and writes one record."""
    args = parse_args(arguments)
    import torch
    from experiments import grid as grids
    from experiments import loop, tasks
    from mmengine.logging import MMLogger

    MMLogger.get_instance('study', log_level='ERROR')
    torch.set_num_threads(1)
    try:
        grid = grids.load(args.grid)
        unknown = [row for row in args.rows if row not in grid['rows']]
        if unknown or args.task not in grid['tasks']:
            raise ValueError(f'{args.grid} has no task {args.task!r} or rows {unknown}')
        out = Path(args.out or RESULTS / f'trace_{args.task}.json')
        settings = {k: v for k, v in vars(args).items() if k not in ('out', 'grid', 'rows')}
        rows = finished_rows(out, settings)
        for row in args.rows:
            if row in rows:
                continue
            cell = grids.Cell(args.task, row, args.images_per_step)
            run = grids.spec(grid, cell, args.lr, args.seed)
            found = trace(tasks.make(run['dataset'], run['arguments']), run, args.points)
            rows = {**finished_rows(out, settings), row: found}  # another process may have written
            record = loop.plain(dict(settings, rows=rows))
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, separators=(',', ':')) + '\n')
            print(f'{row}: {len(found["step"])} points', flush=True)
    except (ValueError, ImportError, FileNotFoundError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
