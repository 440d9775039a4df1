# Mask R-CNN R101-FPN with GN; one image per GPU.
_base_ = [
    '../_base_/models/mask-rcnn_fpn_gn.py',
    '../_base_/backbones/r101_gn.py',
    '../_base_/regimes/coco-instance_4xb1.py',
    '../_base_/schedules/2x.py',
]
model = {{_base_.start}}
