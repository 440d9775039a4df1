# Mask R-CNN R50-FPN with GN; two images per GPU.
_base_ = [
    '../_base_/models/mask-rcnn_fpn_gn.py',
    '../_base_/backbones/r50_gn.py',
    '../_base_/regimes/coco-instance_4xb2.py',
    '../_base_/schedules/2x.py',
]
model = {{_base_.start}}
