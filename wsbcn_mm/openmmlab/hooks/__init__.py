"""Hooks of mmengine, registered when they are imported."""

from wsbcn_mm.openmmlab.hooks import (  # noqa: F401
    data,
    diagnostics,
    estimates,
    loading,
    precise_stats,
    saving,
    standardization,
)
