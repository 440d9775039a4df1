"""Turns a trained model with WS and BCN into one that stock MMDetection or MMSegmentation load.

Writes DST/<config>_folded.py and DST/<config>_folded.pth, without any import of wsbcn_mm. Where
settings of stock layers can express the model, those: convolutions with constant weights, BatchNorm
and GroupNorm; `mmcv.cnn.fuse_conv_bn(model)` leaves a convolution with bias and a GroupNorm. For
any other network the config lists the layers that differ from the stock model, and
DST/folded_layers.py, which needs torch and mmengine alone, puts them in. Nothing is written unless
the new model gives the same results.
"""

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(__doc__)
    parser.add_argument('-o', '--output', type=Path, required=True, metavar='DST', help='folder')
    parser.add_argument(
        '--images', nargs='+', metavar='FILE', help='compare on these; default: two random images'
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(256, 320),
        metavar=('H', 'W'),
        help='size of the random images; default: 256 320',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-5,
        help='largest error allowed, relative to the largest value; default: %(default)s',
    )
    parser.add_argument(
        '--evaluate', action='store_true', help='evaluate both models on the test data first'
    )
    return parser.parse_args()


def read_images(args: argparse.Namespace) -> dict:
    """Images to compare on, by name."""
    import mmcv

    from wsbcn_mm.openmmlab.deploy.inference import random_image

    if not args.images:
        return {f'random image {seed}': random_image(*args.shape, seed) for seed in range(2)}
    images = {}
    for path in args.images:
        if not Path(path).is_file():
            raise FileNotFoundError(f'no image {path}')
        images[path] = mmcv.imread(path)
        if images[path] is None:
            raise ValueError(f'{path} is not an image that OpenCV can read')
    return images


def evaluate(cfg, checkpoint: str, folder: str) -> dict:
    """Metrics of a checkpoint on the config's test data."""
    from mmengine.runner import Runner

    cfg = copy.deepcopy(cfg)
    cfg.load_from, cfg.work_dir, cfg.launcher = checkpoint, folder, 'none'
    return Runner.from_cfg(cfg).test()


def print_metrics(before: dict, after: dict) -> float:
    """A table; returns the largest difference."""
    width = max(map(len, before))
    print(f'{"":<{width}}  original   folded')
    for name, value in before.items():
        print(f'{name:<{width}}  {value:8.4f} {after[name]:8.4f}')
    return max(abs(value - after[name]) for name, value in before.items())


def main() -> None:
    """Builds, compares, writes."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line

    with command_line.errors_in_one_line():
        convert(args)


def convert(args: argparse.Namespace) -> None:
    """Raises before anything is written where something is wrong."""
    import torch
    from mmcv.cnn import fuse_conv_bn
    from mmengine.config import Config

    from wsbcn_mm import folding
    from wsbcn_mm.openmmlab import checkpoints, config, preflight
    from wsbcn_mm.openmmlab.deploy import inference, stock

    cfg = config.load_config(args.config, args.cfg_options)
    if args.evaluate:
        preflight.check_data(cfg, 'test_dataloader')
    images = read_images(args)
    checkpoint = checkpoints.read_checkpoint(args.checkpoint)
    model = inference.load_model(cfg, checkpoint)
    steps = folding.plan(model, run=inference.run_on(cfg, next(iter(images.values()))))
    print(steps)
    stock_cfg, stock_model = stock.stock_model(cfg, model, steps)
    candidates = {'written': stock_model, 'wsbcn_mm.fold': steps.apply(model)}
    if stock.lists_layers(stock_cfg):
        print(f'{len(stock_cfg.model.layers)} layers differ from those of any stock config')
    else:
        fused = fuse_conv_bn(copy.deepcopy(stock_model))
        candidates['written, after fuse_conv_bn'] = fused
    for name, image in images.items():
        x = inference.preprocess(model, cfg, image)
        parts = inference.tensor_parts(model, x)
        print(f'{name}, {image.shape[0]}x{image.shape[1]}: {", ".join(p.name for p in parts)}')
        for kind, candidate in candidates.items():
            error = inference.relative_error(parts, inference.tensor_parts(candidate, x))
            print(f'  {kind}: largest relative error {error:.2g}')
            if not error <= args.tolerance:
                double = copy.deepcopy(model).double()
                exact = inference.relative_error(
                    inference.tensor_parts(double, x.double()),
                    inference.tensor_parts(steps.apply(double), x.double()),
                )
                raise ValueError(
                    f'{kind} differs from the original by {error:.2g}, more than '
                    f'{args.tolerance:.2g}; nothing was written\n  in float64 folding changes '
                    f'{exact:.2g}: where that is below 1e-10, the rest is the rounding of float32, '
                    'and --tolerance allows more'
                )

    args.output.mkdir(parents=True, exist_ok=True)
    stem = f'{Path(args.config).stem}_folded'
    with tempfile.TemporaryDirectory(dir=args.output, prefix='.') as folder:
        weights = Path(folder) / f'{stem}.pth'
        meta = {
            key: value
            for key, value in checkpoints.meta_of(checkpoint).items()
            if key in ('dataset_meta', 'epoch', 'iter')
        }
        meta['cfg'] = stock_cfg.pretty_text
        torch.save(dict(meta=meta, state_dict=stock_model.state_dict()), weights)
        files = [weights, *stock.write_config(stock_cfg, Path(folder) / f'{stem}.py')]
        written = Config.fromfile(files[1])
        if args.evaluate:
            before = evaluate(cfg, args.checkpoint, f'{folder}/original')
            after = evaluate(written, str(weights), f'{folder}/folded')
            difference = print_metrics(before, after)
            if difference > 1e-3 * max(1.0, *map(abs, before.values())):
                raise ValueError(f'metrics differ by {difference:.4f}; nothing was written')
        for file in files:
            os.replace(file, args.output / file.name)
            print(args.output / file.name)


if __name__ == '__main__':
    main()
