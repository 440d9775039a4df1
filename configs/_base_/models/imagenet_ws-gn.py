# A classifier with WS + GN, with the formula of the authors' checkpoints, which it can replace. The
# last norm of every residual branch starts at 0 (MMPretrain's default), as in the authors' code.
_base_ = './imagenet_bn.py'
model = dict(
    backbone=dict(
        init_cfg=None,
        norm_eval=False,
        frozen_stages=-1,
        norm_cfg=dict(type='GN', num_groups=32),
        conv_cfg=dict(type='WSConv2d', formula='std_eps'),
    )
)
