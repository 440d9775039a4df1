# Faster R-CNN R101-FPN with frozen BN and MMDetection's 2-FC box head (not the other rows' head);
# one image per GPU.
_base_ = [
    '../_base_/models/faster-rcnn_fpn_frozen-bn-2fc.py',
    '../_base_/backbones/r101_bn.py',
    '../_base_/regimes/coco-detection_4xb1.py',
    '../_base_/schedules/1x.py',
]
model = {{_base_.start}}
