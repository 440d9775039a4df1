# Mask R-CNN X50-32x4d-FPN with WS + BCN from scratch; two images per GPU.
_base_ = [
    '../_base_/models/mask-rcnn_fpn_ws-bcn.py',
    '../_base_/backbones/x50-32x4d_scratch.py',
    '../_base_/regimes/coco-instance_4xb2.py',
    '../_base_/schedules/6x.py',
]
model = {{_base_.start}}
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))  # as MMDetection from scratch
