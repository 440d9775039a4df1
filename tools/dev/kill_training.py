"""Kills a training at random moments (kill -9) and resumes it; the result must be as if it had not.

Trains a small model with tools/train.py, in one process or in two (gloo), with a checkpoint every
few steps. Each life ends with a kill of all its processes, or of one of them, some of them while a
checkpoint is being written. After each death every checkpoint must be complete. At the end weights,
estimates and optimizer must equal, bit for bit, those of a training that was left alone.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # also from a clone not installed

MODULE = '''
import os, pathlib
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from torch import nn
from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.estimates import layers_of

@MODELS.register_module()
class KillModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(WSConv2d(3, 16, 3), BatchChannelNorm2d(16, 4), nn.ReLU(),
                                  WSConv2d(16, 16, 3), BatchChannelNorm2d(16, 4), nn.ReLU())
        self.head = nn.Conv2d(16, 1, 1)
        # Makes the checkpoint large, so that writing it takes a part of the time.
        self.register_buffer('ballast', torch.zeros(BALLAST))
    def forward(self, inputs, mode='tensor'):
        x = torch.stack(list(inputs))
        return dict(loss=(self.head(self.body(x)).mean((1, 2, 3)) - x[:, 0, 0, 0]).square().mean())

@DATASETS.register_module()
class KillData(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return dict(inputs=torch.randn(3, 16, 16, generator=g) + i % 5)

@HOOKS.register_module()
class KillProbe(Hook):
    """Says that training runs; compares the ranks before each checkpoint."""
    priority = 'LOW'
    def before_train(self, runner):
        rank = os.environ.get('RANK', '0')
        pathlib.Path(runner.work_dir, f'running-{rank}').write_text(f'{os.getpid()} {runner.iter}')
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not torch.distributed.is_initialized() or not self.every_n_train_iters(runner, EVERY):
            return
        model = runner.model.module
        mine = torch.cat([torch.stack([l.bn.running_mean, l.bn.running_var]).flatten()
                          for l in layers_of(model).values()])
        all_ = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(all_, mine)
        if not all(torch.equal(mine, other) for other in all_):
            raise SystemExit('THE RANKS DIFFER')
'''
CONFIG = """
custom_imports = dict(imports=['wsbcn_mm', 'kill_model'])
model = dict(type='KillModel')
train_dataloader = dict(batch_size=1, num_workers=0, dataset=dict(type='KillData'),
                        sampler=dict(type='InfiniteSampler', shuffle=True, seed=1))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=STEPS)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.02, momentum=0.9))
param_scheduler = [dict(type='PolyLR', power=0.9, by_epoch=False, end=STEPS)]
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', interval=EVERY, by_epoch=False, max_keep_ckpts=2),
    logger=dict(type='LoggerHook', interval=100))
custom_hooks = [dict(type='EstimatesHook'), dict(type='KillProbe')]
log_processor = dict(by_epoch=False)
randomness = dict(seed=3)
log_level = 'ERROR'
"""


def start(folder: Path, name: str, ranks: int, port: int) -> subprocess.Popen:
    """A training that resumes what stands in its work dir."""
    tool = REPOSITORY / 'tools' / 'train.py'
    arguments = [folder / 'config.py', '--work-dir', folder / name, '--resume']
    command = [sys.executable, tool, *arguments]
    if ranks > 1:
        command = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            f'--nproc_per_node={ranks}',
            f'--master_port={port}',
            tool,
            *arguments,
            '--launcher',
            'pytorch',
        ]
    settings = dict(
        PYTHONPATH=f'{REPOSITORY}{os.pathsep}{folder}',
        OMP_NUM_THREADS='1',
        PYTHONWARNINGS='ignore',
    )
    with open(folder / f'{name}.log', 'ab') as log:
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **settings},
        )


def pids(work: Path, ranks: int, process: subprocess.Popen) -> list[int] | None:
    """Of the ranks, once all of them train; None when the training ended before."""
    files = [work / f'running-{rank}' for rank in range(ranks)]
    while not all(file.is_file() and len(file.read_text().split()) == 2 for file in files):
        if process.poll() is not None:
            return None
        time.sleep(0.01)
    return [int(file.read_text().split()[0]) for file in files]


def final_state(work: Path) -> dict:
    """What the last checkpoint holds of weights, statistics and optimizer, by name."""
    import torch

    from wsbcn_mm.openmmlab.checkpoints import read_checkpoint
    from wsbcn_mm.openmmlab.files import latest_complete

    path, _ = latest_complete(work)
    assert path is not None, f'no complete checkpoint in {work}'
    content = read_checkpoint(path)
    tensors = dict(content['state_dict'])
    for i, state in content['optimizer']['state'].items():
        tensors |= {f'optimizer.{i}.{key}': value for key, value in state.items()}
    tensors['iter'] = torch.tensor(content['meta']['iter'])
    return tensors


def main() -> None:
    """Runs the lives; exits with 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='an empty folder')
    parser.add_argument('--ranks', type=int, default=1, help='processes')
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--steps', type=int, default=1500, help='of the whole training')
    parser.add_argument('--every', type=int, default=5, help='steps between checkpoints')
    parser.add_argument('--megabytes', type=float, default=20, help='size of a checkpoint')
    parser.add_argument('--longest', type=float, default=1.5, help='seconds until a kill')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--port', type=int, default=29611)
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        sys.exit(f'error: {args.folder} is not empty')
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    values = dict(BALLAST=int(args.megabytes * 250_000), EVERY=args.every, STEPS=args.steps)
    for name, text in (('kill_model.py', MODULE), ('config.py', CONFIG)):
        for key, value in values.items():
            text = text.replace(key, str(value))
        (folder / name).write_text(text)

    import torch

    from wsbcn_mm.openmmlab.files import damage

    def ended_well(name: str) -> None:
        process = start(folder, name, args.ranks, args.port)
        if process.wait(timeout=900) != 0:
            sys.exit(f'error: the training failed, see {folder / name}.log')

    print(
        f'{args.ranks} process(es), {args.steps} steps, a checkpoint of {args.megabytes:.0f} MB '
        f'every {args.every}, seed {args.seed}'
    )
    ended_well('alone')
    expected = final_state(folder / 'alone')

    choice, work, writing, partial, bad = random.Random(args.seed), folder / 'killed', 0, 0, []
    for life in range(args.kills):
        for file in work.glob('running-*'):
            file.unlink()
        process = start(folder, 'killed', args.ranks, args.port)
        targets = pids(work, args.ranks, process)
        if targets is None:
            sys.exit(f'error: life {life} ended by itself, see {folder}/killed.log; more --steps?')
        resumed = (work / 'running-0').read_text().split()[1]
        time.sleep(choice.uniform(0, args.longest))
        one = args.ranks > 1 and choice.random() < 0.5
        for pid in [choice.choice(targets)] if one else targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        leftover = list(work.glob('*.tmp-*'))
        process.wait(timeout=120)  # torchrun ends the rank that was left
        checkpoints = sorted(work.glob('iter_*.pth'))
        damaged = [f'{path.name} {damage(path)}' for path in checkpoints if damage(path)]
        bad += damaged
        writing += bool(leftover)
        partial += one
        names = ', '.join(path.stem for path in checkpoints) or 'none yet'
        print(
            f'life {life + 1:2}: resumed at step {resumed}, killed '
            f'{"one of two" if one else "all"}{", while writing" if leftover else ""}; '
            f'complete: {names}{"; DAMAGED: " + ", ".join(damaged) if damaged else ""}',
            flush=True,
        )
    ended_well('killed')
    found = final_state(work)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    log = (folder / 'killed.log').read_text(errors='replace')
    apart = log.count('THE RANKS DIFFER')
    print(
        f'{args.kills} kills ({partial} of one rank alone), {writing} while a checkpoint was '
        f'written: {len(bad)} damaged checkpoints, {apart} times different estimates on the ranks, '
        f'{len(different)} of {len(expected)} tensors differ from the training left alone'
    )
    if bad or apart or different:
        sys.exit(1)


if __name__ == '__main__':
    main()
