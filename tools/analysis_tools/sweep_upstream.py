"""Converts every config that the installed mmdet and mmseg ship, and tabulates what comes of it.

Each config is converted, built, audited, written and read back; with --forward, one config of every
different network also runs once. Results go to a file of JSON lines as they come: run it again to
go on where it stopped.
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
    parser.add_argument('--again', nargs='*', default=[], help='repeat configs of these outcomes')
    parser.add_argument('--report', help='write the table to this Markdown file')
    return parser.parse_args()


def read(path: Path) -> dict[str, dict]:
    """Records by config; a line that was cut off by a kill is passed over, later ones win."""
    records = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record['config']] = record
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
    done = {r['model'] for r in records.values() if 'forward' in r}
    first = {}
    for name in names:
        model = records.get(name, {}).get('model')
        if model is not None and model not in done:
            first.setdefault(model, name)
    return list(first.values())


def main() -> None:
    """Sweeps, then writes the table where asked."""
    args = parse_args()
    from wsbcn_mm.openmmlab.sweep import Worker, upstream_configs

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
        Path(args.report).write_text(report(records, len(names)))


def report(records: dict[str, dict], total: int) -> str:
    """The table, in Markdown."""
    from wsbcn_mm.openmmlab.sweep import OUTCOMES

    lines = [INTRODUCTION.format(done=len(records), total=total)]
    lines += ['| | configs | ' + ' | '.join(OUTCOMES) + ' | with a conv network | converted |',
              '|---|--:|' + '--:|' * (len(OUTCOMES) + 2)]  # fmt: skip
    for package in sorted({name.partition('::')[0] for name in records}):
        lines.append(_row(package, [r for n, r in records.items() if n.startswith(package)]))
    lines.append(_row('all', list(records.values())))
    converted = [r for r in records.values() if r['outcome'] in ('converted', 'without WS')]
    run = {r['model']: r for r in converted if 'forward' in r}
    kinds = Counter(
        {'whole': 'whole network', 'features': 'backbone and neck'}.get(r['forward'], 'not run')
        for r in run.values()
    )
    models = {r['model'] for r in converted}
    lines += [
        '',
        f'- Audit clean on {sum(r["clean"] for r in converted)} of {len(converted)} converted.',
        f'- Networks: {len(models)} different ones; run once at 64x64, in training mode: '
        + (', '.join(f'{n} {kind}' for kind, n in kinds.most_common()) or 'none') + '.',
        f'- WS convolutions that the runs saw without a norm behind them: '
        f'{sum(len(r["bare"]) for r in run.values()) if run else "not looked at"}.',
        f'- Written and read back, {sum(r["read_back"] for r in converted)} of them: always the '
        'same config (one that is not would count as failed).',
        '', '## Why', '',
        '| package | outcome | reason | configs |', '|---|---|---|--:|',
    ]  # fmt: skip
    why = Counter(
        (n.partition('::')[0], r['outcome'], _short(r)) for n, r in records.items()
        if r['outcome'] != 'converted'
    )  # fmt: skip
    lines += [f'| {p} | {o} | {w} | {n} |' for (p, o, w), n in sorted(why.items())]
    lines += ['', '## What converted configs keep', '', '| reason | configs |', '|---|--:|']
    kept = Counter(t for r in converted for t in {_kept(text) for text in r['left']})
    lines += [f'| {text} | {n} |' for text, n in kept.most_common()]
    lines += ['', '## By family', '',
              '| family | configs | ' + ' | '.join(OUTCOMES) + ' |',
              '|---|--:|' + '--:|' * len(OUTCOMES)]  # fmt: skip
    families = defaultdict(list)
    for name, record in records.items():
        families[name.rpartition('/')[0]].append(record)
    for family, members in sorted(families.items()):
        count = Counter(r['outcome'] for r in members)
        cells = ' | '.join(str(count[o] or '') for o in OUTCOMES)
        lines.append(f'| {family} | {len(members)} | {cells} |')
    failed = [r for r in run.values() if r['forward'] not in ('whole', 'features')]
    if failed:
        lines += ['', '## Not run', '', '| config | why |', '|---|---|']
        lines += [f'| {r["config"]} | {_cell(r["forward"])} |' for r in failed]
    return '\n'.join(lines) + '\n'


INTRODUCTION = """\
# Compatibility: what becomes of every upstream config

`tools/analysis_tools/sweep_upstream.py` takes every config that the installed mmdet 3.3.0 and
mmsegmentation 1.2.2 ship outside of `_base_`, converts it
(`tools/model_converters/convert_config.py`), builds the converted model and audits it; most were
also written and read back. {done} of {total} configs are in this table.

- **converted**: BN, SyncBN and GN are BCN, the convolutions before them WSConv2d.
- **without WS**: parts with deformable convolutions: the converter refuses them with a clear error
  (the host asserts that `dcn` and `conv_cfg` exclude each other) and converts with `--conv none`.
- **nothing to convert**: no BN, SyncBN or GN behind a convolution (transformers, VGG with L2 norm).
- **refused**: a clear error says why.
- **needs**: the *original* cannot be built here: a package, a file or a download is missing.
- **failed**: a defect of ours.

*With a conv network* are those that could be built and hold such a norm; *converted* is the share
of them that the converter turns into one that builds, `without WS` included.
"""


def _row(name: str, records: list[dict]) -> str:
    count = Counter(r['outcome'] for r in records)
    done = count['converted'] + count['without WS']
    having = done + count['refused'] + count['failed']
    cells = ' | '.join(str(count[outcome]) for outcome in _outcomes())
    share = f'{100 * done / having:.1f} %' if having else ''
    return f'| {name} | {len(records)} | {cells} | {having} | {share} |'


def _outcomes() -> tuple[str, ...]:
    from wsbcn_mm.openmmlab.sweep import OUTCOMES

    return OUTCOMES


def _short(record: dict) -> str:
    return _cell(record['reason'])


def _kept(text: str) -> str:
    part, _, reason = text.partition(': ')
    if 'also reaches' in reason:
        return 'a conv_cfg that also reaches convolutions without a norm: plain ones stay'
    return _cell(reason)


def _cell(text: str) -> str:
    text = re.sub(r'/[^\s\'"]*/site-packages/', '', text)  # nobody else's paths
    return text.replace('|', '\\|')[:160]


if __name__ == '__main__':
    main()
