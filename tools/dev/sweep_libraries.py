"""Converts small models of other libraries, and tabulates what comes of it.

Each is converted with an example, trained two steps at two images, evaluated and folded (compared
in float64). A row for each library that is installed goes between two marks of a Markdown file;
what stands around them stays.
"""

import argparse
import importlib
import json
import re
import sys
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed

MARKS = (
    '<!-- from here on written by tools/dev/sweep_libraries.py --report -->',
    '<!-- up to here the libraries -->',
)
HEAD = (
    '| library | models | through all stages | largest difference, folded | layers changed | '
    'convolutions before a norm that stay |\n|---|--:|--:|--:|--:|---|'
)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--libraries', nargs='*', help='these alone; default: those installed')
    parser.add_argument('-o', '--out', help='JSON file of the rows: keeps those of other libraries')
    parser.add_argument('--report', help='Markdown file: writes the table between its two marks')
    return parser.parse_args()


def row(library: str) -> tuple[str, list[str]]:
    """The row of a library, and a line for each model that did not get through."""
    from libraries import MODELS, Outcome, examine

    outcomes: list[Outcome] = []
    failed = []
    models = [m for m in MODELS if m.library == library]
    for model in models:
        try:
            outcomes.append(examine(model))
        except Exception as error:  # noqa: BLE001  recorded, and counted as ours
            failed.append(f'{library} {model.name}: {type(error).__name__}: {error}')
            print(failed[-1], flush=True)
            continue
        last = outcomes[-1]
        print(f'{library} {model.name}: {last.error:.1e} {last.kept}', flush=True)
    version = importlib.import_module(library).__version__
    reasons = [reason for o in outcomes for reason in o.kept.values()]
    kept = Counter(re.sub(r', \S+, stays', ' stays', reason) for reason in reasons)  # no names
    shown = '; '.join(f'{n}: {reason}' for reason, n in kept.most_common()) or 'none'
    changed = sum(len(o.report.changed) for o in outcomes)
    largest = max((o.error for o in outcomes), default=float('nan'))
    cells = f'{len(models)} | {len(outcomes)} | {largest:.0e} | {changed} | {shown}'
    return f'| {library} {version} | {cells} |', failed


def main() -> None:
    """Goes through the libraries, then writes the table where asked."""
    args = parse_args()
    warnings.simplefilter('ignore')
    from libraries import LIBRARIES

    names = args.libraries
    if names is None:
        names = [name for name in LIBRARIES if find_spec(name)]
    out = Path(args.out) if args.out else None
    known = json.loads(out.read_text()) if out is not None and out.is_file() else {}
    for name in names:
        known[name] = row(name)
        if out is not None:
            out.write_text(json.dumps(known, indent=1))
    rows = [known[name][0] for name in LIBRARIES if name in known]
    failed = [line for name in LIBRARIES if name in known for line in known[name][1]]
    table = '\n'.join([HEAD, *rows, *([''] if failed else []), *(f'- {line}' for line in failed)])
    print(table)
    if args.report:
        path = Path(args.report)
        before, begin, rest = path.read_text().partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        if not begin or not end:
            sys.exit(f'error: {path} has no lines {MARKS[0]!r} and {MARKS[1]!r} to write between')
        path.write_text(f'{before}{begin}\n\n{table}\n\n{end}{after}')


if __name__ == '__main__':
    main()
