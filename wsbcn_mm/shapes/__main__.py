"""The command line: python -m wsbcn_mm.shapes."""

import argparse
import sys
import time
from collections.abc import Sequence

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
        description='Draws the small data set "shapes" in the layouts of COCO and Pascal VOC.',
    )
    parser.add_argument('root', nargs='?', default='data/shapes', help='default: %(default)s')
    parser.add_argument('--num-train', type=int, default=NUM_TRAIN, help='default: %(default)s')
    parser.add_argument('--num-val', type=int, default=NUM_VAL, help='default: %(default)s')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(192, 160),
        metavar=('W', 'H'),
        help='width and height in pixels, default: 192 160',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument(
        '--preview',
        metavar='FILE.png',
        help='also write a sheet of the first 24 training images, with outlines',
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    drawn = 0

    def progress(done: int, total: int) -> None:
        nonlocal drawn
        drawn = done
        _print_progress(done, total)

    try:
        root = draw_dataset(
            options.root,
            options.num_train,
            options.num_val,
            options.size,
            options.seed,
            progress=progress,
        )
        if options.preview:
            contact_sheet(min(24, options.num_train), size=options.size, seed=options.seed).save(
                options.preview
            )
    except (ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: {error}\n')
    what = (
        f'drew {drawn} images in {time.perf_counter() - start:.1f} s'
        if drawn
        else 'nothing to draw, the data set is there'
    )
    preview = f'; preview: {options.preview}' if options.preview else ''
    print(
        f'{root}: {options.num_train} train, {options.num_val} val, '
        f'{options.size[0]} x {options.size[1]} pixels, seed {options.seed} ({what}){preview}'
    )


if __name__ == '__main__':
    main()
