"""Writes a row of docs/versions.md: what was tried in the environment that this runs in.

Called by tools/dev/matrix.sh with the Python of a stack, after its tests or after the quickstart.
All other rows stay as they are; without a stack all do, and what stands above them is written anew.
"""

import argparse
import datetime
import platform
import re
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
STACKS = ROOT / 'tools' / 'dev' / 'stacks.txt'

TESTS = (
    *('stack', 'Python', 'torch', 'numpy', 'Triton', 'OpenMMLab'),
    *('passed', 'failed', 'skipped', 'minutes', 'date', 'commit'),
)
QUICKSTART = (
    *('stack', 'Python', 'torch', 'numpy', 'OpenMMLab', 'operators'),
    *('bbox mAP', 'segm mAP', 'until it trains', 'minutes', 'date', 'commit'),
)
HEADS = (
    """\
# Versions
What `bash tools/dev/matrix.sh` has tested: a row for each stack of `tools/dev/stacks.txt`, written
by that script. A stack without a row has not been tested by it. Without OpenMMLab: the layers, the
two functions and all backends against the specification, `torch.compile`, checkpointing,
transforms, the CUDA kernels in Triton's interpreter. With it: its own tests and those of the tools.
On the fork MMPretrain is tested too, MMAction2 is not: 1.2.0 refuses the fork's mmcv.

Promised is what lies between the oldest and the newest torch here, with Python 3.10 to 3.13; a
newer torch gets one line when the package is imported. torch 2.1 to 2.5 is refused: the C++
interface (2.4 and before) and the registration of operators (2.3 and before) are others there,
`torch.compile` cannot trace the layers, and each release would have to be kept tested.

""",
    """
## Quickstart
What `bash tools/quickstart.sh` gives on a stack (Mask R-CNN on the CPU, an image per step), written
by `bash tools/dev/matrix.sh --quickstart`; a stack without a row was not run. It begins with an
empty folder: the environment is made and everything downloaded or compiled that is needed. Minutes:
*until it trains*, from the empty folder to the first line of the training log, after its first 50
steps; *minutes*, all, predictions drawn, by the clock: other work beside it makes it longer.
*operators*: whose NMS and RoIAlign; a wheel of mmcv was compiled before, and its time is not in the
row.

""",
)


def version(*distributions: str) -> str:
    """The version of the first distribution that is installed, else '-'."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return '-'


def host() -> str:
    """Which OpenMMLab this environment has."""
    for name, mmcvs in {
        'mmdet': ('mmcv', 'mmcv-lite'),
        'onedl-mmdetection': ('onedl-mmcv',),
    }.items():
        if version(name) != '-':
            mmcv = next(mmcv for mmcv in mmcvs if version(mmcv) != '-')
            return f'{name} {version(name)}, {mmcv} {version(mmcv)}'
    return '-'


def counts(results: Path) -> tuple[int, int, int, float]:
    """Tests that passed, failed and were skipped, and seconds, of pytest's JUnit file."""
    suites = list(ElementTree.parse(results).getroot().iter('testsuite'))

    def total(key: str) -> float:
        return sum(float(suite.get(key, 0)) for suite in suites)

    failed = int(total('failures') + total('errors'))
    skipped = int(total('skipped'))
    return int(total('tests')) - failed - skipped, failed, skipped, total('time')


def tested(results: Path) -> dict[str, str]:
    """The cells of pytest's JUnit file."""
    passed, failed, skipped, seconds = counts(results)
    return {
        'passed': f'{passed:,}',
        'failed': f'{failed:,}',
        'skipped': f'{skipped:,}',
        'minutes': f'{seconds / 60:.0f}',
    }


def trained(log: Path, started: float, operators: str) -> dict[str, str]:
    """The cells of a quickstart's log, which has just ended.

    Args:
        log: What was said since then.
        started: When there was nothing yet, in seconds since 1970.
        operators: Where NMS and RoIAlign come from.

    Raises:
        ValueError: The log is not that of a quickstart that came to its end.
    """
    text = log.read_text()
    metrics = {
        name: re.findall(rf'^ *{name} +([\d.]+)$', text, re.MULTILINE) for name in QUICKSTART[6:8]
    }
    lines = re.findall(r'^(\d\d/\d\d [\d:]{8}) - .* \w+\(train\) ', text, re.MULTILINE)
    if not lines or not all(metrics.values()):
        raise ValueError(f'{log} is not the log of a quickstart that came to its end')
    begin = datetime.datetime.fromtimestamp(started)
    first = datetime.datetime.strptime(f'{begin.year}/{lines[0]}', '%Y/%m/%d %H:%M:%S')
    return {name: found[-1] for name, found in metrics.items()} | {
        'operators': operators,
        'until it trains': f'{(first - begin).total_seconds() / 60:.1f}',
        'minutes': f'{(datetime.datetime.now() - begin).total_seconds() / 60:.1f}',
    }


def row(columns: tuple[str, ...], stack: str, commit: str, measured: dict[str, str]) -> str:
    """The row of this environment."""
    cells = measured | {
        'stack': stack,
        'Python': platform.python_version(),
        'torch': version('torch'),
        'numpy': version('numpy'),
        'Triton': version('triton'),
        'OpenMMLab': host(),
        'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        'commit': commit,
    }
    return f'| {" | ".join(cells[column] for column in columns)} |\n'


def stacks() -> list[str]:
    """The names of the stacks, in their order."""
    lines = STACKS.read_text().splitlines()
    return [line.split()[0] for line in lines if line[:1] not in ('#', '')]


def rows_of(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """The rows of a page's tables, tests and quickstart, by the names of their stacks."""
    tests, _, quickstart = text.partition('\n## Quickstart\n')
    row = re.compile(r'^\| ([\w-]+) \| 3\..*\n', re.MULTILINE)
    found = [{match[1]: match[0] for match in row.finditer(part)} for part in (tests, quickstart)]
    return found[0], found[1]


def page_of(tests: dict[str, str], quickstart: dict[str, str]) -> str:
    """The page with these rows."""
    text = ''
    for head, columns, rows in zip(HEADS, (TESTS, QUICKSTART), (tests, quickstart)):
        text += f'{head}| {" | ".join(columns)} |\n|{"---|" * len(columns)}\n'
        text += ''.join(rows[name] for name in stacks() if name in rows)
    return text


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('page', type=Path)
    parser.add_argument('stack', nargs='?')
    parser.add_argument('results', nargs='?', type=Path, help="pytest's JUnit file, or a log")
    parser.add_argument('--commit')
    parser.add_argument('--started', type=float, help='of a quickstart: seconds since 1970')
    parser.add_argument('--operators', default='mmcv', help='of a quickstart: where they are from')
    args = parser.parse_args(argv)
    tests, quickstart = rows_of(args.page.read_text() if args.page.exists() else '')
    if args.stack:
        if not (args.results and args.commit):
            parser.error('a row needs STACK, RESULTS and --commit')
        if args.started is None:
            cells = tested(args.results)
            tests[args.stack] = row(TESTS, args.stack, args.commit, cells)
        else:
            cells = trained(args.results, args.started, args.operators)
            quickstart[args.stack] = row(QUICKSTART, args.stack, args.commit, cells)
    args.page.write_text(page_of(tests, quickstart))


if __name__ == '__main__':
    main()
