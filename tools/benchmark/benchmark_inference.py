"""Times inference: a model with WS + BCN as trained, folded, as ONNX, and its peers with BN and GN.

Each CONFIG's network on one image: a detector's backbone and neck, a segmenter whole, without what
comes before and after. The weights are random; a folded model must agree with its original before
anything is timed. Tables go to stdout, results.json and a chart to a folder.
"""

import argparse
import copy
import json
import multiprocessing
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / 'tools'), str(REPOSITORY)]  # also from a clone not installed

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmark import output, timing  # noqa: E402
from benchmark.benchmark_layers import describe_machine  # noqa: E402

CONFIGS = {
    'configs/mask_rcnn/mask-rcnn_r50_fpn_ws-bcn_8xb1-scratch-6x_coco.py': (512, 512),
    'configs/deeplabv3/deeplabv3_r50_ws-bcn_16xb1-50e_voc12aug-513x513.py': (513, 513),
}
BASE = 'conv + GN'
# Names of norm and convolution; None: as the config has them.
VARIANTS: dict[str, tuple[str, str] | None] = {
    'WS + BCN': None,
    'WS + BCN, folded': None,
    'WS + BCN, folded, onnxruntime': None,
    BASE: ('GN', 'Conv2d'),
    'mmcv ConvWS + GN': ('GN', 'ConvWS'),
    'conv + BN, fused': ('BN', 'Conv2d'),
}
BAR = 1.02  # folded against the same network with plain convolutions and GroupNorm


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'configs',
        nargs='*',
        metavar='CONFIG',
        help='default: Mask R-CNN R50-FPN at 512x512 and DeepLabV3 R50 at 513x513',
    )
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='of all images')
    parser.add_argument('--threads', type=int, help='CPU threads; default: what torch chooses')
    parser.add_argument('--repeats', type=int, default=15, help='rounds; default: %(default)s')
    parser.add_argument(
        '--cpu-time',
        action='store_true',
        help='time of the process instead of time that passes: on a busy machine, with --threads 1',
    )
    parser.add_argument('--no-memory', action='store_true', help='do not measure peak memory')
    parser.add_argument(
        '-o',
        '--output',
        type=Path,
        default=Path('work_dirs/benchmark_inference'),
        help='folder of results.json and the chart; default: %(default)s',
    )
    return parser.parse_args(arguments)


def replace_layers(part: object, norm: str, conv: str) -> None:
    """Sets norm_cfg and conv_cfg wherever a model's config has BCN; the number of groups stays."""
    if isinstance(part, dict):
        norm_cfg = part.get('norm_cfg') or {}
        if norm_cfg.get('type', '').startswith('BCN'):
            groups = dict(num_groups=norm_cfg.get('num_groups', 32)) if norm == 'GN' else {}
            part['norm_cfg'] = dict(type=norm, **groups)
            part['conv_cfg'] = dict(type=conv)
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for item in part:
            replace_layers(item, norm, conv)


class Network(nn.Module):
    """The part of a model that is timed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # a host's: its methods are its own

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if hasattr(self.model, 'decode_head'):
            return (self.model._forward(image),)
        return tuple(self.model.extract_feat(image))


def build(config: str, variant: str, shape: tuple[int, int]) -> tuple[nn.Module, torch.Tensor]:
    """One variant (onnxruntime: what is exported) and its input."""
    from mmcv.cnn import fuse_conv_bn
    from mmengine.logging import MMLogger

    from wsbcn_mm import fold
    from wsbcn_mm.openmmlab.config import load_config
    from wsbcn_mm.openmmlab.deploy import inference, settings

    MMLogger.get_current_instance().setLevel('WARNING')  # it writes to stdout
    cfg = load_config(config)
    names = VARIANTS[variant]
    if names is not None:
        replace_layers(cfg.model, *names)
    torch.manual_seed(0)
    settings.drop_pretrained(cfg.model)
    model: Any = inference.build_model(cfg)
    model.init_weights()  # as a training begins: torch's own start is ill-conditioned
    network: nn.Module = Network(model).requires_grad_(False)
    network.eval()
    image = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    if 'folded' in variant:
        folded = fold(network, image)
        error = double_error(network, image[..., : shape[0] // 2, : shape[1] // 2])
        if not error <= 1e-10:
            sys.exit(f'WRONG: {config}: folded differs by {error:.2g}; nothing was timed')
        network = folded
    if 'fused' in variant:
        network = fuse_conv_bn(network)
    return network, image


def double_error(network: nn.Module, image: torch.Tensor) -> float:
    """Largest relative error of folding in float64."""
    from wsbcn_mm import fold

    original, image = copy.deepcopy(network).double(), image.double()
    pairs = zip(fold(original, image)(image), original(image))
    return max(((got - want).abs().max() / want.abs().max()).item() for got, want in pairs)


def caller(
    variant: str, network: nn.Module, image: torch.Tensor, file: Path
) -> Callable[[], object]:
    """What is timed. Exports to the file where onnxruntime is asked for."""
    if 'onnxruntime' not in variant:

        def run() -> object:
            with torch.no_grad():
                return network(image)

        return run
    from wsbcn_mm.openmmlab.deploy import onnx
    from wsbcn_mm.openmmlab.deploy.parts import Part

    with torch.no_grad():
        names = [f'output_{i}' for i in range(len(network(image)))]
    part = Part('image', network, image, names)
    if not file.exists():
        onnx.export_part(part, file)
        onnx.check_graph(file)
        onnx.check_results(part, file)
    session, array = onnx.onnxruntime_session(file), image.numpy()
    return lambda: session.run(None, {'image': array})


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    text = Path('/proc/self/status').read_text()
    found = re.search(rf'^{field}:\s+(\d+) kB', text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak_memory(file: Path, shape: tuple[int, int], threads: int) -> int | None:
    """Bytes that two passes take at most in a process of their own, weights included; Linux only.

    Args:
        file: An ONNX file, or a network as torch.save wrote it.
        shape: Of the image.
        threads: Of the pass.
    """
    if not Path('/proc/self/clear_refs').exists():
        return None
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_peak_memory, (file, shape, threads))


def _peak_memory(file: Path, shape: tuple[int, int], threads: int) -> int:
    import mmdet.models  # noqa: F401  what a network needs is loaded before anything counts
    import mmseg.models  # noqa: F401

    from wsbcn_mm.openmmlab.deploy.onnx import onnxruntime_session

    torch.set_num_threads(threads)
    image = torch.randn(1, 3, *shape)
    before = _status('VmRSS')
    if file.suffix == '.onnx':
        session, array = onnxruntime_session(file), image.numpy()
        run = lambda: session.run(None, {'image': array})  # noqa: E731
    else:
        network = torch.load(file, weights_only=False)  # written by this program
        run = lambda: network(image)  # noqa: E731
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts here
    with torch.no_grad():
        for _ in range(2):
            run()
    return _status('VmHWM') - before


def measure(config: str, shape: tuple[int, int], args: argparse.Namespace, folder: Path) -> dict:
    """Times and memory of all variants of one config."""
    cases, sizes = {}, {}
    file = folder / f'{Path(config).stem}.onnx'
    for variant in VARIANTS:
        print(f'{Path(config).stem}: builds {variant}', file=sys.stderr, flush=True)
        network, image = build(config, variant, shape)
        sizes[variant] = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        cases[variant] = timing.Case(caller(variant, network, image, file))
        if not args.no_memory and 'onnxruntime' not in variant:
            torch.save(network, folder / f'{list(VARIANTS).index(variant)}.pt')
    print(f'{Path(config).stem}: {args.repeats} rounds', file=sys.stderr, flush=True)
    times = timing.round_robin(
        cases, torch.device('cpu'), args.repeats, warm_up=1, cpu_time=args.cpu_time
    )
    timing.add_ratios(times, BASE)
    result = {name: dict(phases['forward'], weights=sizes[name]) for name, phases in times.items()}
    for found in result.values():
        found['fastest_ms'] = min(found['samples_ms'])
    cases.clear()
    if not args.no_memory:
        for variant in VARIANTS:
            print(f'{Path(config).stem}: memory of {variant}', file=sys.stderr, flush=True)
            saved = folder / f'{list(VARIANTS).index(variant)}.pt'
            saved = file if 'onnxruntime' in variant else saved
            result[variant]['peak'] = peak_memory(saved, shape, torch.get_num_threads())
    unfolded = zip(result['WS + BCN, folded']['samples_ms'], result['WS + BCN']['samples_ms'])
    return dict(
        config=config,
        size=list(shape),
        variants=result,
        cpu_time=args.cpu_time,
        folded_over_unfolded=statistics.median(a / b for a, b in unfolded),
    )


def show(row: dict) -> None:
    """A table."""
    height, width = row['size']
    kind = ', CPU time' if row['cpu_time'] else ''
    print(f'\n## {Path(row["config"]).stem}, 1 image of {height}x{width}, float32{kind}\n')
    lines = [
        [
            name,
            f'{v["ms"]:.4g} ±{v["iqr_ms"]:.2g}',
            f'{v["fastest_ms"]:.4g}',
            f'{v["ratio"]:.3f}',
            f'{v["weights"] / 2**20:.0f}',
            f'{v["peak"] / 2**20:.0f}' if v.get('peak') else '-',
        ]
        for name, v in row['variants'].items()
    ]
    header = ['', 'ms ±IQR', 'fastest ms', f'ratio to {BASE}', 'weights MB', 'peak MB']
    print(output.table(header, lines))
    folded = row['variants']['WS + BCN, folded']['ratio']
    print(
        f'\nFolded / {BASE}: {folded:.3f} (bar: {BAR}, {"met" if folded <= BAR else "MISSED"}). '
        f'Folded / unfolded: {row["folded_over_unfolded"]:.3f}.',
        flush=True,
    )


def draw(results: dict, file: Path) -> None:
    """Bars of the medians, a panel per config."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    rows = results['rows']
    figure, axes = plt.subplots(
        1, len(rows), squeeze=False, layout='constrained', figsize=(1 + 5.5 * len(rows), 3.2)
    )
    for axis, row in zip(axes[0], rows):
        names = list(row['variants'])
        values = [row['variants'][name]['ms'] for name in names]
        colours = ['tab:red' if 'BCN' in name else 'tab:gray' for name in names]
        axis.barh(range(len(names)), values, color=colours, height=0.7)
        for y, name in enumerate(names):
            found = row['variants'][name]
            text = f' {found["ms"]:.0f} ms, x{found["ratio"]:.2f}'
            axis.text(found['ms'], y, text, va='center', fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlim(0, 1.35 * max(values))
        axis.tick_params(labelsize=8)
        title = Path(row['config']).stem.partition('_ws-bcn')[0]
        axis.set_title(f'{title}, 1 image of {row["size"][0]}x{row["size"][1]}', fontsize=9)
        kind = 'ms of CPU time' if row['cpu_time'] else 'ms'
        axis.set_xlabel(f'median {kind} per image; x: multiple of {BASE}', fontsize=8)
    machine = results['machine']
    figure.suptitle(
        f'Inference, float32: {machine["name"]}, torch {machine["torch"]}, '
        f'{machine["threads"]} thread{"s" * (machine["threads"] > 1)}',
        fontsize=9,
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Builds, checks, times, prints and writes."""
    args = parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    configs = {c: CONFIGS.get(c, (512, 512)) for c in args.configs} or {
        str(REPOSITORY / name): shape for name, shape in CONFIGS.items()
    }
    given = sys.argv[1:] if arguments is None else arguments
    results: dict[str, Any] = dict(
        command=shlex.join(['python', 'tools/benchmark/benchmark_inference.py', *given]),
        date=time.strftime('%Y-%m-%d %H:%M:%S %z'),
        machine=describe_machine(torch.device('cpu')),
        rows=[],
    )
    machine = results['machine']
    print(
        f'{machine["name"]}, {machine["cores"]} cores, {machine["threads"]} threads, '
        f'torch {machine["torch"]}, {results["date"]}\n  {results["command"]}'
    )
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for config, shape in configs.items():
            try:
                row = measure(config, tuple(args.shape or shape), args, Path(folder))
            except (FileNotFoundError, ImportError, ValueError) as error:
                sys.exit(f'error: {config}: {error}')
            row['config'] = Path(config).name
            results['rows'].append(row)
            show(row)
            (args.output / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    draw(results, args.output / 'inference.png')
    print(f'\n{args.output / "results.json"}\n{args.output / "inference.png"}')


if __name__ == '__main__':
    main()
