# quick_resnet18_ws-bcn_1xb1_pictures.py with Group Normalization and
# plain convolutions, and nothing else changed.
_base_ = './quick_resnet18_ws-bcn_1xb1_pictures.py'
model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type='GN', num_groups=32), conv_cfg=None))
custom_hooks = []  # no estimates to keep
