"""The golden vectors (computed with the authors' published modules) hold, for spec and layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import wsbcn_mm
from wsbcn_mm import reference

pytestmark = pytest.mark.usefixtures('backend')  # every test, on every backend

GOLDEN = Path(__file__).parent / 'golden'
WS = sorted(path.stem for path in GOLDEN.glob('ws_*.npz'))
BCN = sorted(path.stem for path in GOLDEN.glob('bcn_*.npz'))

# float64 rounds at 1.1e-16 and the longest sums here have about 600 terms: 1e-12 is far above
# rounding, and far below any difference in the maths (eps alone changes the fifth digit).
# It is relative to a tensor's largest value, because sums that cancel leave absolute errors.
TOLERANCE = 1e-12


def load(name):
    with np.load(GOLDEN / f'{name}.npz') as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def assert_equal(actual, expected, what):
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < TOLERANCE, f'{what}: relative error {error:.1e}'


def test_all_golden_files_are_tested():
    assert len(WS) == 4 and len(BCN) == 4
    assert {path.stem for path in GOLDEN.glob('*.npz')} == {*WS, *BCN}


# ----------------------------------------------------------------------------------------------
# Weight Standardization


def formula_of(name):
    return 'std_eps' if 'std_outside' in name else 'var_eps'


@pytest.mark.parametrize('name', WS)
def test_ws_reference(name):
    golden = load(name)
    x, weight = golden['x'].requires_grad_(), golden['weight'].requires_grad_()
    bias = golden['bias'].requires_grad_() if 'bias' in golden else None
    w_hat = reference.weight_standardize(weight, 1e-5, formula_of(name))
    y = F.conv2d(x, w_hat, bias, *golden['stride_padding_dilation_groups'].tolist())
    y.backward(golden['grad_y'])
    assert_equal(y, golden['y'], 'y')
    assert_equal(x.grad, golden['grad_x'], 'grad_x')
    assert_equal(weight.grad, golden['grad_weight'], 'grad_weight')
    if bias is not None:
        assert_equal(bias.grad, golden['grad_bias'], 'grad_bias')


@pytest.mark.parametrize('name', WS)
def test_ws_layer(name):
    golden = load(name)
    x, (out_channels, _, *kernel_size) = golden['x'].requires_grad_(), golden['weight'].shape
    stride, padding, dilation, groups = golden['stride_padding_dilation_groups'].tolist()
    conv = wsbcn_mm.WSConv2d(
        x.size(1),
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        bias='bias' in golden,
        dtype=torch.float64,
        formula=formula_of(name),
    )
    parameters = {key: golden[key] for key in ('weight', 'bias') if key in golden}
    conv.load_state_dict(parameters)
    y = conv(x)
    y.backward(golden['grad_y'])
    assert_equal(y, golden['y'], 'y')
    assert_equal(x.grad, golden['grad_x'], 'grad_x')
    for key in parameters:
        assert_equal(getattr(conv, key).grad, golden[f'grad_{key}'], f'grad_{key}')


@pytest.mark.parametrize('name', WS)
def test_ws_formulas_can_be_told_apart(name):
    """Otherwise the tests above would not show which formula they checked."""
    golden = load(name)
    for other in {'paper', 'std_eps', 'var_eps'} - {formula_of(name)}:
        w_hat = reference.weight_standardize(golden['weight'], 1e-5, other)
        bias = golden.get('bias')
        y = F.conv2d(golden['x'], w_hat, bias, *golden['stride_padding_dilation_groups'].tolist())
        assert (y - golden['y']).abs().max() > 1e6 * TOLERANCE


# ----------------------------------------------------------------------------------------------
# Batch-Channel Normalization

# Name in the golden files -> name of the argument and of the layer's parameter.
PARAMETERS = {
    'batch_weight': 'batch_weight',
    'batch_bias': 'batch_bias',
    'group_weight': 'weight',
    'group_bias': 'bias',
}


def mode_of(name):
    return 'batch' if name == 'bcn_batch' else 'estimate'


@pytest.mark.parametrize('name', BCN)
def test_bcn_reference(name):
    golden = load(name)
    mean, var = (f(golden['batch_weight']) for f in (torch.zeros_like, torch.ones_like))
    settings = dict(mode=mode_of(name), momentum=golden['rate'].item(), eps=golden['eps'].item())
    groups = int(golden['num_groups'])
    for step in range(int(golden['steps'])):
        x = golden[f'x{step}'].requires_grad_()
        parameters = {
            ours: golden[key].clone().requires_grad_() for key, ours in PARAMETERS.items()
        }
        y, mean, var = reference.batch_channel_norm(
            x, groups, mean, var, **parameters, training=True, **settings
        )
        y.backward(golden[f'grad_y{step}'])
        assert_equal(y, golden[f'y{step}'], f'y{step}')
        assert_equal(x.grad, golden[f'grad_x{step}'], f'grad_x{step}')
        for key, ours in PARAMETERS.items():
            expected = golden[f'grad_{key}{step}']
            assert_equal(parameters[ours].grad, expected, f'grad_{key}{step}')
        assert_equal(mean, golden[f'running_mean{step}'], f'running_mean{step}')
        assert_equal(var, golden[f'running_var{step}'], f'running_var{step}')
    y, new_mean, new_var = reference.batch_channel_norm(
        golden['x_eval'], groups, mean, var, **parameters, **settings
    )
    assert_equal(y, golden['y_eval'], 'y_eval')
    assert new_mean is mean and new_var is var


@pytest.mark.parametrize('name', BCN)
def test_bcn_layer(name):
    golden = load(name)
    layer = wsbcn_mm.BatchChannelNorm2d(
        golden['batch_weight'].numel(),
        int(golden['num_groups']),
        golden['eps'].item(),
        momentum=golden['rate'].item(),
        mode=mode_of(name),
        dtype=torch.float64,
    )
    layer.load_state_dict(
        layer.state_dict() | {ours: golden[key] for key, ours in PARAMETERS.items()}
    )
    for step in range(int(golden['steps'])):
        x = golden[f'x{step}'].requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(golden[f'grad_y{step}'])
        assert_equal(y, golden[f'y{step}'], f'y{step}')
        assert_equal(x.grad, golden[f'grad_x{step}'], f'grad_x{step}')
        for key, ours in PARAMETERS.items():
            expected = golden[f'grad_{key}{step}']
            assert_equal(getattr(layer, ours).grad, expected, f'grad_{key}{step}')
        assert_equal(layer.bn.running_mean, golden[f'running_mean{step}'], f'running_mean{step}')
        assert_equal(layer.bn.running_var, golden[f'running_var{step}'], f'running_var{step}')
    assert layer.bn.num_batches_tracked == step + 1
    layer.eval()
    assert_equal(layer(golden['x_eval']), golden['y_eval'], 'y_eval')
