"""The built wheel, installed into a folder of its own: configs by name from outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='the config inherits from mmdet')

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


def test_a_config_outside_inherits_from_the_installed_package(installed, tmp_path):
    (tmp_path / 'mine.py').write_text(
        f"_base_ = 'wsbcn_mm::mask_rcnn/{NAME}.py'\nmodel = dict(backbone=dict(init_cfg=None))\n"
    )
    done = subprocess.run(
        [sys.executable, '-c', BUILD],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(installed)),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    file, built = done.stdout.splitlines()[-2:]
    assert Path(file).is_relative_to(installed)
    assert built == 'MaskRCNN BatchChannelNorm2d'
