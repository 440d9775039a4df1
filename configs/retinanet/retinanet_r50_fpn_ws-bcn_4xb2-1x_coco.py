# RetinaNet R50-FPN with WS + BCN, in the head too; two images per GPU.
_base_ = [
    '../_base_/models/retinanet_fpn_ws-bcn.py',
    '../_base_/backbones/r50_ws-bcn.py',
    '../_base_/regimes/coco-detection_4xb2.py',
    '../_base_/schedules/1x.py',
]
model = {{_base_.start}}
optim_wrapper = dict(optimizer=dict(lr=0.005))  # MMDetection's 0.01 for 16 images
