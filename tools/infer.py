"""Runs a model on an image, a video or a folder of them and writes what it finds.

Detection: DIR/predictions.json (COCO format with scores, masks as RLE); segmentation:
DIR/masks/*.png (class numbers, with a palette); classification of images and videos:
DIR/predictions.json and .csv (the best classes with their scores). Pictures in DIR/pictures. The
model is folded first. Files that cannot be read are named and passed over; the exit status is then
1. One image is in memory at a time.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(__doc__)
    parser.add_argument('source', type=Path, help='image, video, or folder (searched at any depth)')
    parser.add_argument('-o', '--output', type=Path, required=True, metavar='DIR', help='folder')
    parser.add_argument('--no-fold', action='store_true', help='run the model as it was trained')
    parser.add_argument('--no-pictures', action='store_true', help='write predictions alone')
    parser.add_argument(
        '--score-threshold',
        type=float,
        default=0.3,
        help='smallest score that a picture shows; predictions.json has all; default: %(default)s',
    )
    parser.add_argument(
        '--annotations',
        type=Path,
        metavar='FILE',
        help='COCO annotation file of these images: its ids are used, for an evaluation',
    )
    parser.add_argument(
        '--top-k',
        type=int,
        default=5,
        help='classification: how many classes of each file are written; default: %(default)s',
    )
    parser.add_argument('--device', help='default: the GPU where there is one')
    return parser.parse_args()


def main() -> None:
    """Loads, folds, runs over the images."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line

    with command_line.errors_in_one_line():
        failed = infer(args)
    if failed:
        sys.exit(f'{len(failed)} files could not be read:\n  ' + '\n  '.join(failed))


def infer(args: argparse.Namespace) -> list[str]:
    """Returns the files that could not be read."""
    from mmengine.utils import ProgressBar

    from wsbcn_mm.layers.standardization import weights_do_not_change
    from wsbcn_mm.openmmlab import config, explain, files
    from wsbcn_mm.openmmlab.data.reading import DataError
    from wsbcn_mm.openmmlab.deploy import inference, inputs, labels, predict, writers

    if args.top_k < 1:
        raise ValueError(f'--top-k must be at least 1\n  got {args.top_k}')
    files.check_place(args.output, folder=True)
    device = inference.device_of(args.device)
    cfg = config.load_config(args.config, args.cfg_options)
    scope = config.scope_of(cfg)
    if args.annotations is not None and scope != 'mmdet':
        raise ValueError(f'--annotations numbers the objects of detectors, and this is of {scope}')
    images = inputs.find_images(args.source, args.output, inputs.suffixes_of(cfg))
    if args.no_fold:
        model = inference.load_model(cfg, args.checkpoint)
    else:
        # Some detectors and segmenters take no smaller one.
        side = 224 if scope in labels.SCOPES else 512
        image = inference.random_image(side, side)
        planned = inference.load_planned(cfg, args.checkpoint, image)
        print(planned.plan)
        model = planned.folded()
    with explain.named(cfg):
        predictor = predict.Predictor(cfg, model.to(device))
    args.output.mkdir(parents=True, exist_ok=True)
    writer: writers.CocoWriter | labels.LabelWriter | None = None
    if scope == 'mmdet':
        file = args.output / 'predictions.json'
        writer = writers.CocoWriter(file, predictor.meta['classes'], args.annotations)
    elif predictor.gives_labels:
        writer = labels.LabelWriter(args.output, predictor.meta['classes'], args.top_k)
    failed, complete = [], False
    progress = ProgressBar(len(images), file=sys.stderr)
    try:
        with weights_do_not_change(predictor.model):
            for path, name in images:
                progress.update()
                try:
                    with explain.named(cfg):
                        image, sample = predictor(path)
                except DataError:
                    failed.append(str(path))
                    continue
                if writer is not None:
                    writer.add(name.as_posix(), sample, image.shape[:2])
                else:
                    mask = args.output / 'masks' / name.with_suffix('.png')
                    writers.write_mask(mask, sample, predictor.meta.get('palette'))
                if not args.no_pictures:
                    picture = args.output / 'pictures' / name.with_suffix('.jpg')
                    predictor.draw(image, sample, picture, args.score_threshold)
        complete = True
    finally:
        print(file=sys.stderr)  # the bar has no end of line
        if writer is not None:
            writer.close(complete)
    what = 'videos' if scope == 'mmaction' else 'images'
    print(f'{len(images) - len(failed)} {what}: {args.output}')
    return failed


if __name__ == '__main__':
    main()
