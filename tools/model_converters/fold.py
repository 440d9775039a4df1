"""Turns a trained model with WS and BCN into one that the stock host loads.

Writes DST/<config>_folded.py and DST/<config>_folded.pth, without any import of wsbcn_mm. Where
settings of stock layers can express the model, those: convolutions with constant weights, BatchNorm
and GroupNorm; `mmcv.cnn.fuse_conv_bn(model)` leaves a convolution with bias and a GroupNorm. For
any other network the config lists the layers that differ from the stock model, and
DST/folded_layers.py, which needs torch and mmengine alone, puts them in. Nothing is written unless
the new model gives the same results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(__doc__)
    parser.add_argument('-o', '--output', type=Path, required=True, metavar='DST', help='folder')
    parser.add_argument(
        '--images',
        nargs='+',
        metavar='FILE',
        help='compare on these, as the test pipeline prepares them; default: two random images',
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
        help='largest error allowed, relative to the largest value; default: 1e-5, or, where '
        'folding is exact in float64, as much as float32 itself rounds in this network',
    )
    parser.add_argument(
        '--evaluate', action='store_true', help='evaluate both models on the test data first'
    )
    return parser.parse_args()


def read_images(args: argparse.Namespace, cfg: Config) -> dict[str, Any]:
    """Images to compare on, by name; files as the config's test pipeline prepares them.

    Networks such as RTMDet take sizes alone that their pipeline makes.
    """
    from wsbcn_mm.openmmlab.config import scope_of
    from wsbcn_mm.openmmlab.deploy.inference import random_image
    from wsbcn_mm.openmmlab.deploy.inputs import Reader

    if not args.images:
        return {
            f'random image {seed}': random_image(args.shape[0], args.shape[1], seed)
            for seed in range(2)
        }
    for path in args.images:
        if not Path(path).is_file():
            raise FileNotFoundError(f'no image {path}')
    read = Reader(cfg)
    if scope_of(cfg) == 'mmaction':
        return {path: read(path)[0] for path in args.images}  # the frames of a video
    prepared = {path: read(path)[1]['inputs'][0] for path in args.images}
    return {path: image.permute(1, 2, 0).numpy() for path, image in prepared.items()}


def main() -> None:
    """Folds, compares, writes."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line

    with command_line.errors_in_one_line():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Raises before anything is written where something is wrong."""
    from wsbcn_mm.openmmlab import config, files, preflight
    from wsbcn_mm.openmmlab.deploy import fold, inference

    files.check_place(args.output, folder=True)
    cfg = config.load_config(args.config, args.cfg_options)
    if args.evaluate:
        preflight.check_data(cfg, 'test_dataloader')
    images = read_images(args, cfg)
    planned = inference.load_planned(cfg, args.checkpoint, next(iter(images.values())))
    print(planned.plan)
    stem = f'{Path(args.config).stem}_folded'
    written = fold.write_folded(
        planned, args.checkpoint, args.output, stem, images, args.tolerance, args.evaluate
    )
    for file in written:
        print(file)


if __name__ == '__main__':
    main()
