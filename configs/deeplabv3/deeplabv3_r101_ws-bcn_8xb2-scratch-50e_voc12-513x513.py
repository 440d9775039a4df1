# DeepLabV3 R101 with WS + BCN on PASCAL VOC 2012, two images per GPU, from scratch.
_base_ = './deeplabv3_r101_ws-bcn_16xb1-scratch-50e_voc12-513x513.py'
# The total batch of 16 stays, so the learning rate does. The estimates see two images per update:
# twice the rate keeps their memory, counted in images, the same.
train_dataloader = dict(batch_size=2)
rate = dict(momentum=0.02)
model = dict(
    backbone=dict(norm_cfg=rate),
    decode_head=dict(norm_cfg=rate),
    auxiliary_head=dict(norm_cfg=rate),
)
