# Faster R-CNN X101-32x4d-FPN with GN; one image per GPU.
_base_ = [
    '../_base_/models/faster-rcnn_fpn_gn.py',
    '../_base_/backbones/x101-32x4d_gn.py',
    '../_base_/regimes/coco-detection_4xb1.py',
    '../_base_/schedules/1x.py',
]
model = {{_base_.start}}
