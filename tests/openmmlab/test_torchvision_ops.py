"""NMS and RoIAlign of torchvision where mmcv looks for its own: equal, or refused by name."""

import os
import subprocess
import sys

import pytest
import torch

from wsbcn_mm.openmmlab import torchvision_ops

OPERATORS = torchvision_ops.Operators('mmcv._ext')

TRAINS = """
import wsbcn_mm
from wsbcn_mm.openmmlab import compat, torchvision_ops
compat.require('mmcv', 'mmdet')
assert torchvision_ops.in_use()
import torch
from mmcv.ops import RoIAlign, batched_nms, nms
torch.manual_seed(0)
x = torch.randn(2, 3, 16, 20, requires_grad=True)
rois = torch.tensor([[0, 1.5, 2, 30, 40], [1, 0, 0, 64, 60.0]])
y = RoIAlign(7, 0.25, 0)(x, rois)
y.square().sum().backward()
half = x.detach().bfloat16().requires_grad_()  # torchvision itself has no backward pass in it
RoIAlign(7, 0.25, 0)(half, rois).square().sum().backward()
most = float(x.grad.abs().max())
assert half.grad.dtype == torch.bfloat16
torch.testing.assert_close(half.grad.float(), x.grad, rtol=0.05, atol=0.05 * most)
corners = torch.rand(50, 2) * 40
boxes = torch.cat([corners, corners + torch.rand(50, 2) * 30], 1)
kept = nms(boxes, torch.rand(50), 0.4)[1]
kind = dict(type='nms', iou_threshold=0.4)
classes = batched_nms(boxes, torch.rand(50), torch.arange(50) % 3, kind)[1]
torch.save([y.detach(), x.grad, kept, classes], 'found.pth')
try:
    batched_nms(boxes, torch.rand(50), torch.zeros(50), dict(type='soft_nms', iou_threshold=0.4))
except RuntimeError as error:
    assert 'softnms is an operator of mmcv that torchvision has not' in str(error), error
else:
    raise SystemExit('soft NMS was not refused')
"""


def test_other_operators_are_refused_by_name():
    with pytest.raises(RuntimeError, match='deform_conv_forward is an operator of mmcv'):
        OPERATORS.deform_conv_forward(1, output=2)
    with pytest.raises(ValueError, match='offset=1.*without an offset'):
        OPERATORS.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, 1)
    assert not hasattr(OPERATORS, '__wrapped__')


def test_what_cannot_be_meant_is_refused(monkeypatch):
    monkeypatch.setenv(torchvision_ops.VARIABLE, 'torch')
    with pytest.raises(ValueError, match="must be one of mmcv, torchvision\n  got 'torch'"):
        torchvision_ops.apply()


def test_torchvision_that_does_not_fit_is_named(monkeypatch):
    pytest.importorskip('mmcv')
    for name in [name for name in sys.modules if name.startswith('mmcv.ops')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv(torchvision_ops.VARIABLE, 'torchvision')
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(ImportError, match='(?s)torchvision cannot be imported.*belongs to torch'):
        torchvision_ops.apply()


def test_too_late_is_said(monkeypatch):
    pytest.importorskip('mmcv.ops')
    monkeypatch.setenv(torchvision_ops.VARIABLE, 'torchvision')
    with pytest.raises(ImportError, match='import wsbcn_mm first'):
        torchvision_ops.apply()


def test_detectors_find_what_they_find_with_mmcvs(tmp_path):
    pytest.importorskip('mmdet')
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f'torchvision cannot be imported: {error}')
    from mmcv.ops import RoIAlign, batched_nms, nms

    environment = dict(os.environ, WSBCN_MMCV_OPS='torchvision')
    command = [sys.executable, '-W', 'ignore', '-c', TRAINS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 20, requires_grad=True)
    rois = torch.tensor([[0, 1.5, 2, 30, 40], [1, 0, 0, 64, 60.0]])
    y = RoIAlign(7, 0.25, 0)(x, rois)
    y.square().sum().backward()
    corners = torch.rand(50, 2) * 40
    boxes = torch.cat([corners, corners + torch.rand(50, 2) * 30], 1)
    kept = nms(boxes, torch.rand(50), 0.4)[1]
    kind = dict(type='nms', iou_threshold=0.4)
    classes = batched_nms(boxes, torch.rand(50), torch.arange(50) % 3, kind)[1]
    found = torch.load(tmp_path / 'found.pth')
    torch.testing.assert_close(found, [y.detach(), x.grad, kept, classes])
