"""Converts every config that the installed mmdet and mmseg ship, and tabulates what comes of it.

Each config is converted, built, audited, written and read back; with --forward, one config of every
different network also runs once. Results go to a file of JSON lines as they come: run it again to
go on where it stopped. The tables go between two marks of a Markdown file; what stands around them
stays.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-o', '--out', default='work_dirs/sweep.jsonl', help='JSON lines')
    parser.add_argument('--packages', nargs='+', default=['mmdet', 'mmseg'])
    parser.add_argument('--forward', action='store_true', help='run every different network once')
    parser.add_argument('--no-write', action='store_true', help='do not write and read back')
    parser.add_argument('--match', default='', help='only configs with this in their name')
    parser.add_argument('--timeout', type=float, default=120, help='seconds per config')
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after so many')
    parser.add_argument(
        '--again',
        nargs='*',
        default=[],
        help='repeat configs of these outcomes; with --forward "not whole": what did not run so',
    )
    parser.add_argument('--report', help='Markdown file: writes the tables between its two marks')
    return parser.parse_args()


def read(path: Path) -> dict[str, dict]:
    """Records by config; a line that was cut off by a kill is passed over, later ones add to it."""
    records = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records.setdefault(record['config'], {}).update(record)
    return records


def family_by_family(names: list[str]) -> list[str]:
    """The first of each folder, then the second of each: a part of the sweep has seen them all."""
    seen = Counter()
    rank = {}
    for name in names:
        folder = name.rpartition('/')[0]
        rank[name] = seen[folder]
        seen[folder] += 1
    return sorted(names, key=lambda name: rank[name])


def jobs(records: dict[str, dict], names: list[str], forward: bool, again: list[str]) -> list[str]:
    """What is still to be done."""
    if not forward:
        return [n for n in names if n not in records or records[n]['outcome'] in again]
    run = [r for r in records.values() if 'forward' in r]
    done = {r['model'] for r in run if r['forward'] == 'whole' or 'not whole' not in again}
    first = {}
    for name in names:
        model = records.get(name, {}).get('model')
        if model is not None and model not in done:
            first.setdefault(model, name)
    return list(first.values())


def main() -> None:
    """Sweeps, then writes the table where asked."""
    args = parse_args()
    from sweep import Worker, upstream_configs

    names = [n for p in args.packages for n in upstream_configs(p) if args.match in n]
    names = family_by_family(names)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = jobs(read(out), names, args.forward, args.again)
    print(f'{len(names)} configs, {len(todo)} to do')
    end, worker = time.monotonic() + args.seconds, Worker()
    with tempfile.TemporaryDirectory() as folder, out.open('a') as file:
        if out.stat().st_size and not out.read_bytes().endswith(b'\n'):
            file.write('\n')
        for i, name in enumerate(todo):
            if time.monotonic() > end:
                print(f'stopped after {args.seconds:.0f} s: run again to go on')
                break
            written = None if args.no_write else Path(folder) / 'converted.py'
            record = worker.examine(name, args.forward, written, args.timeout)
            file.write(json.dumps(record) + '\n')
            file.flush()
            print(f'{i + 1}/{len(todo)} {name}: {record["outcome"]} {record["reason"][:80]}')
    worker.stop()
    if args.report:
        records = {n: r for n, r in read(out).items() if n in set(names)}
        write_report(Path(args.report), report(records, len(names)))


RAN = {'whole': 'whole', 'features': 'backbone and neck', '': 'nothing at all'}
BEGIN = '<!-- from here on written by tools/dev/sweep_upstream.py --report -->'
END = '<!-- up to here -->'


def write_report(path: Path, tables: str) -> None:
    """Replaces what stands between the two marks of a file, or writes a new file.

    Raises:
        SystemExit: the file is there and lacks the marks.
    """
    text = path.read_text() if path.is_file() else f'{BEGIN}\n{END}\n'
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f'error: {path} has no lines {BEGIN!r} and {END!r} to write between')
    path.write_text(f'{before}{BEGIN}\n\n{tables}\n{END}{after}')


def report(records: dict[str, dict], total: int) -> str:
    """The tables, in Markdown."""
    from sweep import DONE, OUTCOMES

    converted = [r for r in records.values() if r['outcome'] in DONE]
    lines = [
        '| | configs | ' + ' | '.join(OUTCOMES) + ' | with a conv network | converted |',
        '|---|--:|' + '--:|' * (len(OUTCOMES) + 2),
    ]
    for package in sorted({name.partition('::')[0] for name in records}):
        lines.append(_row(package, [r for n, r in records.items() if n.startswith(package)]))
    lines += [_row('all', list(records.values())), '', *_state(records, converted, total)]
    lines += ['', '## Why', '', '| package | outcome | reason | configs |', '|---|---|---|--:|']
    why = Counter(
        (n.partition('::')[0], r['outcome'], _cell(r['reason']))
        for n, r in records.items()
        if r['outcome'] != 'converted'
    )
    lines += [f'| {p} | {o} | {w} | {n} |' for (p, o, w), n in sorted(why.items())]
    lines += ['', '## What converted configs keep', '', '| reason | configs |', '|---|--:|']
    kept = Counter(t for r in converted for t in {_kept(text) for text in r['left']})
    lines += [f'| {text} | {n} |' for text, n in kept.most_common()]
    lines += [
        '',
        '## By family',
        '',
        '| family | configs | ' + ' | '.join(OUTCOMES) + ' |',
        '|---|--:|' + '--:|' * len(OUTCOMES),
    ]
    families = defaultdict(list)
    for name, record in records.items():
        families[name.rpartition('/')[0]].append(record)
    for family, members in sorted(families.items()):
        count = Counter(r['outcome'] for r in members)
        cells = ' | '.join(str(count[o] or '') for o in OUTCOMES)
        lines.append(f'| {family} | {len(members)} | {cells} |')
    lines += _not_clean(converted) + _not_whole(converted) + _others(records)
    return '\n'.join(lines) + '\n'


def _state(records: dict[str, dict], converted: list[dict], total: int) -> list[str]:
    """What was done, and what was not."""
    import platform

    import torch

    run, read_back = _runs(converted), sum(r.get('read_back', False) for r in converted)
    sizes = Counter((r['forward'], r['size']) for r in run if r['forward'])
    kinds = [f'{n} {RAN[kind]} at {size}x{size}' for (kind, size), n in sizes.most_common()]
    kinds.append(f'{len(run) - sum(sizes.values())} did not run')
    return [
        f'- Converted, built and audited: {len(records)} of {total} configs; audit clean on '
        f'{sum(r["clean"] for r in converted)} of the {len(converted)} that were converted.',
        f'- Written and read back: {read_back} of them; always the same config (one that is not '
        'would count as failed).',
        f'- Different networks: {len({r["model"] for r in converted})}. Run once, in training mode '
        f'on the CPU: {len(run)}: {", ".join(kinds)}.',
        '- WS convolutions that these runs saw without a norm behind them: '
        f'{sum(len(r["bare"]) for r in run)}.',
        f'- Python {platform.python_version()}, torch {torch.__version__}.',
    ]


def _runs(converted: list[dict]) -> list[dict]:
    """One record of each network that was run, the one where most of it did."""
    run = [r for r in converted if 'forward' in r]
    run.sort(key=lambda r: list(RAN).index(r['forward']), reverse=True)
    return list({r['model']: r for r in run}.values())


def _not_clean(converted: list[dict]) -> list[str]:
    rows = [(r['config'], f) for r in converted if not r['clean'] for f in r['findings']]
    rows = [f'| {name} | {_cell(f)} |' for name, f in rows if not f.startswith('note')]
    title = '## What the audit finds in converted configs'
    return ['', title, '', '| config | finding |', '|---|---|', *rows] if rows else []


def _not_whole(converted: list[dict]) -> list[str]:
    """Beside each reason what of the original runs: where it is more, the defect is ours."""
    rows = Counter(
        (RAN[r['forward']], RAN[r['original']], _cell(r['why']))
        for r in _runs(converted)
        if r['forward'] != 'whole'
    )
    title = '## Networks that did not run whole'
    head = [
        '',
        title,
        '',
        '| what ran | of the original | why not the whole | networks |',
        '|---|---|---|--:|',
    ]
    rows = [f'| {ran} | {original} | {why} | {n} |' for (ran, original, why), n in rows.items()]
    return head + sorted(rows) if rows else []


def _others(records: dict[str, dict]) -> list[str]:
    """Every config that is not simply converted, by name."""
    lines = ['', '## The configs that are not simply converted', '']
    outcomes = defaultdict(list)
    for name, record in sorted(records.items()):
        if record['outcome'] != 'converted':
            outcomes[record['outcome']].append(name)
    for outcome, names in outcomes.items():
        lines += [
            '<details>',
            f'<summary>{outcome}: {len(names)}</summary>',
            '',
            *(f'- `{name}`' for name in names),
            '',
            '</details>',
        ]
    return lines


def _row(name: str, records: list[dict]) -> str:
    from sweep import DONE, OUTCOMES

    count = Counter(r['outcome'] for r in records)
    done = sum(count[outcome] for outcome in DONE)
    having = done + count['refused'] + count['failed']
    cells = ' | '.join(str(count[outcome]) for outcome in OUTCOMES)
    share = f'{100 * done / having:.1f} %' if having else ''
    return f'| {name} | {len(records)} | {cells} | {having} | {share} |'


def _kept(text: str) -> str:
    reason = text.partition(': ')[2]
    if 'also reaches' in reason:
        return 'a conv_cfg that also reaches convolutions without a norm: plain ones stay'
    return _cell(reason)


def _cell(text: str) -> str:
    text = re.sub(r'/[^\s\'"]*/site-packages/', '', text)  # nobody else's paths
    return text.replace('|', '\\|')[:160]


if __name__ == '__main__':
    main()
