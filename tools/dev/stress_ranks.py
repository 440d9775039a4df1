"""Many steps in several processes (gloo): are the estimates the same everywhere, and right?

Each step every rank gets 0 to 3 images of its own, sometimes one with an overflow. After each step
the estimates of all ranks must be the same bits and finite. Those of the first layer, whose inputs
do not depend on the weights, are compared with one process that gets all images.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed

import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d, reference
from wsbcn_mm.estimates import layers_of, skipped_updates, synchronize_estimates


def shares(step: int, ranks: int) -> list[torch.Tensor]:
    """What each rank gets; of different light."""
    g = torch.Generator().manual_seed(step)
    counts = torch.randint(0, 4, (ranks,), generator=g).tolist()
    parts = [
        torch.randn(n, 8, 12, 12, generator=g) * (1 + rank) + rank + step % 5
        for rank, n in enumerate(counts)
    ]
    if step % 20 == 13:
        rank = step // 20 % ranks
        if counts[rank]:
            parts[rank][0, 3, 0, 0] = torch.inf
    return parts


def run(rank: int, ranks: int, steps: int, sync: str, folder: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/{sync}', rank=rank, world_size=ranks
    )
    torch.manual_seed(0)
    norm = BatchChannelNorm2d(8, 2, sync=sync)
    model = nn.Sequential(
        norm,
        WSConv2d(8, 16, 3),
        BatchChannelNorm2d(16, 4, sync=sync),
        nn.ReLU(),
        WSConv2d(16, 16, 3),
        BatchChannelNorm2d(16, 4, sync=sync),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    mean, var = torch.zeros(8).double(), torch.ones(8).double()
    worst, apart, skipped_steps, start = 0.0, 0, 0, time.perf_counter()
    for step in range(steps):
        parts = shares(step, ranks)
        y = model(parts[rank])
        optimizer.zero_grad()
        g = torch.Generator().manual_seed(step)
        (y * torch.randn(y.shape[1:], generator=g)).sum().backward()
        shared = [p.grad for p in model.parameters() if p.grad is not None]
        gradients = torch.cat([part.flatten() for part in shared])
        dist.all_reduce(gradients)
        if gradients.isfinite().all():  # as loss scaling decides
            for part, g in zip(shared, gradients.split([g.numel() for g in shared])):
                part.copy_(g.view_as(part))
            optimizer.step()
        else:
            skipped_steps += 1
        synchronize_estimates(model)

        mine = torch.cat(
            [
                value
                for layer in layers_of(model).values()
                for value in (layer.bn.running_mean, layer.bn.running_var)
            ]
        )
        everyones = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(everyones, mine)
        apart += not (all(torch.equal(mine, e) for e in everyones) and mine.isfinite().all())
        # 'forward' leaves the channel out everywhere, 'step' only on the rank with the overflow.
        sums = [torch.zeros(8).double(), torch.zeros(8).double(), torch.zeros(8).double()]
        whole = [torch.cat(parts)] if sync == 'forward' else parts
        for part in (p.double() for p in whole if len(p)):
            new = reference.update_estimates(part, mean, var, 0.01)
            kept = (part.sum((0, 2, 3)).isfinite() * len(part)).double()
            for total, value in zip(sums, (*new, torch.ones(8))):
                total += kept * value
        some = sums[2] > 0
        mean = torch.where(some, sums[0] / sums[2], mean)
        var = torch.where(some, sums[1] / sums[2], var)
        error = max(
            ((norm.bn.running_mean - mean).abs() / var.sqrt()).max().item(),
            ((norm.bn.running_var - var).abs() / var).max().item(),
        )
        worst = max(worst, error)
    seconds = time.perf_counter() - start
    names = torch.tensor([max(skipped_updates(model).values(), default=0)])
    dist.all_reduce(names)
    if rank == 0:
        print(
            f"sync='{sync}', {ranks} processes, {steps} steps, {seconds:.0f} s: {apart} steps with "
            f'different or not finite estimates; first layer against one process in float64: '
            f'largest error {worst:.1e} standard deviations; {skipped_steps} overflow steps, '
            f'updates left out on some rank: {int(names)}',
            flush=True,
        )
    dist.destroy_process_group()
    if apart or worst > 1e-4:
        raise SystemExit(1)


def main() -> None:
    """Runs both ways of synchronising."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--ranks', type=int, default=4)
    parser.add_argument('--steps', type=int, default=500)
    args = parser.parse_args()
    for sync in ('step', 'forward'):
        with tempfile.TemporaryDirectory() as folder:
            spawn(run, (args.ranks, args.steps, sync, folder), nprocs=args.ranks)


if __name__ == '__main__':
    main()
