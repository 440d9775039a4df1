# DeepLabV3 R101 with GN on VOC 2012 aug; one image on each of 16 GPUs.
_base_ = [
    '../_base_/models/deeplabv3_gn.py',
    '../_base_/backbones/r101_gn.py',
    '../_base_/regimes/voc12aug_16xb1.py',
    '../_base_/schedules/50e.py',
]
model = {{_base_.start}}
