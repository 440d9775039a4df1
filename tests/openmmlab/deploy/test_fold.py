"""tools/model_converters/fold.py: what it writes is loaded where this package is not."""

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from tests.openmmlab.deploy.models import LISTED, QUICK, SIZE
from tests.tool import tool
from wsbcn_mm.openmmlab import config
from wsbcn_mm.openmmlab.deploy import fold, inference, predict

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures


# What stock OpenMMLab finds, without this package: one JSON line of each model.
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
import json
from pathlib import Path
import mmdet.apis, mmengine.config.config, mmseg.apis
from mmengine.config import Config
from mmengine.runner import Runner

for resnet in (mmdet.models.backbones.resnet, mmseg.models.backbones.resnet):  # as in conftest.py
    resnet.ResNet.arch_settings[18] = (resnet.BasicBlock, (1, 1, 1, 1))
mmengine.config.config.FormatCode = lambda text, **_: (text, True)  # as in tool.py

models, images = json.loads(sys.argv[1])
for name, (scope, config, checkpoint) in models.items():
    if scope == 'mmdet':
        model = mmdet.apis.init_detector(config, checkpoint, device='cpu')
    else:
        model = mmseg.apis.init_model(config, checkpoint, device='cpu')
    found = []
    for image in images:
        if scope == 'mmdet':
            sample = mmdet.apis.inference_detector(model, image).pred_instances
            found.append([sample.bboxes.tolist(), sample.scores.tolist(), sample.labels.tolist()])
        else:
            found.append(mmseg.apis.inference_model(model, image).pred_sem_seg.data.tolist())
    cfg, metrics = Config.fromfile(config), None
    cfg.load_from, cfg.work_dir = checkpoint, 'tested'
    if Path(cfg.test_dataloader.dataset.data_root).exists():
        metrics = Runner.from_cfg(cfg).test()
        metrics = {key: float(value) for key, value in metrics.items()}
    print('found', json.dumps([name, found, metrics]))
assert 'wsbcn_mm' not in sys.modules
"""


@pytest.fixture(scope='module')
def folded(folder):
    """By model: what fold.py printed, the files that it wrote; and what a process makes of them.

    In the process this package cannot be imported: for each model, what it finds on two images,
    and the metrics where there are data.
    """
    models, printed = {}, {}
    for name in (*QUICK, *LISTED):
        source = QUICK.get(name, folder / f'{name}.py')
        arguments = [source, folder / f'{name}.pth', '-o', folder / 'stock', '--shape', *SIZE]
        evaluate = ['--evaluate'] if name in LISTED else []
        done = tool('model_converters/fold.py', *arguments, *evaluate, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [str(folder / 'stock' / f'{source.stem}_folded{end}') for end in ('.py', '.pth')]
        models[name] = (config.load_config(str(source)).default_scope, *files)
        printed[name] = done.stdout
    images = [str(image) for image in sorted((folder / 'images').glob('*.*g'))[:2]]
    code = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT_US, json.dumps([models, images])],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'},
    )
    assert code.returncode == 0, code.stderr[-3000:]
    lines = [line for line in code.stdout.splitlines() if line.startswith('found ')]
    results = {name: rest for name, *rest in (json.loads(line[6:]) for line in lines)}
    return {name: (printed[name], models[name][1:], images, *results[name]) for name in models}


@pytest.mark.parametrize('name', [*QUICK, *LISTED])
def test_stock_openmmlab_loads_what_fold_writes(folder, folded, name):
    """Predictions are those of the original."""
    printed, files, images, found, metrics = folded[name]
    written, weights = (Path(file) for file in files)
    assert 'wsbcn_mm' not in written.read_text() and b'wsbcn_mm' not in weights.read_bytes()
    assert 'largest relative error' in printed and str(weights) in printed
    assert ('folded_layers' in written.read_text()) == (name in LISTED)
    if name in LISTED:
        beside = folder / 'stock/folded_layers.py'
        assert 'wsbcn_mm' not in beside.read_text() and str(beside) in printed

    assert (metrics is not None) == (name in LISTED)
    for key, value in (metrics or {}).items():
        original, folded = re.search(rf'^{key} +(\S+) +(\S+)$', printed, re.MULTILINE).groups()
        assert abs(value - float(original)) < 2e-3 and abs(value - float(folded)) < 1e-4
    assert len(found) == len(images) == 2
    cfg = config.load_config(str(QUICK.get(name, folder / f'{name}.py')))
    predictor = predict.Predictor(cfg, inference.load_model(cfg, str(folder / f'{name}.pth')))
    for theirs, file in zip(found, images):
        sample = predictor(Path(file))[1]
        if cfg.default_scope == 'mmseg':
            same = np.asarray(theirs) == sample.pred_sem_seg.data.numpy()
            assert same.mean() > 0.999  # ties of two classes
            continue
        own = sample.pred_instances
        assert len(own) == len(theirs[0]) > 0
        np.testing.assert_allclose(theirs[0], own.bboxes.numpy(), atol=0.05)
        np.testing.assert_allclose(theirs[1], own.scores.numpy(), atol=1e-3)
        assert theirs[2] == own.labels.tolist()


def test_files_are_compared_as_the_test_pipeline_prepares_them(tmp_path):
    """RTMDet takes multiples of 32 alone, which its pipeline makes of any image."""
    path = Path(__file__).parents[3] / 'tools' / 'model_converters' / 'fold.py'
    spec = importlib.util.spec_from_file_location('fold_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = str(tmp_path / 'a.png')
    cv2.imwrite(file, np.full((30, 41, 3), 7, np.uint8))
    cfg = config.load_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    image = module.read_images(argparse.Namespace(images=[file]), cfg)[file]
    assert (image.shape, image.dtype) == ((640, 640, 3), np.uint8)
    assert image[0, 0, 0] == 7 and image[-1, -1, 0] == 114  # the image, and its padding


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
