# Mask R-CNN R101-FPN with WS + BCN; one image per GPU.
_base_ = [
    '../_base_/models/mask-rcnn_fpn_ws-bcn.py',
    '../_base_/backbones/r101_ws-bcn.py',
    '../_base_/regimes/coco-instance_4xb1.py',
    '../_base_/schedules/20-23-24e.py',
]
model = {{_base_.start}}
