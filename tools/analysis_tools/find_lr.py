"""Finds a learning rate: trains a few hundred steps at a rising rate and looks at the loss.

The config's own data, batch, optimizer and starting weights; nothing is kept but the picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsbcn_mm.openmmlab.measure.learning_rate import RangeTest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(__doc__, checkpoint=None)
    parser.add_argument('--steps', type=int, default=300, help='steps of the optimizer')
    parser.add_argument('--lowest', type=float, default=1e-5, help='the first rate')
    parser.add_argument('--highest', type=float, default=1.0, help='the last rate')
    parser.add_argument('-o', '--out', default='find_lr.png', help='the picture')
    return parser.parse_args()


def draw(found: RangeTest, now: float, title: str, out: Path) -> None:
    """The loss over the rate, with the suggestion and the config's own rate."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axis.plot(found.rates, found.losses, '.', color='#9cc', markersize=4, label='loss of a step')
    axis.plot(found.rates, found.smooth, color='#0a6c74', linewidth=2, label='average')
    if found.suggestion is not None:
        text = f'suggestion: {found.suggestion:g}'
        axis.axvline(found.suggestion, color='#d98032', linewidth=2, label=text)
    axis.axvline(now, color='#888', linestyle='--', label=f'the config: {now:g}')
    high = sorted(found.losses)[int(0.98 * (len(found.losses) - 1))]
    axis.set(xscale='log', xlabel='learning rate', ylabel='loss', title=title)
    axis.set_ylim(0, 1.1 * max(high, *found.smooth))
    axis.grid(alpha=0.3)
    axis.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    """Tests, draws, suggests."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line, config, files, preflight
    from wsbcn_mm.openmmlab.conversion import schedulers
    from wsbcn_mm.openmmlab.measure import learning_rate

    with command_line.errors_in_one_line():
        out = Path(args.out)
        if out.suffix != '.png':
            raise ValueError(f'--out must name a .png file\n  got {args.out}')
        files.check_place(out)
        cfg = config.load_config(args.config, args.cfg_options)
        preflight.check_amp(cfg)
        preflight.check_pretrained(cfg)
        preflight.check_data(cfg, 'train_dataloader')
        with command_line.errors_of_a_run(cfg, 'train_dataloader'):
            found = learning_rate.range_test(
                cfg,
                args.lowest,
                args.highest,
                args.steps,
                lambda text: print(f'\r{text:<40}', end='', file=sys.stderr, flush=True),
            )
        print(file=sys.stderr)
        now = cfg.optim_wrapper.optimizer.lr
        draw(found, now, Path(args.config).name, out)
        print(f'picture: {out}')
        if found.suggestion is None:
            sys.exit(
                'no suggestion: the loss fell at no rate. Look at the picture: try --steps '
                f'{3 * args.steps} or another range (--lowest, --highest). Where the loss jumps '
                'from step to step, as with one label a step, keep the rate of convert_config.py'
            )
        print(f'suggested learning rate: {found.suggestion:g} (the config has {now:g})')
        print(f'--cfg-options {schedulers.rate_options(cfg, found.suggestion)}')


if __name__ == '__main__':
    main()
