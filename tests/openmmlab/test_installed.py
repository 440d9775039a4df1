"""The package as pip installs it, in a folder of its own: configs by name from outside."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='the config inherits from mmdet')

ROOT = Path(__file__).parents[2]
NAME = 'mask-rcnn_r50_fpn_ws-bcn_4xb2-2x_coco'
BUILD = """
import warnings
warnings.simplefilter('ignore')
import wsbcn_mm
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
import torch
cfg = Config.fromfile('mine.py')
init_default_scope('mmdet')
with torch.device('meta'):
    model = MODELS.build(cfg.model)
print(wsbcn_mm.__file__)
print(type(model).__name__, type(model.backbone.norm1).__name__)
"""


def run(folder, *command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, **environment),
        timeout=300,
    )


def test_a_config_outside_inherits_from_the_installed_package(tmp_path):
    source, site, outside = (tmp_path / name for name in ('source', 'site', 'outside'))
    outside.mkdir()
    skip = shutil.ignore_patterns('__pycache__', '*.so', '.git', '.venv', 'work_dirs', 'data')
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    done = run(
        source,
        '-m',
        'pip',
        'install',
        '-q',
        '--no-deps',
        '--no-build-isolation',
        '--target',
        site,
        '.',
        WSBCN_BUILD='0',
        PIP_DISABLE_PIP_VERSION_CHECK='1',
        PIP_NO_INDEX='1',
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(source)  # what is installed stands alone

    (outside / 'mine.py').write_text(
        f"_base_ = 'wsbcn_mm::mask_rcnn/{NAME}.py'\nmodel = dict(backbone=dict(init_cfg=None))\n"
    )
    done = run(outside, '-c', BUILD, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr[-2000:]
    file, built = done.stdout.splitlines()[-2:]
    assert Path(file).is_relative_to(site)
    assert built == 'MaskRCNN BatchChannelNorm2d'
    shipped = site / 'wsbcn_mm' / '.mim'
    assert (shipped / 'model-index.yml').is_file() and (shipped / 'tools' / 'train.py').is_file()
    configs = {path.relative_to(shipped / 'configs') for path in shipped.rglob('configs/**/*.py')}
    assert configs == {p.relative_to(ROOT / 'configs') for p in (ROOT / 'configs').rglob('*.py')}
