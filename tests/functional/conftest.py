"""Every test of the two functions: on the device asked for, with memory full of NaN."""

import pytest


@pytest.fixture(autouse=True)
def kernel_test(on_device, poisoned_memory):
    pass
