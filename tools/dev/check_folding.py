"""Checks that folding is exact, network by network: folded against original, float64 and float32.

Each CONFIG is a file, or an upstream name such as mmdet::retinanet/retinanet_r50_fpn_1x_coco.py,
which is converted to WS + BCN first. Configs that differ in training alone have the same network,
which is checked once. It gets random weights, statistics and affines, the image is small and
random; the model that tools/model_converters/fold.py would write is built and compared as well.
Ends with a table. With -o the results go to a file, a line of JSON per config, and configs that are
in the file already are passed over. The exit status is 1 if a folded model is off.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed

BOUNDS = {'fold_float64': 1e-10, 'fold_float32': 1e-5, 'stock_float32': 1e-5}
# Keys of a model's config that say nothing about the network in evaluation; losses are others.
TRAINING = {
    'init_cfg',
    'pretrained',
    'train_cfg',
    'frozen_stages',
    'norm_eval',
    'with_cp',
    'requires_grad',
    'momentum',
    'mode',
    'sync',
    'zero_init_residual',
    'batch_augments',
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument('-o', '--output', type=Path, help='file of the results; continued')
    parser.add_argument('--shape', nargs=2, type=int, default=(64, 96), metavar=('H', 'W'))
    parser.add_argument('--seconds', type=float, help='start no further config after this time')
    return parser.parse_args()


def load(name: str):
    """The config, converted where it is one of upstream."""
    from wsbcn_mm.openmmlab import config
    from wsbcn_mm.openmmlab.conversion import convert as convert_config

    if '::' in name:
        return convert_config.convert_config(name).cfg
    return config.load_config(name)


def network_of(cfg) -> str:
    """A name for the network of a config: the same for configs that differ in training alone."""

    def without_training(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: without_training(item)
                for key, item in value.items()
                if key not in TRAINING and not str(key).startswith('loss')
            }
        if isinstance(value, (list, tuple)):
            return [without_training(item) for item in value]
        return value

    network = dict(scope=cfg.get('default_scope'), model=without_training(cfg.model))
    text = json.dumps(network, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def randomise(model) -> None:
    """Weights as they were initialised; statistics and affines far from their initial values."""
    import torch
    from torch import nn

    from wsbcn_mm.layers import BatchChannelNorm

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 5)
        if isinstance(module, BatchChannelNorm):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, 1, 0.3)


def check(cfg, shape: tuple[int, int]) -> dict:
    """The errors of one config."""
    import torch

    from wsbcn_mm import folding
    from wsbcn_mm.openmmlab.deploy import inference, stock
    from wsbcn_mm.openmmlab.deploy import settings as plain

    torch.manual_seed(0)
    model = inference.build_model(cfg)
    randomise(model)
    image = inference.random_image(*shape)
    steps = folding.plan(model, run=inference.run_on(cfg, image))
    x = inference.preprocess(model, cfg, image)
    parts = inference.tensor_parts(model, x)
    result = dict(
        norms=sum(step.norm is not None for step in steps.folds),
        weights=sum(step.norm is None for step in steps.folds),
        left=steps.left,
        parts=[part.name for part in parts],
    )

    def error(other: torch.nn.Module, x: torch.Tensor, parts: list) -> float:
        return inference.relative_error(parts, inference.tensor_parts(other, x))

    result['fold_float32'] = error(steps.apply(model), x, parts)
    try:
        stock_cfg, other = stock.stock_model(cfg, model, steps)
    except plain.CannotBePlain as reason:
        result['stock'] = str(reason)
    else:
        listed = len(stock_cfg.model.layers) if stock.lists_layers(stock_cfg) else 0
        result['stock'] = f'{listed} layers listed' if listed else 'settings alone'
        result['stock_float32'] = error(other, x, parts)
    model.double()
    x = inference.preprocess(model, cfg, image)
    try:
        parts = inference.tensor_parts(model, x)
    except RuntimeError as reason:  # some hosts' layers compute in float32 whatever comes in
        result['no_float64'] = str(reason)
    else:
        result['fold_float64'] = error(steps.apply(model), x, parts)
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
