# DeepLabV3 R50 with WS + BCN on VOC 2012 aug; four images at a time on one GPU, 16 per step.
_base_ = [
    '../_base_/models/deeplabv3_ws-bcn.py',
    '../_base_/backbones/r50_ws-bcn.py',
    '../_base_/regimes/voc12aug_1xb4-accu4.py',
    '../_base_/schedules/50e.py',
]
model = {{_base_.start}}
