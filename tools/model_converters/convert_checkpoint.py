"""Converts a published checkpoint into one for models with WS + BCN or WS + GN."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsbcn_mm.checkpoint_layouts import Conversion

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.checkpoint_layouts import SOURCES, TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('-o', '--out', required=True, help='file to write')
    parser.add_argument('--from', dest='source', choices=SOURCES, required=True, help='its layout')
    parser.add_argument('--to', choices=TARGETS, default='bcn-ws', help='the layers to convert for')
    parser.add_argument(
        '--num-groups',
        type=int,
        default=32,
        help='groups of the norms, as in the config (ignored where the file says it)',
    )
    parser.add_argument(
        '--prefix',
        default='',
        help="convert the tensors alone whose names start so, without it: 'backbone.' of a model",
    )
    parser.add_argument(
        '--names',
        choices=('openmmlab', 'mmaction', 'mmaction-tsm'),
        default='openmmlab',
        help="mmaction: those of MMAction2's ResNet; mmaction-tsm: of its ResNetTSM",
    )
    parser.add_argument('-v', '--verbose', action='store_true', help='print every tensor')
    return parser.parse_args()


def print_tensors(done: 'Conversion', every: bool) -> None:
    """What became of the tensors: every one, or of each kind the number and the first."""
    kinds = {
        'under their names': [old for old, new in done.moved if old == new],
        'renamed': [f'{old} -> {new}' for old, new in done.moved if old != new],
        'new': [f'(new) -> {key} = {value}' for key, value in done.added.items()],
        'dropped': [f'{key}: {reason}' for key, reason in done.dropped.items()],
    }
    for kind, lines in kinds.items():
        if lines:
            more = '' if every or len(lines) == 1 else ', such as'
            print(f'{len(lines)} tensors {kind}{more}')
            for line in lines if every else lines[:1]:
                print(f'  {line}')


def run(args: argparse.Namespace) -> None:
    """Reads, converts, says what became of the tensors, writes."""
    from wsbcn_mm.checkpoint_layouts import convert_state, name_in_mmaction
    from wsbcn_mm.openmmlab import files
    from wsbcn_mm.openmmlab.checkpoints import read_checkpoint, state_dict_of

    state = state_dict_of(read_checkpoint(args.checkpoint), args.checkpoint)
    state = {k.removeprefix(args.prefix): v for k, v in state.items() if k.startswith(args.prefix)}
    if not state:
        raise ValueError(f'{args.checkpoint} has no name that starts with {args.prefix!r}')
    done = convert_state(state, args.source, args.to, args.num_groups)
    print_tensors(done, args.verbose)
    for key, reason in done.left.items():
        print(f'NOT CONVERTED: {key}: {reason}')
    if done.left:
        first = {key.partition('.')[0] for key in state}
        hint = f"\n  all names start with '{min(first)}.': give --prefix" if len(first) == 1 else ''
        raise ValueError(
            f'{len(done.left)} of {len(state)} tensors were not converted, see above; nothing was '
            f'written{hint}'
        )
    new = done.state
    if args.names != 'openmmlab':
        shifted = args.names == 'mmaction-tsm'
        new = {name_in_mmaction(key, args.to, shifted): value for key, value in new.items()}
    meta = dict(
        formula=done.formula,
        affine=done.affine,
        num_groups=done.num_groups,
        converted_from=args.source,
        converted_to=args.to,
    )
    files.save_atomically(dict(meta=meta, state_dict=new), args.out)
    print(
        f'{args.out}: {len(done.moved)} tensors moved, {len(done.added)} new, '
        f'{len(done.dropped)} dropped'
    )
    print('what the config needs where this is loaded:')
    print(f"  conv_cfg=dict(type='WSConv2d', formula={done.formula!r})")
    groups = done.num_groups
    if done.affine is None:
        print(f"  norm_cfg=dict(type='GN', num_groups={groups})")
    else:
        affine = '' if done.affine == 'group' else f', affine={done.affine!r}'
        print(f"  norm_cfg=dict(type='BCN', num_groups={groups}{affine})")
    if not done.preserves:
        print('standardizing the weights of a BN network changes its function: train it further')
    elif args.source != 'authors-bcn' and args.to == 'bcn-ws':
        print(
            'the model computes what it did; its running estimates are not known yet. Before '
            'training:\n  python tools/model_converters/recalibrate.py CONFIG '
            f'{args.out} --keep-function'
        )


def main() -> None:
    """Runs, and turns mistakes of the user into one message."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line

    with command_line.errors_in_one_line():
        run(args)


if __name__ == '__main__':
    main()
