"""Hooks of mmengine: estimates, checkpoints, diagnostics. Registered when they are imported."""

from wsbcn_mm.openmmlab.hooks import checkpoints, diagnostics, estimates  # noqa: F401
