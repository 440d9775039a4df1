# At two images per GPU the estimates see two images per update: 2 times the rate keeps their
# memory, counted in images, the same.
_base_ = './deeplabv3_ws-bcn.py'
rate = dict(momentum=0.02)
model = dict(
    backbone=dict(norm_cfg=rate),
    decode_head=dict(norm_cfg=rate),
    auxiliary_head=dict(norm_cfg=rate),
)
