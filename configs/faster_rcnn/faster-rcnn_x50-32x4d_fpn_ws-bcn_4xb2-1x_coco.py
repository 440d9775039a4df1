# Faster R-CNN X50-32x4d-FPN with WS + BCN; two images per GPU.
_base_ = [
    '../_base_/models/faster-rcnn_fpn_ws-bcn.py',
    '../_base_/backbones/x50-32x4d_ws-bcn.py',
    '../_base_/regimes/coco-detection_4xb2.py',
    '../_base_/schedules/1x.py',
]
model = {{_base_.start}}
