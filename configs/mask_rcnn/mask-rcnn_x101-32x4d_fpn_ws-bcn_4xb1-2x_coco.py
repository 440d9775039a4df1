# Mask R-CNN X101-32x4d-FPN with WS + BCN; one image per GPU.
_base_ = [
    '../_base_/models/mask-rcnn_fpn_ws-bcn.py',
    '../_base_/backbones/x101-32x4d_ws-bcn.py',
    '../_base_/regimes/coco-instance_4xb1.py',
    '../_base_/schedules/2x.py',
]
model = {{_base_.start}}
