"""Which learning rate training at one image per step needs: runs what is missing of a grid."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parents[1] / 'docs' / 'study' / 'rates.jsonl'
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('grid', nargs='?', default=str(HERE / 'grids' / 'rates.yaml'))
    parser.add_argument('-o', '--out', default=str(RECORDS), help='one JSON record a line')
    parser.add_argument('--data', default='../shared/data', help='folder of the data sets')
    parser.add_argument('--work', help='folder for what is made of them; default: a temporary one')
    parser.add_argument('--table', action='store_true', help='print the records as a table, no run')
    parser.add_argument('--parts', nargs='+', help='only these parts of the grid')
    return parser.parse_args()


def runs(grid: dict[str, Any], parts: list[str] | None) -> list[dict[str, Any]]:
    """Every run of the grid: in each part, each value of each list with each of the others."""
    found = []
    for name, part in grid['parts'].items():
        if parts and name not in parts:
            continue
        settings = {**grid['defaults'], **part}
        lists = [v if isinstance(v, list) else [v] for v in settings.values()]
        for values in itertools.product(*lists):
            found.append(dict(part=name, **dict(zip(settings, values, strict=True))))
    return found


def finished(out: Path) -> list[dict[str, Any]]:
    """The records that are there."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


def missing(run: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Whether no record has the settings of a run; the part's name does not count."""

    def key(record: dict[str, Any]) -> dict[str, Any]:
        known = {name: record.get(name) for name in run if name != 'part'}
        return dict(known, lr=None) if record.get('lr_of') == 'converter' else known

    return all(key(record) != key(run) for record in records)


def score_of(record: dict[str, Any]) -> float | None:
    """mIoU, or the mAP of masks, in percent; None where the training diverged."""
    metrics = record['metrics']
    if record['diverged'] or record['task'] != 'persons':
        return metrics.get('mIoU')
    return 100 * metrics.get('coco/segm_mAP', 0.0)  # no entry where nothing is detected


def table(records: list[dict[str, Any]]) -> str:
    """The records as rows of Markdown; seeds of the same settings stand together."""
    names = ('part', 'norm', 'conv', 'backbone', 'images', 'steps', 'lr', 'options')
    rows: dict[str, list[str]] = {}
    for record in records:
        cells = [record[name] for name in names]
        options = [f'{key.rpartition(".")[2]}={value}' for key, value in cells[-1].items()]
        cells[-1] = ', '.join(options)
        cells[-2] = f'{cells[-2]:g}' + (' (converter)' if record['lr_of'] == 'converter' else '')
        score = score_of(record)
        key = ' | '.join(f'{cell}' for cell in cells)
        rows.setdefault(key, []).append('diverged' if score is None else f'{score:.1f}')
    lines = [f'| {key} | {", ".join(scores)} |' for key, scores in rows.items()]
    head = f'| {" | ".join(names)} | mIoU or mAP |'
    return '\n'.join([head, '|---' * (len(names) + 1) + '|', *lines])


def main() -> None:
    """Runs and writes one line a run."""
    args = parse_args()
    if args.table:
        print(table(finished(Path(args.out))))
        return
    import torch
    import yaml
    from experiments import converted

    torch.set_num_threads(1)
    out = Path(args.out)
    grid = yaml.safe_load(Path(args.grid).read_text())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.work or temporary).resolve()
        for run in runs(grid, args.parts):
            if not missing(run, finished(out)):
                continue
            record = converted.train(run, Path(args.data).resolve(), folder)
            record['command'] = f'python tools/study/rates.py --parts {run["part"]}'
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open('a') as file:
                file.write(json.dumps(record, separators=(',', ':'), default=float) + '\n')
            score = score_of(record)
            print(
                f'{run} lr {record["lr"]:g}: {score} in {record["cpu_seconds"]:.0f} s', flush=True
            )


if __name__ == '__main__':
    main()
