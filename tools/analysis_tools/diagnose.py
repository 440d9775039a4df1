"""Shows why a model trains well or badly: dead channels, wrong estimates, steep gradients.

Writes OUT/index.html, one page with everything in it, and OUT/diagnostics.json, its numbers.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(__doc__)
    parser.add_argument('-o', '--out', default='report', help='folder of the page')
    parser.add_argument('--images', type=int, default=64, help='validation images to look at')
    parser.add_argument(
        '--train-batches', type=int, default=4, help='training batches for gradients, smoothness'
    )
    parser.add_argument(
        '--step-size', type=float, help="learning rate for the smoothness; default: the config's"
    )
    parser.add_argument(
        '--against', metavar='JSON', help='diagnostics.json of another model, drawn beside this one'
    )
    return parser.parse_args()


def main() -> None:
    """Measures, then writes the page."""
    args = parse_args()
    from diagnosis_page import read_numbers, write_page

    from wsbcn_mm.openmmlab import checkpoints, command_line, config, files, preflight
    from wsbcn_mm.openmmlab.measure import diagnosis

    with command_line.errors_in_one_line():
        for name in ('images', 'train_batches', 'step_size'):
            value = getattr(args, name)
            if value is not None and value <= 0:
                raise ValueError(f'--{name.replace("_", "-")} must be positive\n  got {value}')
        out = Path(args.out)
        files.check_place(out, folder=True)
        other = read_numbers(args.against) if args.against else None
        cfg = config.load_config(args.config, args.cfg_options)
        checkpoints.check_checkpoint(args.checkpoint)
        preflight.check_data(cfg, 'train_dataloader', 'val_dataloader')
        cfg.work_dir, cfg.log_level, cfg.load_from = str(out / 'log'), 'ERROR', None
        with command_line.errors_of_a_run(cfg, 'train_dataloader', 'val_dataloader'):
            numbers = diagnosis.diagnose(
                cfg,
                args.checkpoint,
                args.images,
                args.train_batches,
                args.step_size,
                lambda text: print(f'\r{text:<40}', end='', file=sys.stderr, flush=True),
            )
        print(file=sys.stderr)
    (out / 'diagnostics.json').write_text(json.dumps(numbers) + '\n')
    write_page(numbers, out / 'index.html', other)
    for name, value in numbers['summary'].items():
        if value is not None:
            print(f'  {name:<22} {value:.4g}')
    for finding in numbers['verdict']:
        advice = f'\n    try: {finding["advice"]}' if finding['advice'] else ''
        print(f'{finding["level"]}: {finding["text"]}{advice}')
    print(f'  page                   {out / "index.html"}')


if __name__ == '__main__':
    main()
