"""Times the layers against their peers: host time, a ResNet-50, a Mask R-CNN, WS, norms.

Before any timing the layers are checked against the specification in float64; if they are wrong,
no speed is printed and the exit status is 1. It is 1 as well where a section failed. Tables go to
stdout, progress to stderr, and results.json and charts to a folder.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / 'tools'), str(REPOSITORY)]  # also from a clone not installed

import torch  # noqa: E402

from benchmark import (  # noqa: E402
    bars,
    detectors,
    gate,
    host_time,
    output,
    sections,
    whole,
)
from benchmark.settings import Settings, Skipped, show_progress  # noqa: E402
from wsbcn_mm import __version__, backends  # noqa: E402

SECTIONS = {
    'host': host_time.host,
    'backbone': sections.backbone,
    'detector': detectors.detector,
    'ws': sections.ws,
    'norm': sections.norm,
    'whole': whole.whole,
}
"""In the order in which they run."""
SHOWN_FAILURES = 20
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='default: cuda if there is one')
    parser.add_argument(
        '--dtype', nargs='+', choices=list(DTYPES), help='default: float32; on CUDA all three'
    )
    parser.add_argument(
        '--layout', nargs='+', choices=list(gate.LAYOUTS), help='default: nchw; on CUDA both'
    )
    parser.add_argument('--threads', type=int, help='CPU threads; default: what torch chooses')
    parser.add_argument('--repeats', type=int, help='rounds over all peers; default: 15')
    parser.add_argument(
        '--only', nargs='+', choices=list(SECTIONS), default=SECTIONS, help='sections; default: all'
    )
    parser.add_argument(
        '--seconds', type=float, help='begin nothing more after so many; default: no limit'
    )
    parser.add_argument(
        '--quick', action='store_true', help='tiny shapes, one round: shows that it runs, no more'
    )
    parser.add_argument(
        '-o',
        '--output',
        type=Path,
        default=Path('work_dirs/benchmark_layers'),
        help='folder of results.json and the charts; default: %(default)s',
    )
    args = parser.parse_args(arguments)
    if args.device is None:
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no CUDA device here')
    everything = args.device == 'cuda' and not args.quick
    args.dtype = args.dtype or (list(DTYPES) if everything else ['float32'])
    args.layout = args.layout or (list(gate.LAYOUTS) if everything else ['nchw'])
    args.repeats = args.repeats or (1 if args.quick else 15)
    return args


def describe_machine(device: torch.device) -> dict:
    """What the numbers depend on."""
    return dict(
        device=device.type,
        name=torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name(),
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        wsbcn_mm=__version__,
        backend=backends.select(torch.empty(1, device=device)),
        backends=backends.report().splitlines()[1:],
    )


def cpu_name() -> str:
    """The CPU's model name, as far as the system tells."""
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def print_machine(results: dict) -> None:
    """The first lines of the output."""
    machine = results['machine']
    print(
        f'{machine["name"]}, {machine["cores"]} cores, {machine["threads"]} threads, '
        f'torch {machine["torch"]}, {results["date"]}, backend {machine["backend"]}'
    )
    print('\n'.join(f'  {line}' for line in machine['backends']))
    print(f'  {results["command"]}')


def main(arguments: list[str] | None = None) -> None:
    """Checks, times, prints and writes."""
    start = time.monotonic()
    args = parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    settings = Settings(
        device, [DTYPES[name] for name in args.dtype], args.layout, args.repeats, args.quick
    )
    if args.seconds is not None:
        settings.end = start + args.seconds
    given = sys.argv[1:] if arguments is None else arguments
    results: dict[str, Any] = dict(
        command=shlex.join(['python', 'tools/benchmark/benchmark_layers.py', *given]),
        date=time.strftime('%Y-%m-%d %H:%M:%S %z'),
        machine=describe_machine(device),
        settings=dict(
            dtypes=args.dtype, layouts=args.layout, repeats=args.repeats, quick=args.quick
        ),
    )
    print_machine(results)

    show_progress('checks the layers against the specification')
    checked = gate.run(device, settings.dtypes, settings.layouts, args.quick)
    if checked.failures:
        print(f'\nWRONG: {len(checked.failures)} of {checked.count} results; nothing was timed')
        print('\n'.join(f'  {line}' for line in checked.failures[:SHOWN_FAILURES]))
        sys.exit(1)
    results['gate'] = dict(results=checked.count, worst_share_of_allowed_error=checked.worst)
    print(
        f'\nCorrect: {checked.count} results against the specification in float64, the largest '
        f'error is {checked.worst:.0%} of what is allowed.'
    )

    args.output.mkdir(parents=True, exist_ok=True)
    results['skipped'], results['failed'] = {}, {}
    ended = False
    for name in (name for name in SECTIONS if name in args.only):
        try:
            measure(name, settings, results, args.output)
        except Skipped as reason:
            results['skipped'][name] = str(reason)
            print(f'\nNot measured: {name}: {reason}')
        except Exception as error:  # noqa: BLE001  # the other sections do not depend on it
            traceback.print_exc()
            results['failed'][name] = f'{type(error).__name__}: {error}'
            print(f'\nFailed: {name}: {results["failed"][name]}')
        except Ended:
            ended = True
            results['failed'][name] = 'was ended'
            print(f'\nEnded: {name}')
        if results.get(name):
            show(getattr(output, name)(results[name]))
        write(results, args.output)
        if ended:
            break
    if settings.left_out:
        results['left_out'] = settings.left_out
        print(f'\nNo time was left for {", ".join(settings.left_out)}')
    results['bars'] = bars.check(results)
    show(output.bars(results['bars']))
    write(results, args.output)
    print(f'\n{args.output / "results.json"}')
    try:
        print('\n'.join(map(str, output.draw(results, args.output))))
    except ImportError as error:
        print(f'no charts: {error}')
    if results['failed']:
        sys.exit(1)


class Ended(BaseException):
    """Somebody asked the process to end."""


def _end(*_: object) -> None:
    raise Ended


def measure(name: str, settings: Settings, results: dict, folder: Path) -> None:
    """Runs a section; what it has measured survives, by row, if the rest does not."""
    found = SECTIONS[name](settings)
    if isinstance(found, dict):
        results[name] = found
        return
    results[name] = []
    for row in found:
        results[name].append(row)
        write(results, folder)


def show(lines: output.Lines) -> None:
    """Prints at once, also into a pipe."""
    print('\n'.join(lines), flush=True)


def write(results: dict, folder: Path) -> None:
    """results.json."""
    (folder / 'results.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, _end)
    main()
