# Faster R-CNN R50-FPN with WS + GN; one image per GPU.
_base_ = [
    '../_base_/models/faster-rcnn_fpn_ws-gn.py',
    '../_base_/backbones/r50_ws-gn.py',
    '../_base_/regimes/coco-detection_8xb1.py',
    '../_base_/schedules/1x.py',
]
model = {{_base_.start}}
