"""torch.onnx.export takes the layers as they are: ONNX knows no operator of ours."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.onnx import is_in_onnx_export

from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
    standardize_once_per_forward,
)

pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')


def network(kinds, dims, mode, affine):
    conv, norm, last = kinds
    settings = dict(mode=mode, affine=affine)
    model = nn.Sequential(
        conv(3, 8, 3, padding=1),
        norm(8, 4, **settings),
        nn.ReLU(),
        last(8, 8, 2, stride=2, groups=2),
        norm(8, 2, **settings),
        nn.ReLU(),
        conv(8, 4, 1, formula='std_eps'),
        norm(4, 4, **settings),
    )
    for _ in range(2):
        model(3 * torch.randn(2, 3, *[8] * dims) + 1)
    return model.eval()


TWO_D = (WSConv2d, BatchChannelNorm2d, WSConvTranspose2d), 2


@pytest.mark.parametrize(
    'kinds, dims, mode, affine, in_a_scope, by_dynamo',
    [
        (*TWO_D, 'estimate', 'group', True, True),
        (*TWO_D, 'estimate', 'group', True, False),
        (*TWO_D, 'batch', 'channel', False, False),
        ((WSConv1d, BatchChannelNorm1d, WSConv1d), 1, 'estimate', None, False, False),
        ((WSConv3d, BatchChannelNorm3d, WSConv3d), 3, 'estimate', 'group', False, True),
    ],
)
def test_exported_networks_compute_the_same(
    kinds, dims, mode, affine, in_a_scope, by_dynamo, tmp_path
):
    model = network(kinds, dims, mode, affine)
    if in_a_scope:
        standardize_once_per_forward(model)
    x, file = torch.randn(1, 3, *range(6, 6 + 2 * dims, 2)), tmp_path / 'model.onnx'
    sizes = {0: 'n', 2: 'length'}
    if by_dynamo:
        dynamic = {name: torch.export.Dim(size) for name, size in sizes.items()}
        torch.onnx.export(model, (x,), file, dynamo=True, dynamic_shapes={'input': dynamic})
    else:
        torch.onnx.export(
            model, (x,), file, dynamo=False, input_names=['input'], dynamic_axes={'input': sizes}
        )
    assert not is_in_onnx_export()
    session = onnxruntime.InferenceSession(file)
    for image in (x, torch.randn(2, 3, 10, *x.shape[3:])):
        (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, model(image).numpy(), rtol=0, atol=1e-5)
