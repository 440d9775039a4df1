"""Writes a row of docs/versions.md: what was tested in the environment that this runs in.

Called by tools/dev/matrix.sh with the Python of a stack. Rows of other stacks stay as they are;
without a stack all do, and what stands above them is written anew.
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

COLUMNS = (
    *('stack', 'Python', 'torch', 'numpy', 'Triton', 'OpenMMLab'),
    *('passed', 'failed', 'skipped', 'minutes', 'date', 'commit'),
)
HEAD = f"""\
# Versions
What `bash tools/dev/matrix.sh` has tested: a row for each stack of `tools/dev/stacks.txt`, written
by that script. A stack without a row has not been tested by it. Without OpenMMLab: the layers, the
two functions and all backends against the specification, `torch.compile`, checkpointing,
transforms, the CUDA kernels in Triton's interpreter. With it: its own tests and those of the tools.

Promised is what lies between the oldest and the newest torch here, with Python 3.10 to 3.13; a
newer torch gets one line when the package is imported. torch 2.1 to 2.5 is refused: the C++
interface (2.4 and before) and the registration of operators (2.3 and before) are others there,
`torch.compile` cannot trace the layers, and each release would have to be kept tested.

| {' | '.join(COLUMNS)} |
|{'---|' * len(COLUMNS)}
"""


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
    for name in 'mmdet', 'onedl-mmdetection':
        if version(name) != '-':
            mmcv = name.replace('mmdetection', 'mmcv').replace('mmdet', 'mmcv')
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


def row(name: str, results: Path, commit: str) -> str:
    """The row of this environment."""
    passed, failed, skipped, seconds = counts(results)
    cells = [
        name,
        platform.python_version(),
        version('torch'),
        version('numpy'),
        version('triton'),
        host(),
        f'{passed:,}',
        f'{failed:,}',
        f'{skipped:,}',
        f'{seconds / 60:.0f}',
        datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        commit,
    ]
    return f'| {" | ".join(cells)} |\n'


def rows_of(text: str) -> dict[str, str]:
    """The rows of a page by the names of their stacks."""
    rows = (line for line in text.splitlines() if re.match(r'\| [\w-]+ \| 3\.', line))
    return {line.split()[1]: line + '\n' for line in rows}


def stacks() -> list[str]:
    """The names of the stacks, in their order."""
    lines = STACKS.read_text().splitlines()
    return [line.split()[0] for line in lines if not line.startswith('#')]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('page', type=Path)
    parser.add_argument('stack', nargs='?')
    parser.add_argument('results', nargs='?', type=Path, help="pytest's JUnit file")
    parser.add_argument('--commit')
    args = parser.parse_args(argv)
    rows = rows_of(args.page.read_text()) if args.page.exists() else {}
    if args.stack:
        if not (args.results and args.commit):
            parser.error('a row needs STACK, RESULTS and --commit')
        rows[args.stack] = row(args.stack, args.results, args.commit)
    order = [
        line.split()[0] for line in STACKS.read_text().splitlines() if line[:1] not in ('#', '')
    ]
    args.page.write_text(HEAD + ''.join(rows[name] for name in order if name in rows))


if __name__ == '__main__':
    main()
