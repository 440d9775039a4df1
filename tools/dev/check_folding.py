"""Checks that folding is exact, network by network: folded against original, float64 and float32.

Each CONFIG is a file, or an upstream name such as mmdet::retinanet/retinanet_r50_fpn_1x_coco.py,
which is converted to WS + BCN first. Configs that differ in training alone have the same network,
which is checked once. It gets random weights, statistics and affines, the image is small and
random; the model that tools/model_converters/fold.py would write is built and compared as well.
Ends with a table. With -o the results go to a file, a line of JSON per config, and configs that are
in the file already are passed over. The exit status is 1 if a folded model is off.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed

BOUNDS = {'fold_float64': 1e-10, 'fold_float32': 1e-5, 'stock_float32': 1e-5}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument('-o', '--output', type=Path, help='file of the results; continued')
    parser.add_argument('--shape', nargs=2, type=int, default=(64, 96), metavar=('H', 'W'))
    parser.add_argument('--seconds', type=float, help='start no further config after this time')
    return parser.parse_args()


def load(name: str) -> 'Config':
    """The config, converted where it is one of upstream."""
    from wsbcn_mm.openmmlab import config
    from wsbcn_mm.openmmlab.conversion.convert import convert_config

    if '::' in name:
        return convert_config(name).cfg
    return config.load_config(name)


def randomise(model: Any) -> None:
    """Weights as they were initialised; statistics and affines far from their initial values."""
    import torch
    from torch import nn

    from wsbcn_mm.layers import BatchChannelNorm

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 5)
        if isinstance(module, BatchChannelNorm):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, 1, 0.3)


def check(cfg: 'Config', shape: tuple[int, int]) -> dict[str, Any]:
    """The errors of one config."""
    import torch

    from wsbcn_mm.openmmlab.deploy import inference, stock
    from wsbcn_mm.openmmlab.deploy.parts import relative_error, tensor_parts
    from wsbcn_mm.openmmlab.deploy.settings import CannotBePlain

    torch.manual_seed(0)
    image = inference.random_image(*shape)
    planned = inference.load_planned(cfg, None, image)
    model, plan = planned.model, planned.plan
    randomise(model)
    x = inference.preprocess(model, cfg, image)
    parts = tensor_parts(model, x)
    result = dict(
        norms=sum(fold.norm is not None for fold in plan.folds),
        weights=sum(fold.norm is None for fold in plan.folds),
        left=plan.left,
        parts=[part.name for part in parts],
    )
    result['fold_float32'] = relative_error(parts, tensor_parts(plan.apply(model), x))
    try:
        stock_cfg, stock_model = stock.stock_model(cfg, model, plan)
    except CannotBePlain as reason:
        result['stock'] = str(reason)
    else:
        listed = len(stock_cfg.model.layers) if stock.lists_layers(stock_cfg) else 0
        result['stock'] = f'{listed} layers listed' if listed else 'settings alone'
        result['stock_float32'] = relative_error(parts, tensor_parts(stock_model, x))
    model.double()
    x = inference.preprocess(model, cfg, image)
    try:
        parts = tensor_parts(model, x)
    except RuntimeError as reason:  # some hosts' layers compute in float32 whatever comes in
        result['no_float64'] = str(reason)
    else:
        result['fold_float64'] = relative_error(parts, tensor_parts(plan.apply(model), x))
    return result


def read(file: Path | None) -> dict[str, dict]:
    """What a file has, by config."""
    if file is None or not file.exists():
        return {}
    return {row['config']: row for row in map(json.loads, file.read_text().splitlines())}


def table(rows: list[dict]) -> str:
    """Markdown: a line per network, with the number of configs that have it."""
    head = [
        'network of',
        'configs',
        'norms folded',
        'further weights',
        'left',
        'float64',
        'float32',
        'stock model',
        'float32',
    ]
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for row in rows:
        if 'same_as' in row:
            continue
        count = sum(other['network'] == row['network'] for other in rows)
        fold_float64, fold_float32, stock_float32 = (
            f'{row[key]:.1e}' if key in row else 'none' for key in BOUNDS
        )
        lines.append(
            f'| {Path(row["config"]).stem} | {count} | {row["norms"]} | '
            f'{row["weights"]} | {len(row["left"])} | '
            f'{fold_float64} | {fold_float32} | {row["stock"].partition(chr(10))[0]} | '
            f'{stock_float32} |'
        )
    return '\n'.join(lines)


def main() -> None:
    """Goes through the configs."""
    args = parse_args()
    from networks import network_of

    done = read(args.output)
    networks = {row['network']: row['config'] for row in done.values() if 'same_as' not in row}
    started, off = time.monotonic(), []
    for i, name in enumerate(args.configs):
        if name in done:
            continue
        if args.seconds and time.monotonic() - started > args.seconds:
            sys.exit(f'{len(args.configs) - i} configs remain: run again')
        print(f'[{i + 1}/{len(args.configs)}] {name}', file=sys.stderr, flush=True)
        try:
            cfg = load(name)
            row = dict(config=name, network=network_of(cfg))
            if row['network'] in networks:
                row['same_as'] = networks[row['network']]
            else:
                row |= check(cfg, tuple(args.shape))
                networks[row['network']] = name
        except (ValueError, ImportError, FileNotFoundError) as error:
            sys.exit(f'error: {name}: {error}')
        done[name] = row
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open('a') as file:
                file.write(json.dumps(row) + '\n')
    rows = [done[name] for name in args.configs]
    for row in rows:
        for key, bound in BOUNDS.items():
            if key in row and not row[key] <= bound:
                off.append(f'{row["config"]}: {key} {row[key]:.2g}')
    print(table(rows))
    for key in BOUNDS:
        errors = [row[key] for row in rows if key in row]
        if errors:
            print(f'{key}: {len(errors)} networks, largest relative error {max(errors):.2g}')
    if off:
        sys.exit('too large:\n  ' + '\n  '.join(off))


if __name__ == '__main__':
    main()
