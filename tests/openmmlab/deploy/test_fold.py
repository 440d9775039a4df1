"""tools/model_converters/fold.py: what it writes is loaded where this package is not."""

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import json
import os
import re
import subprocess
import sys

import numpy as np

from tests.openmmlab.deploy.models import LISTED, QUICK, SIZE, tool
from wsbcn_mm.openmmlab import config
from wsbcn_mm.openmmlab.deploy import fold, inference, predict

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures


# Shapes of boxes and scores, summed: what stock OpenMMLab finds, without this package.
WITHOUT_US = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'wsbcn_mm':
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
try:
    import wsbcn_mm
except ModuleNotFoundError:
    pass
else:
    raise AssertionError('wsbcn_mm can be imported: this would show nothing')
import json, mmcv, numpy as np
scope, config, checkpoint, *images = sys.argv[1:]
if scope == 'mmdet':
    from mmdet.apis import inference_detector as infer, init_detector as init
else:
    from mmseg.apis import inference_model as infer, init_model as init
model = init(config, checkpoint, device='cpu')
for image in images:
    sample = infer(model, image)
    if scope == 'mmdet':
        found = sample.pred_instances
        print(json.dumps([found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist(),
                          found.masks.sum((1, 2)).tolist() if 'masks' in found else None]))
    else:
        print(json.dumps(sample.pred_sem_seg.data.tolist()))

from pathlib import Path
from mmengine.config import Config
from mmengine.runner import Runner

cfg = Config.fromfile(config)
cfg.load_from, cfg.work_dir = checkpoint, 'tested'
if Path(cfg.test_dataloader.dataset.data_root).exists():
    found = Runner.from_cfg(cfg).test()
    print('metrics', json.dumps({key: float(value) for key, value in found.items()}))
assert 'wsbcn_mm' not in sys.modules
"""


@pytest.mark.parametrize('name', [*QUICK, *LISTED])
def test_stock_openmmlab_loads_what_fold_writes(folder, name):
    """In a process where this package cannot be imported; predictions are those of the original."""
    source = QUICK.get(name, folder / f'{name}.py')
    evaluate = ['--evaluate'] if name in LISTED else []
    done = tool(
        'model_converters/fold.py',
        source,
        folder / f'{name}.pth',
        '-o',
        folder / 'stock',
        '--shape',
        *SIZE,
        *evaluate,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / 'stock' / f'{source.stem}_folded{suffix}' for suffix in ('.py', '.pth')]
    assert 'wsbcn_mm' not in files[0].read_text() and b'wsbcn_mm' not in files[1].read_bytes()
    assert 'largest relative error' in done.stdout and str(files[1]) in done.stdout
    assert ('folded_layers' in files[0].read_text()) == (name in LISTED)
    if name in LISTED:
        beside = folder / 'stock/folded_layers.py'
        assert 'wsbcn_mm' not in beside.read_text() and str(beside) in done.stdout

    cfg = config.load_config(str(source))
    images = sorted((folder / 'images').glob('*.*g'))[:2]
    code = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT_US, cfg.default_scope, *files, *images],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'},
    )
    assert code.returncode == 0, code.stderr[-3000:]
    metrics = [line for line in code.stdout.splitlines() if line.startswith('metrics')]
    assert len(metrics) == (name in LISTED)
    for key, value in json.loads(metrics[0].partition(' ')[2]).items() if metrics else ():
        original, folded = re.search(rf'^{key} +(\S+) +(\S+)$', done.stdout, re.MULTILINE).groups()
        assert abs(value - float(original)) < 2e-3 and abs(value - float(folded)) < 1e-4
    lines = [line for line in code.stdout.splitlines() if line.startswith('[')]
    assert len(lines) == len(images) == 2
    predictor = predict.Predictor(cfg, inference.load_model(cfg, str(folder / f'{name}.pth')))
    for line, file in zip(lines, images):
        sample, found = predictor(file)[1], json.loads(line)
        if cfg.default_scope == 'mmseg':
            same = np.asarray(found) == sample.pred_sem_seg.data.numpy()
            assert same.mean() > 0.999  # ties of two classes
            continue
        own = sample.pred_instances
        assert len(own) == len(found[0]) > 0
        np.testing.assert_allclose(found[0], own.bboxes.numpy(), atol=0.05)
        np.testing.assert_allclose(found[1], own.scores.numpy(), atol=1e-3)
        assert found[2] == own.labels.tolist()


def test_fold_refuses_and_writes_nothing(folder):
    target = folder / 'refused'
    arguments = [QUICK['deeplabv3'], folder / 'deeplabv3.pth', '-o', target, '--shape', *SIZE]
    done = tool('model_converters/fold.py', *arguments, '--tolerance', '1e-12')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'nothing was written' in done.stderr and not target.exists()
    assert float(re.search(r'in float64 folding changes (\S+):', done.stderr)[1]) < 1e-10
    done = tool('model_converters/fold.py', QUICK['mask_rcnn'], *arguments[1:])
    assert done.returncode == 1 and 'does not fill' in done.stderr and not target.exists()
    done = tool('model_converters/fold.py', *arguments, '--images', 'nowhere.png')
    assert done.returncode == 1 and 'no image nowhere.png' in done.stderr


def test_metrics_that_moved_are_refused(capsys):
    """A model that detects nothing has no metrics in mmdet: both, or one of the two."""
    fold.compare_metrics({}, {})
    assert 'neither model detects anything' in capsys.readouterr().out
    fold.compare_metrics(dict(mAP=0.5), dict(mAP=0.5005))
    for before, after, words in (
        (dict(mAP=0.5), {}, 'the original model has metrics that the folded one has not'),
        ({}, dict(mAP=0.5), 'the folded model has metrics'),
        (dict(mAP=0.5), dict(mAP=0.502), r'differ by 0\.0020'),
        (dict(mAP=0.5), dict(mAP=float('nan')), 'differ by nan'),
    ):
        with pytest.raises(fold.FoldingDiffers, match=words):
            fold.compare_metrics(before, after)
