"""Checks that folding is exact, config by config: folded against original in float64 and float32.

Each CONFIG is a file, or an upstream name such as mmdet::retinanet/retinanet_r50_fpn_1x_coco.py,
which is converted to WS + BCN first. The model gets random weights, statistics and affines, the
image is small and random. One line of JSON per config; with -o it goes to a file, and configs that
are in the file already are passed over. The exit status is 1 if a folded model is off.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed

BOUNDS = {'fold_float64': 1e-10, 'fold_float32': 1e-5, 'plain_float32': 1e-5}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument('-o', '--output', type=Path, help='file of the results; continued')
    parser.add_argument('--shape', nargs=2, type=int, default=(96, 128), metavar=('H', 'W'))
    parser.add_argument('--seconds', type=float, help='start no further config after this time')
    return parser.parse_args()


def load(name: str):
    """The config, converted where it is one of upstream."""
    from wsbcn_mm.openmmlab import config, convert_config

    if '::' in name:
        return convert_config.convert_config(name).cfg
    return config.load_config(name)


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


def check(name: str, shape: tuple[int, int]) -> dict:
    """The errors of one config."""
    import torch

    from wsbcn_mm import fuse
    from wsbcn_mm.openmmlab import inference, plain

    torch.manual_seed(0)
    cfg = load(name)
    model = inference.build_model(cfg)
    randomise(model)
    image = inference.random_image(*shape)
    steps = fuse.plan(model, run=inference.run_on(cfg, image))
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
        stock = inference.build_model(plain.plain_config(cfg, model))
        plain.load_plain(stock, model, steps)
    except plain.CannotBePlain as reason:
        result['plain'] = str(reason)
    else:
        result['plain_float32'] = error(stock, x, parts)
    model.double()
    x = inference.preprocess(model, cfg, image)
    result['fold_float64'] = error(steps.apply(model), x, inference.tensor_parts(model, x))
    return result


def main() -> None:
    """Goes through the configs."""
    args = parse_args()
    done = {}
    if args.output and args.output.exists():
        done = {r['config']: r for r in map(json.loads, args.output.read_text().splitlines())}
    started, off = time.monotonic(), []
    for i, name in enumerate(args.configs):
        if name not in done:
            if args.seconds and time.monotonic() - started > args.seconds:
                sys.exit(f'{len(args.configs) - i} configs remain: run again')
            print(f'[{i + 1}/{len(args.configs)}] {name}', file=sys.stderr, flush=True)
            try:
                done[name] = dict(config=name, **check(name, tuple(args.shape)))
            except (ValueError, ImportError, FileNotFoundError) as error:
                sys.exit(f'error: {name}: {error}')
            line = json.dumps(done[name])
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with args.output.open('a') as file:
                    file.write(line + '\n')
            else:
                print(line)
        for key, bound in BOUNDS.items():
            if key in done[name] and not done[name][key] <= bound:
                off.append(f'{name}: {key} {done[name][key]:.2g}')
    checked = [done[name] for name in args.configs]
    for key in BOUNDS:
        errors = [r[key] for r in checked if key in r]
        if errors:
            print(f'{key}: {len(errors)} configs, largest relative error {max(errors):.2g}')
    if off:
        sys.exit('too large:\n  ' + '\n  '.join(off))


if __name__ == '__main__':
    main()
