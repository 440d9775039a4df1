"""Former name of `wsbcn_mm.openmmlab.hooks.diagnostics`, which older configs import."""

from wsbcn_mm.openmmlab.hooks.diagnostics import DiagnosticsHook  # noqa: F401
