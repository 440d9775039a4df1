# A classifier with WS + BCN, with the formula of the authors' checkpoints, which it can replace.
# Batch mode, because 16 or 32 images per GPU are a large batch; fine-tuning at 1-2 images goes on
# from the same running statistics in estimate mode. The last norm of every residual branch starts
# at 0 (MMPretrain's default), as in the authors' code.
_base_ = './imagenet_bn.py'
model = dict(
    backbone=dict(
        init_cfg=None,
        norm_eval=False,
        frozen_stages=-1,
        norm_cfg=dict(type='BCN', num_groups=32, mode='batch'),
        conv_cfg=dict(type='WSConv2d', formula='var_eps'),
    )
)
