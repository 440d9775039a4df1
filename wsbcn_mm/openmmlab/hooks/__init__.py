"""Hooks of mmengine: estimates, checkpoints, data, diagnostics. Registered on import."""

from wsbcn_mm.openmmlab.hooks import checkpoints, data, diagnostics, estimates  # noqa: F401
