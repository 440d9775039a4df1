"""Which field of a config, or file of the data, an error of the hosts is about."""

from wsbcn_mm.openmmlab.explain.config import ConfigError, explain, named

__all__ = ['ConfigError', 'explain', 'named']
