"""What the tests of layers in float64 share."""

import torch

F64 = dict(dtype=torch.float64)


def rand(*shape):
    return torch.randn(*shape, **F64)


def assert_close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=atol)
