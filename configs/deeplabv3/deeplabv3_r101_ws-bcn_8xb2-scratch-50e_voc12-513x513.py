# DeepLabV3 R101 with WS + BCN on VOC 2012 from scratch; two images on each of 8 GPUs.
_base_ = [
    '../_base_/models/deeplabv3_ws-bcn.py',
    '../_base_/backbones/r101_scratch.py',
    '../_base_/regimes/voc12_8xb2.py',
    '../_base_/schedules/50e.py',
]
model = {{_base_.start}}
