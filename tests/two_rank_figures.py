"""Prints how far two ranks with one image each are from one process with both images.

``PYTHONPATH=. python tests/two_rank_figures.py``; the cases are those of test_distributed.py.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import test_distributed as cases
from tests.ranks import in_two_ranks


def run(rank):
    torch.distributed.init_process_group('gloo')
    return cases.case_nets(rank)


def error(found, expected):
    """Largest, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main():
    ranks = in_two_ranks(run)
    print('| mode | dtype | outputs | gradient of x | weights | estimates | ranks equal |')
    print('|---|---|---|---|---|---|---|')
    for dtype in (torch.float64, torch.float32):
        for mode in ('estimate', 'batch'):
            net = cases.Net(mode, 'forward', dtype)
            expected = cases.train(net, slice(None), 1, dtype)
            first, second = (rank[f'forward/{mode}/{dtype}'] for rank in ranks)
            errors = [
                error(cases.interleaved(first[kind], second[kind]), expected[kind])
                for kind in ('outputs', 'grad_x')
            ]
            for running in (False, True):
                errors.append(
                    max(
                        error(first['state'][name], value)
                        for name, value in expected['state'].items()
                        if value.is_floating_point() and ('running' in name) == running
                    )
                )
            same = all(
                torch.equal(first['state'][name], second['state'][name])
                for name in expected['state']
            )
            figures = ' | '.join(f'{value:.1e}' for value in errors)
            print(f'| {mode} | {str(dtype)[6:]} | {figures} | {"yes" if same else "NO"} |')


if __name__ == '__main__':
    main()
