"""Converts a published checkpoint into one for models with WS + BCN or WS + GN."""

import argparse
import sys
from pathlib import Path

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
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Reads, converts, prints every key, writes."""
    from wsbcn_mm.checkpoint_layouts import convert_state
    from wsbcn_mm.openmmlab import files
    from wsbcn_mm.openmmlab.checkpoints import read_checkpoint, state_dict_of

    state = state_dict_of(read_checkpoint(args.checkpoint), args.checkpoint)
    state = {k.removeprefix(args.prefix): v for k, v in state.items() if k.startswith(args.prefix)}
    if not state:
        raise ValueError(f'{args.checkpoint} has no name that starts with {args.prefix!r}')
    done = convert_state(state, args.source, args.to, args.num_groups)
    for old, new in done.moved:
        print(f'{old} -> {new}')
    for key, value in done.added.items():
        print(f'(new) -> {key} = {value}')
    for key, reason in done.dropped.items():
        print(f'dropped: {key}: {reason}')
    for key, reason in done.left.items():
        print(f'NOT CONVERTED: {key}: {reason}')
    if done.left:
        first = {key.partition('.')[0] for key in state}
        hint = f"\n  all names start with '{min(first)}.': give --prefix" if len(first) == 1 else ''
        raise ValueError(
            f'{len(done.left)} of {len(state)} tensors were not converted, see above; nothing was '
            f'written{hint}'
        )
    meta = dict(
        formula=done.formula,
        affine=done.affine,
        num_groups=done.num_groups,
        converted_from=args.source,
        converted_to=args.to,
    )
    files.save_atomically(dict(meta=meta, state_dict=done.state), args.out)
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
