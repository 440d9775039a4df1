# DeepLabV3 with BatchNorm over the images of each GPU. With one image the ASPP's pooled map has one
# value per channel, for which BatchNorm raises: MicroBN uses its running statistics there.
_base_ = './deeplabv3_sync-bn.py'
norm = dict(type='MicroBN')
model = dict(
    backbone=dict(norm_cfg=norm),
    decode_head=dict(norm_cfg=norm),
    auxiliary_head=dict(norm_cfg=norm),
)
