# Mask R-CNN R101-FPN with frozen BN and MMDetection's 2-FC box head (not the other rows' head); one
# image per GPU.
_base_ = [
    '../_base_/models/mask-rcnn_fpn_frozen-bn-2fc.py',
    '../_base_/backbones/r101_bn.py',
    '../_base_/regimes/coco-instance_4xb1.py',
    '../_base_/schedules/20-23-24e.py',
]
model = {{_base_.start}}
