# At four images per GPU the estimates see four images per update: 4 times the rate keeps their
# memory, counted in images, the same.
_base_ = './deeplabv3_ws-bcn.py'
rate = dict(momentum=0.04)
model = dict(
    backbone=dict(norm_cfg=rate),
    decode_head=dict(norm_cfg=rate),
    auxiliary_head=dict(norm_cfg=rate),
)
