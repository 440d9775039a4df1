"""Evaluates a checkpoint: the arguments of MMDetection's tool of the same name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(__doc__, launcher=True)
    parser.add_argument('--work-dir', help='folder of the metrics')
    parser.add_argument(
        '--out',
        help='dump the predictions to this .pkl file; segmentation: write the predicted masks to '
        'this folder',
    )
    parser.add_argument('--show', action='store_true', help='show the pictures in a window')
    parser.add_argument(
        '--show-dir',
        help='write pictures, ground truth beside prediction, to <work-dir>/<timestamp>/<show-dir>',
    )
    parser.add_argument('--wait-time', type=float, default=2, help='seconds per window')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return command_line.parse(parser)


def configure(args: argparse.Namespace) -> Config:
    """The config of this run; raises where something that it needs is missing."""
    from wsbcn_mm.openmmlab import checkpoints, command_line, config, preflight

    cfg = command_line.read_run(args)
    checkpoints.check_checkpoint(args.checkpoint)
    cfg.load_from, cfg.resume = args.checkpoint, False  # weights alone, no state of a training
    preflight.check_test(cfg)
    preflight.check_data(cfg, 'test_dataloader')
    if args.show or args.show_dir:
        command_line.draw_pictures(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        command_line.augment_test(cfg)
    preflight.check_versions(cfg)
    if args.out is not None:
        command_line.keep_predictions(cfg, args.out)
    config.add_hook(cfg, dict(type='CheckpointReportHook', strict=True))
    config.add_hook(cfg, dict(type='DataCheckHook'))
    command_line.prepare_distributed(cfg, args.launcher)
    return cfg


def main() -> None:
    """Reads the config, loads the checkpoint, evaluates."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line

    with command_line.errors_in_one_line():
        cfg = configure(args)
    with command_line.errors_of_a_run(cfg, 'test_dataloader'):
        command_line.build_runner(cfg).test()


if __name__ == '__main__':
    main()
