"""Writes a model as ONNX: folded, with standard operators and constant weights, and checked.

A segmenter becomes one file, image.onnx: normalised image -> class scores. A detector becomes
image.onnx (normalised image -> feature maps and the dense head's raw output) and, where it has RoI
heads, bbox_head.onnx and mask_head.onnx (RoI features -> raw predictions). Boxes, non-maximum
suppression and RoIAlign stay with the caller. How to normalise is in the files' metadata.

With --whole a detector becomes one file, model.onnx: image -> boxes, scores, labels, masks.
Nothing is written unless onnxruntime gives what torch gives.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(__doc__)
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder')
    parser.add_argument(
        '--shape', nargs=2, type=int, required=True, metavar=('H', 'W'), help='size of the image'
    )
    parser.add_argument(
        '--dynamic', action='store_true', help='leave batch size, height and width open'
    )
    parser.add_argument(
        '--opset',
        type=int,
        default=18,
        help='default: 18; from 21 on GroupNorm is one operator (GroupNormalization)',
    )
    parser.add_argument(
        '--whole', action='store_true', help='a detector with boxes, suppression and masks inside'
    )
    parser.add_argument(
        '--images',
        nargs='+',
        metavar='FILE',
        help='with --whole: compare on these, read as the test data are; default: two random ones',
    )
    return parser.parse_args()


def main() -> None:
    """Folds, exports, checks, writes."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line

    with command_line.errors_in_one_line():
        export(args)


def export_whole(
    args: argparse.Namespace,
    cfg: Config,
    model: Any,
    x: Tensor,
    folder: Path,
    classes: list[str],
) -> Path:
    """Writes and checks model.onnx of a folded detector."""
    from wsbcn_mm.openmmlab.config import scope_of
    from wsbcn_mm.openmmlab.deploy import inference, inputs, onnx

    if scope_of(cfg) != 'mmdet':
        raise ValueError('--whole is for detectors: image.onnx of a segmenter is the whole of it')
    from wsbcn_mm.openmmlab.deploy import detector

    if args.images:
        read = inputs.Reader(cfg)
        batches = {name: read(name)[1] for name in args.images}
    else:
        height, width = args.shape
        drawn = {f'random image {i}': inference.random_image(height, width, i) for i in range(2)}
        channels = inference.channels_of(model)
        batches = {name: inference.batch_of(cfg, d, channels) for name, d in drawn.items()}
    file = folder / 'model.onnx'
    detector.export_detector(model, x, file, args.opset, dict(classes=classes))
    counts = onnx.check_graph(file)
    print(', '.join(f'{count} {name}' for name, count in sorted(counts.items())))
    session = onnx.onnxruntime_session(file)
    found = {n: detector.check_detector(session, model, batch) for n, batch in batches.items()}
    print(detector.report(found))
    return file


def export(args: argparse.Namespace) -> None:
    """Raises before anything is written where something is wrong."""
    from wsbcn_mm.openmmlab import files as places
    from wsbcn_mm.openmmlab.deploy import inference, onnx, parts

    places.check_place(args.output, folder=True)
    if args.images and not args.whole:
        raise ValueError('--images are for --whole: parts are compared on a random image')
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        __import__(name)
    image = inference.random_image(*args.shape)
    planned = inference.load_planned(args.config, args.checkpoint, image, args.cfg_options)
    print(planned.plan)
    folded = planned.folded(plain=True).requires_grad_(False)
    metadata = onnx.metadata_of(planned.cfg, folded)
    x = inference.preprocess(folded, planned.cfg, image)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output, prefix='.') as folder:
        files = []
        if args.whole:
            classes = metadata['classes']
            files.append(export_whole(args, planned.cfg, folded, x, Path(folder), classes))
        for part in () if args.whole else parts.tensor_parts(folded, x):
            if part.name.startswith('auxiliary'):
                continue  # of use in training only
            file = Path(folder) / f'{part.name}.onnx'
            onnx.export_part(part, file, args.opset, args.dynamic, metadata)
            counts = onnx.check_graph(file)
            error = onnx.check_results(part, file)
            files.append(file)
            print(
                f'{file.name}: {part.input_name} {tuple(part.input.shape)} -> '
                f'{", ".join(part.outputs)}\n  largest relative error {error:.2g}; '
                + ', '.join(f'{count} {name}' for name, count in sorted(counts.items()))
            )
        for file in files:
            os.replace(file, args.output / file.name)
            print(args.output / file.name)


if __name__ == '__main__':
    main()
