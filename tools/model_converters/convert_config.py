"""Turns a config of an OpenMMLab host into one that trains with WS + BCN."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='config file, or mmdet::... / mmseg::... name')
    parser.add_argument('-o', '--out', help='config file to write; without it nothing is written')
    parser.add_argument('--norm', default='BCN', help='BCN or GN')
    parser.add_argument('--conv', default='WSConv2d', help='WSConv2d, or none for norms alone')
    parser.add_argument('--images-per-gpu', type=int, default=1, help='batch size of one process')
    parser.add_argument(
        '--gpus',
        type=int,
        help='number of processes; default: as many as the learning rate is for, by auto_scale_lr, '
        'else by the file name (8xb2)',
    )
    parser.add_argument(
        '--accumulate', type=int, help='iterations per step of the optimizer; default: as it is'
    )
    parser.add_argument(
        '--schedule',
        choices=('images', 'keep'),
        default='images',
        help='images: a schedule by iterations is stretched, so that as many images are seen; '
        'keep: as many iterations as before; default: images',
    )
    parser.add_argument(
        '--backbone',
        choices=('auto', 'keep', 'convert'),
        default='auto',
        help='keep: a BN backbone stays as it is with its weights, frozen; neck and heads get '
        'WS + BCN; convert: it is converted as well, and loses them; auto: kept where its weights '
        'are on this machine; default: auto',
    )
    parser.add_argument('--keep-lr', action='store_true', help='do not scale the learning rate')
    parser.add_argument(
        '--keep-dcn',
        action='store_true',
        help='deformable convolutions stay as they are, the others get WS',
    )
    parser.add_argument('--checkpoint', help='backbone weights that were trained with these layers')
    return parser.parse_args()


def main() -> None:
    """Converts, prints the difference, writes."""
    options = vars(parse_args())
    source, out = options.pop('source'), options.pop('out')
    from wsbcn_mm.openmmlab import command_line
    from wsbcn_mm.openmmlab.conversion.convert import convert_config
    from wsbcn_mm.openmmlab.conversion.write import write_config

    with command_line.errors_in_one_line():
        conversion = convert_config(source, **options)
        if out is not None:
            write_config(conversion, out)
    print(conversion)
    print(f'written: {out}' if out else 'nothing written: give -o FILE')


if __name__ == '__main__':
    main()
