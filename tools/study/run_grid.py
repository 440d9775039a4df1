"""Runs what is missing of a grid of experiments; may be stopped and started again at any time."""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parents[1] / 'work_dirs' / 'study' / 'pretrained'
RESULTS = HERE.parents[1] / 'docs' / 'study' / 'results'
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # also from a clone not installed


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('grid', nargs='?', default=str(HERE / 'grids' / 'study.yaml'))
    parser.add_argument('--smoke', action='store_true', help='the tiny grid of the tests')
    parser.add_argument('-o', '--out', help='folder of the records; default: docs/study/results')
    parser.add_argument('--only', nargs='+', help='only these tasks')
    parser.add_argument('--minutes', type=float, help='start no run after this time')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads; one process per core')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs and reports one line a run."""
    args = parse_args(arguments)
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # mmengine takes a GPU wherever it sees one
    import torch
    from experiments import detection, loop, pretrained, tasks
    from experiments import grid as grids
    from mmengine.logging import MMLogger

    # mmengine prints how each parameter was initialised.
    MMLogger.get_instance('study', log_level='ERROR')
    torch.set_num_threads(args.threads)
    try:
        grid = grids.load(HERE / 'grids' / 'smoke.yaml' if args.smoke else args.grid)
        sources = {t['pretraining']['task'] for t in grid['tasks'].values() if 'pretraining' in t}
        report = functools.partial(print, flush=True)
        results = grids.Results(args.out or RESULTS)
        started, left = time.monotonic(), True
        while left:
            left, busy = False, False
            for run in grids.missing_runs(grid, results):
                if args.only and run['task'] not in args.only:
                    continue
                if args.minutes and time.monotonic() - started > 60 * args.minutes:
                    return
                with grids.Claim(results.path(run)) as mine:
                    busy |= not mine
                    if not mine or results.get(run) is not None:
                        continue
                    print(
                        f'{run["task"]} | {run["row"]} | {run["images_per_step"]} images | '
                        f'lr {run["lr"]:g} | seed {run["seed"]}',
                        end=' ... ',
                        flush=True,
                    )
                    weights = None
                    if 'pretraining' in run:
                        weights = pretrained.weights(
                            run['pretraining'], WEIGHTS, report, args.device
                        )
                    if run['dataset'] in detection.DATASETS:
                        record = detection.run(run, report, weights)
                    else:
                        task = tasks.make(run['dataset'], run['arguments'])
                        keep = run['task'] in sources and pretrained.keeper(run, WEIGHTS)
                        record = loop.run(
                            task, run, report, None, weights, keep or None, args.device
                        )
                    results.put(record)
                    left = True  # a finished search makes new runs
                    break
            if busy and not left:  # also one of another process
                time.sleep(1)
                left = True
    except (ValueError, ImportError, FileNotFoundError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
