# DeepLabV3 R101 with WS + BCN over the batch of all GPUs on VOC 2012 aug; one image on each of 16
# GPUs.
_base_ = [
    '../_base_/models/deeplabv3_ws-bcn-sync.py',
    '../_base_/backbones/r101_ws-bcn.py',
    '../_base_/regimes/voc12aug_16xb1.py',
    '../_base_/schedules/50e.py',
]
model = {{_base_.start}}
