"""The grid: which runs there are, in which order, and which learning rate each cell gets.

A grid is a YAML file; see tools/study/grids/study.yaml. A *cell* is a task, a row (norm and conv)
and a number of images per step. For a cell with a search every learning rate runs with the first
seed; the one with the best **validation** metric runs with the other seeds, and the table shows its
**test** metric. Cells without a search take the rate of another column of the same row. A part of
the order is run seed by seed, so that what is finished compares its rows.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    task: str
    row: str
    images_per_step: int


def load(path: str | Path) -> dict:
    """Reads a grid and checks its names.

    Args:
        path: A YAML file with ``seeds``, ``tasks``, ``rows`` and ``order``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a part is missing, or the order names an unknown task or row.
    """
    try:
        grid = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'{path} is not YAML: {error}') from error
    missing = {'seeds', 'tasks', 'rows', 'order'} - set(grid)
    if missing:
        raise ValueError(f'{path} lacks {", ".join(sorted(missing))}')
    for part in grid['order']:
        missing = {'tasks', 'images_per_step', 'rows'} - set(part)
        if missing:
            raise ValueError(f'{path}: a part of order lacks {", ".join(sorted(missing))}')
        unknown = [n for n in part['tasks'] if n not in grid['tasks']]
        unknown += [n for n in part['rows'] if n not in grid['rows']]
        if unknown:
            raise ValueError(f'{path}: order names {unknown}, which tasks and rows do not define')
        for name in part['tasks']:
            lrs = grid['tasks'][name].get('lrs')
            without = [row for row in part['rows'] if isinstance(lrs, dict) and row not in lrs]
            if without:
                raise ValueError(f'{path}: lrs of {name} has no rate for {", ".join(without)}')
    return grid


def cells(grid: dict) -> list[Cell]:
    """Every cell once, the important ones first."""
    return list({cell: None for part in grid['order'] for cell in _cells_of(part)})


def _cells_of(part: dict) -> list[Cell]:
    return [
        Cell(task, row, count)
        for task in part['tasks']
        for count in part['images_per_step']
        for row in part['rows']
    ]


def seeds(grid: dict, task: str) -> list[int]:
    """The seeds of a task: its own or those of the grid."""
    return grid['tasks'][task].get('seeds', grid['seeds'])


def rates(grid: dict, cell: Cell) -> list[float]:
    """The learning rates of a cell's search: its task has them for all rows or for each row."""
    lrs = grid['tasks'][cell.task]['lrs']
    return lrs[cell.row] if isinstance(lrs, dict) else lrs


def spec(grid: dict, cell: Cell, lr: float, seed: int) -> dict:
    """All that defines a run."""
    task, row = grid['tasks'][cell.task], grid['rows'][cell.row]
    norms = {part: _norm(task, row[part]) for part in ('norm', 'roi_norm') if part in row}
    further = {key: row[key] for key in ('frozen', 'accumulate', 'options') if key in row}
    if 'head' in row:
        head = grid['rows'][row['head']]
        further['head'] = dict(norm=_norm(task, head['norm']), conv=head.get('conv'))
    if 'pretraining' in task:
        before = task['pretraining']
        source = Cell(before['task'], row.get('pretrained_as', cell.row), before['images_per_step'])
        further['pretraining'] = spec(grid, source, before['lr'][source.row], before['seed'])
    return dict(
        task=cell.task,
        row=cell.row,
        images_per_step=cell.images_per_step,
        lr=float(lr),
        seed=seed,
        dataset=task['dataset'],
        arguments=task.get('arguments', {}),
        epochs=task['epochs'],
        weight_decay=float(task['weight_decay']),
        conv=row.get('conv'),
        **norms,
        **further,
    )


def _norm(task: dict, norm: dict) -> dict:
    return {k: task['num_groups'] if v == 'task' else v for k, v in norm.items()}


def search_cell(grid: dict, cell: Cell) -> Cell:
    """The cell whose search gives this one its learning rate."""
    column = grid['tasks'][cell.task].get('lr_from', {}).get(cell.images_per_step)
    return cell if column is None else Cell(cell.task, cell.row, column)


class Results:
    """The records below a folder: one JSON file a run, which is there when the run is finished."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, run: dict) -> Path:
        """The file of a run."""
        row = re.sub('[^a-z0-9.]+', '-', run['row'].lower()).strip('-')
        name = f'{row}_n{run["images_per_step"]}_lr{run["lr"]:g}_s{run["seed"]}.json'
        return self.folder / run['task'] / name

    def get(self, run: dict) -> dict | None:
        """The record of a run, None if it has not finished.

        Raises:
            ValueError: the file holds a run with other settings.
        """
        path = self.path(run)
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        changed = [key for key in run if record.get(key) != run[key]]
        if changed:
            raise ValueError(
                f'{path} holds a run with another {", ".join(changed)}\n'
                f'  expected {run[changed[0]]}\n  got {record.get(changed[0])}\n'
                '  delete it, or write the results to another folder'
            )
        return record

    def put(self, record: dict) -> None:
        """Writes a record: the whole file or nothing."""
        path = self.path(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f'.{os.getpid()}.part')
        part.write_text(json.dumps(record, separators=(',', ':')) + '\n')
        part.replace(path)


def best_lr(grid: dict, results: Results, cell: Cell) -> float | None:
    """The searched learning rate with the best validation metric; None while the search runs."""
    cell, best = search_cell(grid, cell), None
    for lr in rates(grid, cell):
        record = results.get(spec(grid, cell, lr, seeds(grid, cell.task)[0]))
        if record is None:
            return None
        value = record['metrics'].get('val')
        if value is not None and (best is None or value > best[0]):
            best = (value, float(lr))
    return float(rates(grid, cell)[0]) if best is None else best[1]


def missing_runs(grid: dict, results: Results) -> Iterator[dict]:
    """The runs that are still to do, in order; the answers follow what is finished meanwhile."""
    yielded = []
    for run in _runs(grid, results):
        if run not in yielded and results.get(run) is None:
            yielded.append(run)
            yield run


def _runs(grid: dict, results: Results) -> Iterator[dict]:
    every = cells(grid)
    for part in grid['order']:
        found = _cells_of(part)
        for cell in found:
            searched = search_cell(grid, cell)
            if searched == cell or searched not in every:
                for lr in rates(grid, searched):
                    yield spec(grid, searched, lr, seeds(grid, cell.task)[0])
        for number in range(max(len(seeds(grid, cell.task)) for cell in found)):
            for cell in found:
                best = best_lr(grid, results, cell)
                # None: the search is still to do, or another process does it.
                if best is not None and number < len(seeds(grid, cell.task)):
                    yield spec(grid, cell, best, seeds(grid, cell.task)[number])


class Claim:
    """Keeps other processes from doing the same run; ends with this process, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix('.lock')

    def __enter__(self) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, 'w')
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._mine = True
        except BlockingIOError:
            self._mine = False
        return self._mine

    def __exit__(self, *error) -> None:
        if self._mine:
            self._path.unlink(missing_ok=True)
        self._file.close()
