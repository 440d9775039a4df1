"""Estimates the running statistics of a checkpoint again, over N training images as tested."""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(
        __doc__, 'checkpoint file, of the model or of its backbone', launcher=True
    )
    parser.add_argument('-n', '--num-images', type=int, default=200, help='images, over all ranks')
    parser.add_argument(
        '-o', '--out', help='file to write; default: <checkpoint>_recalibrated.pth beside it'
    )
    parser.add_argument('--batch-size', type=int, default=1, help='images per forward call')
    parser.add_argument('--passes', type=int, default=4, help='the most passes over the images')
    parser.add_argument(
        '--keep-function',
        action='store_true',
        help='batch_weight and batch_bias follow the statistics: the model computes what it did '
        'before (after a conversion from GN + WS)',
    )
    args = command_line.parse(parser)
    for name in ('num_images', 'batch_size', 'passes'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1')
    return args


def run(args: argparse.Namespace) -> None:
    """Loads, measures, writes."""
    from mmengine.dist import get_dist_info, init_dist, is_distributed
    from mmengine.registry import MODELS, init_default_scope

    from wsbcn_mm.openmmlab import (
        checkpoints,
        command_line,
        config,
        explain,
        files,
        filling,
        preflight,
    )
    from wsbcn_mm.openmmlab.measure import recalibration

    source = Path(args.checkpoint)
    out = Path(args.out or source.with_name(f'{source.stem}_recalibrated.pth'))
    files.check_place(out)
    cfg = config.load_config(args.config, args.cfg_options)
    checkpoint = checkpoints.read_checkpoint(args.checkpoint)
    state = checkpoints.state_dict_of(checkpoint, args.checkpoint)
    preflight.check_data(cfg, 'train_dataloader')
    command_line.prepare_distributed(cfg, args.launcher)
    if args.launcher != 'none' and not is_distributed():
        init_dist(args.launcher)
    init_default_scope(cfg.get('default_scope') or config.scope_of(cfg))
    dataset = recalibration.training_images_as_tested(cfg)

    cfg_model = config.model_of(cfg)
    for part in (cfg_model, cfg_model.get('backbone') or {}):  # all weights come from the file
        part.pop('init_cfg', None)
        part.pop('pretrained', None)
    with explain.named(cfg):
        model = MODELS.build(cfg_model).to(recalibration.device())
    config.refuse_tracker(model)
    # A converted ImageNet file has the keys of a backbone alone.
    backbone = hasattr(model, 'backbone') and not any(k.startswith('backbone.') for k in state)
    target = model.backbone if backbone else model
    filling.load(target, state, checkpoint, source=args.checkpoint)
    with command_line.errors_of_a_run(cfg, 'train_dataloader'):
        batches = recalibration.loader(dataset, args.num_images, args.batch_size)
        done = recalibration.recalibrate_model(
            model,
            batches,
            args.passes,
            progress=True,
            keep_function=args.keep_function,
            backbone=backbone,
        )
    if get_dist_info()[0] != 0:
        return
    keys = recalibration.write_statistics(target, checkpoint, args.keep_function)
    files.save_atomically(checkpoint, out)
    for name in done.unreached:
        print(f'not used by these images, unchanged: {name}')
    subset: Any = batches.dataset
    images = min(args.num_images, len(subset.dataset))
    drift = 'not known after one pass' if done.drift is None else f'{done.drift:.4f}'
    print(
        f'{out}: {len(keys)} statistics of {len(done.samples)} layers over {images} images, '
        f'{done.passes} passes, last change {drift} standard deviations'
    )


def main() -> None:
    """Runs, and turns mistakes of the user into one message."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line

    with command_line.errors_in_one_line():
        run(args)


if __name__ == '__main__':
    main()
