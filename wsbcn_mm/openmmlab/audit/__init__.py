"""What is wrong with a config, or with a checkpoint, for training with 1-2 images per GPU.

The model is built (not initialised) and looked at: a config may say what it likes, a key in the
wrong place changes nothing. What only the config shows is added: freezing, learning rate, weight
decay, checkpoints.
"""

from wsbcn_mm.openmmlab.audit.whole import audit, audit_built, audit_checkpoint, audit_config

__all__ = ['audit', 'audit_built', 'audit_checkpoint', 'audit_config']
