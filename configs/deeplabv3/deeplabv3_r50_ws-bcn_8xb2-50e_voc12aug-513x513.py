# DeepLabV3 R50 with WS + BCN on VOC 2012 aug; two images on each of 8 GPUs.
_base_ = [
    '../_base_/models/deeplabv3_ws-bcn.py',
    '../_base_/backbones/r50_ws-bcn.py',
    '../_base_/regimes/voc12aug_8xb2.py',
    '../_base_/schedules/50e.py',
]
model = {{_base_.start}}
