# Mask R-CNN R50-FPN with WS + BCN; two images per GPU.
_base_ = [
    '../_base_/models/mask-rcnn_fpn_ws-bcn.py',
    '../_base_/backbones/r50_ws-bcn.py',
    '../_base_/regimes/coco-instance_4xb2.py',
    '../_base_/schedules/2x.py',
]
model = {{_base_.start}}
