"""Every test of backends gets memory full of NaN."""

import pytest


@pytest.fixture(autouse=True)
def kernel_test(poisoned_memory):
    pass
