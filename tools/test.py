"""Evaluates a checkpoint: the arguments of MMDetection's tool of the same name."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder of the metrics')
    parser.add_argument(
        '--out',
        help='detection: dump the predictions to this .pkl file; segmentation: write the predicted '
        'masks to this folder',
    )
    parser.add_argument('--show', action='store_true', help='show the pictures in a window')
    parser.add_argument(
        '--show-dir',
        help='write pictures, ground truth beside prediction, to <work-dir>/<timestamp>/<show-dir>',
    )
    parser.add_argument('--wait-time', type=float, default=2, help='seconds per window')
    command_line.add_config_options(parser)
    command_line.add_launcher(parser)
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return command_line.parse(parser)


def configure(args: argparse.Namespace):
    """The config of this run; raises where something that it needs is missing."""
    from wsbcn_mm.openmmlab import config, launch

    cfg = config.load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = config.work_dir(cfg, args.config, args.work_dir)
    config.check_checkpoint_file(args.checkpoint)
    cfg.load_from = args.checkpoint
    config.check_data(cfg, 'test_dataloader')
    if args.show or args.show_dir:
        config.draw_pictures(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        config.augment_test(cfg)
    if args.out is not None:
        config.keep_predictions(cfg, args.out)
    config.add_hook(cfg, dict(type='CheckpointReportHook', strict=True))
    launch.prepare_distributed(cfg, args.launcher)
    return cfg


def main() -> None:
    """Reads the config, loads the checkpoint, evaluates."""
    args = parse_args()
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from wsbcn_mm.openmmlab import command_line, compat
    from wsbcn_mm.openmmlab.checkpoints import CheckpointMismatch

    with command_line.errors_in_one_line():
        cfg = configure(args)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    try:
        runner.test()
    except CheckpointMismatch as error:
        sys.exit(f'error: {cfg.load_from}: {error}')
    except (compat.CheckpointRefused, compat.DataError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
