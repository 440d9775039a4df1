"""Hooks of mmengine, registered when they are imported."""

from wsbcn_mm.openmmlab.hooks import (  # noqa: F401
    checkpoints,
    data,
    diagnostics,
    estimates,
    standardization,
)
