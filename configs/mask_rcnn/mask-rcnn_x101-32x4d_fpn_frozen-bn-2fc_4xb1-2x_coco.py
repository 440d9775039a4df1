# Mask R-CNN X101-32x4d-FPN with frozen BN and MMDetection's 2-FC box head (not the other rows'
# head); one image per GPU.
_base_ = [
    '../_base_/models/mask-rcnn_fpn_frozen-bn-2fc.py',
    '../_base_/backbones/x101-32x4d_bn.py',
    '../_base_/regimes/coco-instance_4xb1.py',
    '../_base_/schedules/2x.py',
]
model = {{_base_.start}}
