"""The tools as a user runs them: a short real run each, and what they say to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import in_two_ranks
from tests.tool import tool
from wsbcn_mm import shapes

pytest.importorskip('mmdet', reason='the quick detector is built from it')

ROOT = Path(__file__).parents[2]
QUICK = 'configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with the drawn dataset in it, in small."""
    folder = tmp_path_factory.mktemp('user')
    shapes.draw_dataset(folder / 'data/shapes', num_train=4, num_val=2, size=(96, 80))
    return folder


def run(folder, *command, **environment):
    env = dict(os.environ, OMP_NUM_THREADS='1', WSBCN_PYTHON=sys.executable) | environment
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


DATA = [f'{split}_dataloader.dataset' for split in ('train', 'val', 'test')]
SHORT = [
    '--cfg-options',
    *(f'{data}.type=CocoDataset' for data in DATA),  # as the drawn one wants to be complete
    *(f'{data}.metainfo.classes={shapes.CLASSES}'.replace(' ', '') for data in DATA),
    'train_cfg.val_interval=1',
    'train_cfg.max_epochs=1',
    'default_hooks.logger.interval=2',
]


def scalars(work_dir):
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_train_and_test(folder):
    work = folder / 'single'
    done = tool('train.py', ROOT / QUICK, '--work-dir', work, *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    records = scalars(work)
    assert [r['step'] for r in records if 'loss' in r] == [2, 4]
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(records[-1])

    # What was saved evaluates to the same numbers, and the pictures are written.
    checkpoint = (work / 'last_checkpoint').read_text()
    done = tool(
        'test.py',
        ROOT / QUICK,
        checkpoint,
        '--work-dir',
        folder / 'tested',
        '--show-dir',
        'pictures',
        '--out',
        folder / 'predictions.pkl',
        *SHORT,
        'resume=True',  # of the training; here it says nothing
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (metrics,) = (folder / 'tested').glob('*/*.json')
    tested = json.loads(metrics.read_text())
    assert tested['coco/segm_mAP'] == records[-1]['coco/segm_mAP']
    assert len(list((folder / 'tested').glob('*/pictures/*.jpg'))) == 2
    assert (folder / 'predictions.pkl').stat().st_size > 0

    # And it resumes: two more epochs asked for, one there.
    done = tool(
        'train.py',
        ROOT / QUICK,
        '--work-dir',
        work,
        '--resume',
        *SHORT[:-2],
        'train_cfg.max_epochs=2',
        'default_hooks.logger.interval=2',
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'resumed epoch: 1, iter: 4' in done.stdout + done.stderr
    assert (work / 'epoch_2.pth').exists()


def train(rank, folder, options):
    arguments = '--work-dir', folder / 'distributed', '--launcher', 'pytorch', *options
    done = tool('train.py', ROOT / QUICK, *arguments, cwd=folder)
    return done.returncode, done.stderr[-3000:]


def test_two_processes_on_the_cpu(folder):
    """mmengine alone asks CUDA for its device and fails; 4 images are 2 steps of 2 processes."""
    options = [*SHORT, 'default_hooks.logger.interval=1']
    for code, said in in_two_ranks(train, folder, options):
        assert code == 0, said
    records = scalars(folder / 'distributed')
    assert [r['step'] for r in records if 'loss' in r] == [1, 2]
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(records[-1])


@pytest.mark.parametrize('name, files', [('train', ['a.py']), ('test', ['a.py', 'b.pth'])])
def test_the_scripts_for_several_processes_start_the_tools(folder, name, files):
    """In as many processes as they say."""
    python = folder / 'python'
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    arguments = *files, 2, '--cfg-options', 'a b'
    script = ROOT / f'tools/dist_{name}.sh'
    done = run(folder, 'bash', script, *arguments, WSBCN_PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert '-m torch.distributed.run' in done.stdout and '--nproc_per_node=2' in done.stdout
    command = f'{name}.py {" ".join(files)} --cfg-options a b --launcher pytorch'
    assert done.stdout.strip().endswith(f'tools/{command}')


def test_a_checkpoint_of_another_model_is_not_evaluated(folder):
    path = folder / 'other.pth'
    torch.save({'state_dict': {'backbone.conv1.weight': torch.zeros(3)}}, path)
    done = tool('test.py', ROOT / QUICK, path, *SHORT, cwd=folder)
    assert done.returncode == 1
    assert 'does not fill' in done.stderr and '(100 %)' in done.stderr


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['configs/quick/quick_maskrcnn_r18.py'], ['no config file', 'did you mean', QUICK[14:]]),
        (
            [ROOT / 'configs/mask_rcnn/mask-rcnn_r50_fpn_ws-bcn_8xb1-scratch-6x_coco.py'],
            ['data/coco/annotations/instances_train2017.json', 'expected layout'],
        ),
        ([ROOT / QUICK, '--resume', 'nowhere.pth'], ['no checkpoint file nowhere.pth']),
    ],
)
def test_train_says_what_is_missing(folder, arguments, words):
    done = tool('train.py', *arguments, cwd=folder)
    assert done.returncode == 1
    for word in words:
        assert word in done.stderr
