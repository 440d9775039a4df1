"""Converts every config that the installed hosts ship, and tabulates what comes of it.

Each config is converted, built, audited, written and read back; with --run, the first config of
every different network is also built, initialised, trained a step and evaluated, as shipped and
converted. The first config of each folder comes first. With --networks, one config alone of those
that are shipped with the same network is looked at: it stands for the others, which differ in data
or schedule. Results go to a file of JSON lines as they come: run it again to go on where it
stopped. The tables go between two marks of a Markdown file; what stands around them stays.
"""

import argparse
import functools
import importlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


# A package of a config's scope each.
HOSTS = ['mmdet', 'mmseg', 'mmpretrain', 'mmaction']


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-o', '--out', default='work_dirs/sweep.jsonl', help='JSON lines')
    parser.add_argument('--packages', nargs='+', default=HOSTS)
    parser.add_argument(
        '--run',
        action='store_true',
        help='initialise, train a step and evaluate every different network',
    )
    parser.add_argument(
        '--networks',
        action='store_true',
        help='one config of every different network alone',
    )
    parser.add_argument('--configs', nargs='+', default=[], help='these alone')
    parser.add_argument('--no-write', action='store_true', help='do not write and read back')
    parser.add_argument('--match', default='', help='only configs with this in their name')
    parser.add_argument('--timeout', type=float, default=120, help='seconds per config')
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after so many')
    parser.add_argument(
        '--again',
        nargs='*',
        default=[],
        help='repeat configs of these outcomes; with --run "not whole": what did not get through',
    )
    parser.add_argument(
        '--report', help='Markdown file: writes the tables between the two marks for the packages'
    )
    return parser.parse_args()


def read(path: Path) -> dict[str, dict]:
    """Records by config; a line that was cut off by a kill is passed over, later ones add to it."""
    records: dict[str, dict] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records.setdefault(record['config'], {}).update(record)
    return records


def family_by_family(names: list[str]) -> list[str]:
    """The first of each folder, then the second of each: a part of the sweep has seen them all."""
    seen: Counter[str] = Counter()
    rank = {}
    for name in names:
        folder = name.rpartition('/')[0]
        rank[name] = seen[folder]
        seen[folder] += 1
    return sorted(names, key=lambda name: rank[name])


def jobs(
    records: dict[str, dict], names: list[str], run: bool, again: list[str]
) -> Iterator[tuple[str, bool]]:
    """What is still to be done: configs, and whether to run their network.

    With ``run`` a config of a network that was not tried comes twice: the first time shows which
    network it has.

    Args:
        records: What is known by config; what comes of a job is looked up there before the next.
        names: The configs.
        run: Also the networks.
        again: See the command line.
    """
    from sweep_report import got_through

    tried = {
        r['network']
        for r in records.values()
        if 'converted' in r and ('not whole' not in again or got_through(r['converted']))
    }
    for name in names:
        if name not in records or records[name]['outcome'] in again:
            yield name, False
        network = records.get(name, {}).get('network')
        if run and network is not None and network not in tried:
            tried.add(network)
            yield name, True


def represented(names: list[str]) -> dict[str, str]:
    """Which config stands for each: the first whose network, as shipped, is the same.

    A config that cannot be read stands for itself.
    """
    from mmengine.config import Config
    from networks import network_of

    from wsbcn_mm.openmmlab.config import find_config

    # Every `_base_ = 'mmdet::...'` makes mmengine read a hundred metafiles again.
    utils: Any = importlib.import_module('mmengine.config.utils')
    utils.load = functools.cache(utils.load)
    first: dict[str, str] = {}
    result = {}
    for name in names:
        try:
            network = network_of(Config.fromfile(find_config(name)[0]))
        except Exception:  # noqa: BLE001  what is wrong with it, its examination says
            network = name
        result[name] = first.setdefault(network, name)
    return result


def main() -> None:
    """Sweeps, then writes the table where asked."""
    args = parse_args()
    from sweep import Worker, upstream_configs
    from sweep_report import report, write_report

    names = args.configs or [
        n for p in args.packages for n in upstream_configs(p) if args.match in n
    ]
    names = family_by_family(names)
    stands_for = represented(names) if args.networks else {name: name for name in names}
    names = list(dict.fromkeys(stands_for.values()))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    records = read(out)
    unseen = sum(name not in records for name in names)
    print(f'{len(names)} configs to stand for {len(stands_for)}, {unseen} not seen yet')
    todo = jobs(records, names, args.run, args.again)
    if args.networks and args.run:  # all at once
        todo = ((name, True) for name, _ in jobs(records, names, False, args.again))
    end, worker = time.monotonic() + args.seconds, Worker()
    with tempfile.TemporaryDirectory() as folder, out.open('a') as file:
        if out.stat().st_size and not out.read_bytes().endswith(b'\n'):
            file.write('\n')
        for name, run in todo:
            if time.monotonic() > end:
                print(f'stopped after {args.seconds:.0f} s: run again to go on')
                break
            written = (
                None
                if (run and not args.networks) or args.no_write
                else Path(folder) / 'converted.py'
            )
            record = worker.examine(name, run, written, args.timeout)
            records.setdefault(name, {}).update(record)
            file.write(json.dumps(record) + '\n')
            file.flush()
            what = 'run, ' if run else ''
            print(f'{name}: {what}{record["outcome"]} {record["reason"][:80]}', flush=True)
    worker.stop()
    if args.report:
        known = {n: r for n, r in records.items() if n in set(names)}
        stand_for = sum(name in known for name in stands_for.values())
        tables = report(known, len(stands_for), stand_for)
        write_report(Path(args.report), tables, args.packages)


if __name__ == '__main__':
    main()
