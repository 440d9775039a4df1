"""The command line: python -m wsbcn_mm.shapes."""

import argparse
import sys
import time
from collections.abc import Sequence

from wsbcn_mm.shapes import clips, pictures
from wsbcn_mm.shapes.files import NUM_TRAIN, NUM_VAL, contact_sheet, draw_dataset


def _print_progress(done: int, total: int) -> None:
    """Shows one running line on a terminal, a line every tenth in a log."""
    if sys.stderr.isatty():
        print(
            f'\rdrawing {done}/{total}',
            end='\n' if done == total else '',
            file=sys.stderr,
            flush=True,
        )
    elif done * 10 // total > (done - 1) * 10 // total:
        print(f'drawing {done}/{total}', file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; `arguments` defaults to that of the process."""
    parser = argparse.ArgumentParser(
        prog='python -m wsbcn_mm.shapes',
        description='Draws the small data set "shapes" in the layouts of COCO and Pascal VOC; with '
        '--clips videos of moving shapes in the formats of MMAction2, with --pictures pictures '
        'of one shape in a folder for each class.',
    )
    parser.add_argument('root', nargs='?', help='default: data/shapes, data/clips or data/pictures')
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument('--clips', action='store_true', help='draw videos')
    kinds.add_argument('--pictures', action='store_true', help='draw folders of classes')
    parser.add_argument(
        '--num-train',
        type=int,
        help=f'default: {NUM_TRAIN}, {clips.NUM_TRAIN} clips, {pictures.NUM_TRAIN} pictures',
    )
    parser.add_argument(
        '--num-val',
        type=int,
        help=f'default: {NUM_VAL}, {clips.NUM_VAL} clips, {pictures.NUM_VAL} pictures',
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('W', 'H'),
        help='width and height in pixels, default: 192 160, clips and pictures 64 64',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument(
        '--preview',
        metavar='FILE.png',
        help='also write a sheet of the first 24 training images, with outlines',
    )
    options = parser.parse_args(arguments)
    if options.pictures:
        draw, what = pictures.draw_pictures, 'pictures'
        defaults = (pictures.NUM_TRAIN, pictures.NUM_VAL)
        size, root = options.size or pictures.SIZE, options.root or 'data/pictures'
    elif options.clips:
        draw, what, defaults = clips.draw_clips, 'clips', (clips.NUM_TRAIN, clips.NUM_VAL)
        size, root = options.size or clips.SIZE, options.root or 'data/clips'
    else:
        draw, what, defaults = draw_dataset, 'images', (NUM_TRAIN, NUM_VAL)
        size, root = options.size or (192, 160), options.root or 'data/shapes'
    if what != 'images' and options.preview:
        parser.error(f'--preview is a sheet of images, not of --{what}')
    num_train, num_val = (
        default if given is None else given
        for given, default in zip((options.num_train, options.num_val), defaults)
    )
    start = time.perf_counter()
    drawn = 0

    def progress(done: int, total: int) -> None:
        nonlocal drawn
        drawn = done
        _print_progress(done, total)

    try:
        root = draw(root, num_train, num_val, size, options.seed, progress=progress)
        if options.preview:
            sheet = contact_sheet(min(24, num_train), size=size, seed=options.seed)
            sheet.save(options.preview)
    except (ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: {error}\n')
    done = (
        f'drew {drawn} {what} in {time.perf_counter() - start:.1f} s'
        if drawn
        else 'nothing to draw, the data set is there'
    )
    preview = f'; preview: {options.preview}' if options.preview else ''
    print(
        f'{root}: {num_train} train, {num_val} val, '
        f'{size[0]} x {size[1]} pixels, seed {options.seed} ({done}){preview}'
    )


if __name__ == '__main__':
    main()
