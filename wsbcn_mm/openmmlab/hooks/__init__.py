"""Hooks of mmengine: estimates, checkpoints, diagnostics."""
