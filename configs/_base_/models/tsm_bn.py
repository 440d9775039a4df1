# TSM with BatchNorm, as MMAction2 has it: weights of ImageNet.
_base_ = 'mmaction::_base_/models/tsm_r50.py'
model = dict(cls_head=dict(num_classes=174, dropout_ratio=0.5))
