"""Counts the collectives of one training step of ResNet-50 + FPN in two processes (gloo).

Counted where torch.distributed is called; gradients are not reduced here, their collectives are
those of every model. SyncBatchNorm of torch refuses CPU tensors; batch mode over ranks
(``mode='batch', sync='forward'``) has the same structure: one gather forward and one all-reduce
backward per layer.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed

import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

COLLECTIVES = ('all_reduce', 'all_gather', 'all_gather_into_tensor', 'broadcast', 'reduce')


def run(rank: int, folder: str, size: int) -> None:
    """One rank; the first one prints."""
    from mmengine.registry import MODELS, init_default_scope

    import wsbcn_mm.openmmlab  # noqa: F401
    from wsbcn_mm.estimates import layers_of, synchronize_estimates

    torch.set_num_threads(1)
    init_default_scope('mmdet')
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    calls: list[tuple[str, int]] = []
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, original=original, name=name, **kwargs):
            sent = args[1] if name.startswith('all_gather') else args[0]
            calls.append((name, sent.numel() * sent.element_size()))
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(rank))
    lines = []
    variants: dict[str, dict] = {
        "estimate mode, sync='step'": dict(sync='step'),
        "estimate mode, sync='forward'": dict(sync='forward'),
        "batch mode, sync='forward' (as SyncBN)": dict(mode='batch', sync='forward'),
        'estimate mode, sync=None': dict(sync=None),
    }
    for title, arguments in variants.items():
        norm = dict(type='BCN', num_groups=32, **arguments)
        torch.manual_seed(0)
        model = nn.Sequential(
            MODELS.build(
                dict(
                    type='ResNet',
                    depth=50,
                    norm_cfg=norm,
                    conv_cfg=dict(type='WSConv2d'),
                    norm_eval=False,
                    frozen_stages=-1,
                )
            ),
            MODELS.build(
                dict(
                    type='FPN',
                    in_channels=[256, 512, 1024, 2048],
                    out_channels=256,
                    num_outs=5,
                    norm_cfg=norm,
                    conv_cfg=dict(type='WSConv2d'),
                )
            ),
        )
        calls.clear()
        sum(level.square().mean() for level in model(x)).backward()
        synchronize_estimates(model)
        kinds = ', '.join(
            f'{sum(n == name for n, _ in calls)} {name}'
            for name in COLLECTIVES
            if any(n == name for n, _ in calls)
        )
        layers = list(layers_of(model).values())
        kilobytes = sum(size for _, size in calls) / 1024
        lines.append(
            f'| {title} | {len(layers)} | {sum(n.num_channels for n in layers)} | {len(calls)} '
            f'({kinds or "none"}) | {kilobytes:.0f} KB |'
        )
    if rank == 0:
        print(
            '| R50-FPN | layers | channels | collectives per step | sent per rank |\n'
            '|---|---|---|---|---|\n' + '\n'.join(lines)
        )
    dist.destroy_process_group()


def main() -> None:
    """Starts the two ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, default=64, help='height and width of the images')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (folder, args.size), nprocs=2)


if __name__ == '__main__':
    main()
