"""The tables of the sweep, in Markdown, from its records."""

import platform
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from sweep import OUTCOMES
from trial import OK, STAGES

END = '<!-- up to here -->'


def begin_of(packages: list[str]) -> str:
    """The mark in front of the tables of these packages: a page may have several."""
    command = f'tools/dev/sweep_upstream.py --packages {" ".join(packages)} --report'
    return f'<!-- from here on written by {command} -->'


def write_report(path: Path, tables: str, packages: list[str]) -> None:
    """Replaces what stands between the two marks of a file, or writes a new file.

    Raises:
        SystemExit: the file is there and lacks the marks.
    """
    mark = begin_of(packages)
    text = path.read_text() if path.is_file() else f'{mark}\n{END}\n'
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f'error: {path} has no lines {mark!r} and {END!r} to write between')
    path.write_text(f'{before}{mark}\n\n{tables}\n{END}{after}')


def report(records: dict[str, dict], total: int, stand_for: int | None = None) -> str:
    """The tables, in Markdown.

    Args:
        records: By config.
        total: How many configs were asked for.
        stand_for: How many of them have the network of a record; those of records, if None.
    """
    stand_for = len(records) if stand_for is None else stand_for
    converted = [r for r in records.values() if r['outcome'] == 'converted']
    lines = [
        '| | configs | ' + ' | '.join(OUTCOMES) + ' | with a conv network | converted |',
        '|---|--:|' + '--:|' * (len(OUTCOMES) + 2),
    ]
    for package in sorted({name.partition('::')[0] for name in records}):
        lines.append(_row(package, [r for n, r in records.items() if n.startswith(package)]))
    lines += [
        _row('all', list(records.values())),
        '',
        *_state(records, converted, total, stand_for),
    ]
    lines += ['', '### Why', '', '| package | outcome | reason | configs |', '|---|---|---|--:|']
    why = Counter(
        (n.partition('::')[0], r['outcome'], _cell(r['reason']))
        for n, r in records.items()
        if r['outcome'] != 'converted'
    )
    lines += [f'| {p} | {o} | {w} | {n} |' for (p, o, w), n in sorted(why.items())]
    lines += ['', '### What converted configs keep', '', '| reason | configs |', '|---|--:|']
    kept = Counter(t for r in converted for t in {_kept(text) for text in r['left']})
    lines += [f'| {text} | {n} |' for text, n in kept.most_common()]
    lines += [
        '',
        '### By family',
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


def _state(
    records: dict[str, dict], converted: list[dict], total: int, stand_for: int
) -> list[str]:
    """What was done, and what was not."""
    run, read_back = _runs(converted), sum(r.get('read_back', False) for r in converted)
    sizes = Counter(r['converted']['size'] for r in run if r['converted']['evaluated'] == OK)
    kinds = ', '.join(f'{n} at {size}x{size}' for size, n in sizes.most_common())
    return [
        f'- Converted, built and audited: {len(records)} configs, which stand for {stand_for} of '
        f'{total}; audit clean on '
        f'{sum(r["clean"] for r in converted)} of the {len(converted)} that were converted.',
        f'- Written and read back: {read_back} of them; always the same config (one that is not '
        'would count as failed).',
        f'- Different networks: {len({r["network"] for r in converted})}. Initialised, trained a '
        f'step and evaluated on the CPU, as shipped with two images in a step, converted with one '
        f'(two where a BatchNorm stays, behind linear layers): {len(run)}; all the way converted: '
        f'{kinds or "none"}.',
        '- WS convolutions that these steps saw without a norm behind them: '
        f'{sum(len(r["converted"]["without_norm"]) for r in run)}.',
        f'- Python {platform.python_version()}, torch {torch.__version__}.',
        '',
        *_stages(run),
    ]


def _stages(run: list[dict]) -> list[str]:
    """How many networks got through each stage, as shipped and converted."""
    lines = [
        f'| networks | {" | ".join(f"{stage}" for stage in STAGES)} |',
        '|---|' + '--:|' * len(STAGES),
    ]
    for kind, label in (('original', 'as shipped'), ('converted', 'converted')):
        counts = [sum(r[kind][stage] == OK for r in run) for stage in STAGES]
        lines.append(f'| {label} | {" | ".join(map(str, counts))} |')
    ours = sum(not as_far(r) for r in run)
    return [*lines, '', f'Networks that get less far converted than as shipped: {ours}.']


def got_through(trial: dict) -> bool:
    """Whether a network passed all stages."""
    return all(trial[stage] == OK for stage in STAGES)


def as_far(record: dict) -> bool:
    """Whether a converted network passes what it passes as shipped; if not, that is ours."""
    return all(
        record['converted'][stage] == OK for stage in STAGES if record['original'][stage] == OK
    )


def _runs(converted: list[dict]) -> list[dict]:
    """One record of each network that was tried."""
    return list({r['network']: r for r in converted if 'converted' in r}.values())


def _not_clean(converted: list[dict]) -> list[str]:
    found = [(r['config'], f) for r in converted if not r['clean'] for f in r['findings']]
    rows = [f'| {name} | {_cell(f)} |' for name, f in found if not f.startswith('note')]
    title = '### What the audit finds in converted configs'
    return ['', title, '', '| config | finding |', '|---|---|', *rows] if rows else []


def _not_whole(converted: list[dict]) -> list[str]:
    """Beside each reason what the original does: where it gets further, the defect is ours."""
    rows = Counter(
        (_failure(r['converted']), _failure(r['original']))
        for r in _runs(converted)
        if not (got_through(r['converted']) and got_through(r['original']))
    )
    if not rows:
        return []
    title = '### Networks that did not get through'
    head = ['', title, '', '| converted | as shipped | networks |']
    lines = [f'| {converted} | {original} | {n} |' for (converted, original), n in rows.items()]
    return [*head, '|---|---|--:|', *sorted(lines)]


def _failure(trial: dict) -> str:
    """The stage at which a network stopped, and why."""
    for stage in STAGES:
        if trial[stage] != OK:
            return f'not {stage}: {_cell(trial[stage])}'
    return 'gets through'


def _others(records: dict[str, dict]) -> list[str]:
    """Every config that is not simply converted, by name."""
    lines = ['', '### The configs that are not simply converted', '']
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
    count = Counter(r['outcome'] for r in records)
    done = count['converted']
    having = done + count['failed']
    cells = ' | '.join(str(count[outcome]) for outcome in OUTCOMES)
    share = f'{100 * done / having:.1f} %' if having else ''
    return f'| {name} | {len(records)} | {cells} | {having} | {share} |'


def _kept(text: str) -> str:
    """The reason, without the part that it is about."""
    return _cell(text.partition(': ')[2])


def _cell(text: str) -> str:
    text = re.sub(r'/[^\s\'"]*/site-packages/', '', text)  # nobody else's paths
    return text.replace('|', '\\|')[:160]
