"""Trains the model of a config: the arguments of MMDetection's tool of the same name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a clone not installed


# What a config that the audit was not made for raises in it: the model cannot be built before the
# training, or a part has another shape.
AUDIT_FAILS = (ValueError, TypeError, LookupError, AttributeError, ImportError, OSError)


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    parser = command_line.parser_of(__doc__, checkpoint=None, launcher=True)
    parser.add_argument('--work-dir', help='folder of logs and checkpoints')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's base batch size to the actual one",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint; without a value from the latest in the work dir',
    )
    parser.add_argument(
        '--audit',
        choices=('print', 'stop', 'off'),
        default='print',
        help='before training, what tools/analysis_tools/audit.py finds is printed; stop: errors '
        'and warnings end the run; default: print',
    )
    return command_line.parse(parser)


def print_audit(cfg: Config, mode: str) -> None:
    """Audits what is about to be trained; ``mode`` as ``--audit``.

    Raises:
        ValueError: an error or a warning was found, and ``mode`` is ``'stop'``.
    """
    from wsbcn_mm.audit import has_problems
    from wsbcn_mm.openmmlab import command_line
    from wsbcn_mm.openmmlab.audit import audit_config
    from wsbcn_mm.openmmlab.conversion import rates
    from wsbcn_mm.openmmlab.errors import first_line

    rank, world = command_line.processes(cfg.launcher)
    if mode == 'off' or rank > 0:
        return
    try:
        findings = audit_config(rates.as_scaled(cfg, world), gpus=world)
    except AUDIT_FAILS as error:  # what trains must not be stopped by what looks at it
        print(f'audit: not done: {type(error).__name__}: {first_line(error)}', file=sys.stderr)
        return
    for finding in findings:
        print(f'audit: {finding}', file=sys.stderr)
    if mode == 'stop' and has_problems(findings):
        raise ValueError('--audit stop: training was not started because of the findings above')


def configure(args: argparse.Namespace) -> Config:
    """The config of this run; raises where something that it needs is missing."""
    from wsbcn_mm.openmmlab import checkpoints, command_line, config, preflight

    cfg = command_line.read_run(args)
    preflight.check_train(cfg)
    if args.amp and cfg.get('optim_wrapper') is not None:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if not {'enable', 'base_batch_size'} <= set(cfg.get('auto_scale_lr') or {}):
            raise ValueError(
                f'--auto-scale-lr: {args.config} does not say which batch size its learning rate '
                'is for\n  add auto_scale_lr = dict(enable=False, base_batch_size=...) to it'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        for line in command_line.resume_from(cfg, args.resume):
            print(f'not resumed from: {line}', file=sys.stderr)
    elif cfg.get('load_from') is not None:
        checkpoints.check_checkpoint(cfg.load_from)
    preflight.check_amp(cfg)
    preflight.check_pretrained(cfg)
    preflight.check_data(cfg, 'train_dataloader', 'val_dataloader')
    command_line.harden(cfg)
    print_audit(cfg, args.audit)
    config.add_hook(cfg, dict(type='CheckpointReportHook'))
    config.add_hook(cfg, dict(type='DataCheckHook'))
    command_line.prepare_distributed(cfg, args.launcher)
    return cfg


def main() -> None:
    """Reads the config and trains."""
    args = parse_args()
    from wsbcn_mm.openmmlab import command_line

    with command_line.errors_in_one_line():
        cfg = configure(args)
    with command_line.errors_of_a_run(cfg, 'train_dataloader', 'val_dataloader'):
        command_line.train(cfg, may_be_done=args.resume == 'auto')


if __name__ == '__main__':
    main()
