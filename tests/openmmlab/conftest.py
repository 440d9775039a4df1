"""What the OpenMMLab tests share. Layers under test are built by the host, from config dicts."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def root():
    """The repository."""
    return ROOT
