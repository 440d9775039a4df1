# The two layers, as variables: a config that inherits this file sets them where they belong, with
# {{_base_.bcn_cfg}} and {{_base_.ws_cfg}}. The names differ from norm_cfg and conv_cfg on purpose:
# upstream bases define those, and two bases may not share a top-level key.
bcn_cfg = dict(type='BCN', num_groups=32)
ws_cfg = dict(type='WSConv2d')
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
# The same estimates on all ranks, and their rate; see wsbcn_mm/openmmlab/hooks.py.
custom_hooks = [dict(type='EstimatesHook')]
