"""Lists what is wrong with a config or a checkpoint for training with 1-2 images per GPU.

Exit code 0: nothing; 1: errors or warnings were found; 2: it could not be read.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='config file, mmdet::... / mmseg::... name, or checkpoint')
    parser.add_argument('--images-per-gpu', type=int, help='as if trained with so many')
    parser.add_argument('--gpus', type=int, help='number of processes')
    parser.add_argument('--strict', action='store_true', help='notes count for the exit code')
    return parser.parse_args()


def main() -> None:
    """Audits, prints, tells by the exit code."""
    args = parse_args()
    from wsbcn_mm.audit import has_problems
    from wsbcn_mm.openmmlab import command_line
    from wsbcn_mm.openmmlab.audit import audit

    try:
        findings = audit(args.source, args.images_per_gpu, args.gpus)
    except command_line.USER_ERRORS as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    for finding in findings:
        print(finding)
    print(f'{args.source}: {len(findings)} finding{"s" * (len(findings) != 1)}')
    sys.exit(has_problems(findings, args.strict))


if __name__ == '__main__':
    main()
