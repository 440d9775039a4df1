# DeepLabV3 R101 with WS + BCN on VOC 2012 aug; four images on each of 4 GPUs.
_base_ = [
    '../_base_/models/deeplabv3_ws-bcn.py',
    '../_base_/backbones/r101_ws-bcn.py',
    '../_base_/regimes/voc12aug_4xb4.py',
    '../_base_/schedules/50e.py',
]
model = {{_base_.start}}
