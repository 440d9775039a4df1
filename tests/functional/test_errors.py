"""Errors of the two functions: they name the argument, what was expected and what came."""

import pytest
import torch

from wsbcn_mm import batch_channel_norm, weight_standardize

pytestmark = pytest.mark.usefixtures('backend')  # every test, on every backend


def moved(change, device):
    """The values of a case, which are made before a device is known."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}


@pytest.mark.parametrize(
    'change, error, message',
    [
        (
            dict(input=torch.zeros(2, 8, dtype=torch.long)),
            TypeError,
            r'input must be a floating-point tensor\n  got torch.int64',
        ),
        (dict(input=torch.zeros(2, 8, dtype=torch.complex64)), TypeError, 'input must be'),
        (dict(input=[1.0]), TypeError, r'input must be a floating-point tensor\n  got list'),
        (dict(input=torch.zeros(8)), ValueError, r'input must have at least 2 axes.*\n.*\(8,\)'),
        (
            dict(num_groups=3),
            ValueError,
            r'num_channels must be divisible by num_groups\n'
            r'  got num_channels=8, num_groups=3\n  for 8 channels num_groups=[24] would fit',
        ),
        (dict(num_groups=32), ValueError, 'num_groups=8 would fit'),
        (dict(num_groups=0), ValueError, 'num_groups must be at least 1'),
        (dict(num_groups=-4), ValueError, r'num_groups must be at least 1\n  got -4'),
        (dict(num_groups=4.0), TypeError, 'num_groups must be an int'),
        (dict(num_groups=True), TypeError, 'num_groups must be an int'),
        (dict(running_mean=torch.zeros(4)), ValueError, r'running_mean must have shape \(8,\)'),
        (dict(running_var=torch.zeros(1, 8)), ValueError, r'running_var must have shape \(8,\)'),
        (dict(batch_weight=torch.ones(4)), ValueError, r'batch_weight must have shape \(8,\)'),
        (dict(batch_bias=torch.ones(())), ValueError, r'batch_bias must have shape \(8,\)'),
        (
            dict(weight=torch.ones(2)),
            ValueError,
            r'^weight must have shape \(4,\).* or \(8,\).*\n  got \(2,\)',
        ),
        (dict(bias=torch.ones(1, 4, 1)), ValueError, r'^bias must have shape \(4,\)'),
        (dict(mode='sync'), ValueError, r"mode must be one of 'estimate', 'batch'\n  got 'sync'"),
        (dict(mode=None), ValueError, 'mode must be one of'),
        (dict(momentum=1.5), ValueError, r'momentum must lie in \[0, 1\]'),
        (dict(momentum=-0.1), ValueError, r'momentum must lie in \[0, 1\]'),
        (dict(momentum=float('nan')), ValueError, r'momentum must lie in \[0, 1\]'),
        (dict(momentum='0.1'), TypeError, r'momentum must be a number in \[0, 1\]'),
        (dict(momentum=True), TypeError, r'momentum must be a number in \[0, 1\]'),
        (dict(momentum=None), TypeError, r'momentum must be a number in \[0, 1\]'),
        (dict(eps=True), TypeError, r'eps must be a number >= 0\n  got True of type bool'),
        (dict(eps='1e-5'), TypeError, 'eps must be a number >= 0'),
        (dict(eps=-1e-5), ValueError, 'eps must be finite and >= 0'),
        (dict(eps=float('nan')), ValueError, 'eps must be finite and >= 0'),
        (dict(eps=float('inf')), ValueError, 'eps must be finite and >= 0'),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_bcn_errors(change, error, message, training, device):
    arguments = dict(
        input=torch.zeros(2, 8, 3, 3),
        num_groups=4,
        running_mean=torch.zeros(8),
        running_var=torch.ones(8),
        training=training,
    )
    batch_channel_norm(**arguments)
    buffers = arguments['running_mean'].clone(), arguments['running_var'].clone()
    with pytest.raises(error, match=message):
        batch_channel_norm(**arguments | moved(change, device))
    # A rejected call leaves no trace.
    assert torch.equal(arguments['running_mean'], buffers[0])
    assert torch.equal(arguments['running_var'], buffers[1])


@pytest.mark.parametrize(
    'change, error, message',
    [
        (
            dict(weight=torch.ones(4, 4, dtype=torch.int)),
            TypeError,
            r'weight must be a floating-point tensor\n  got torch.int32',
        ),
        (dict(weight=None), TypeError, r'weight must be a floating-point tensor\n  got NoneType'),
        (dict(weight=torch.ones(4)), ValueError, 'weight must have at least 2 axes'),
        (dict(weight=torch.ones(8, 1, 1, 1)), ValueError, r'at least 2 weights.*\n.*got 1'),
        (dict(weight=torch.ones(8, 0, 3, 3)), ValueError, r'at least 2 weights.*\n.*got 0'),
        (
            dict(formula='std'),
            ValueError,
            r"formula must be one of 'paper', 'std_eps', 'var_eps'\n  got 'std'",
        ),
        (dict(eps=True), TypeError, 'eps must be a number >= 0'),
        (dict(eps='small'), TypeError, 'eps must be a number >= 0'),
        (dict(eps=None), TypeError, 'eps must be a number >= 0'),
        (dict(eps=-1.0), ValueError, 'eps must be finite and >= 0'),
        (dict(eps=float('nan')), ValueError, 'eps must be finite and >= 0'),
        (dict(eps=float('inf')), ValueError, 'eps must be finite and >= 0'),
    ],
)
def test_ws_errors(change, error, message, device):
    arguments = dict(weight=torch.ones(4, 2, 3, 3))
    weight_standardize(**arguments)
    with pytest.raises(error, match=message):
        weight_standardize(**arguments | moved(change, device))
