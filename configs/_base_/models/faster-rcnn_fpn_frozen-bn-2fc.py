# MMDetection's own baseline: Faster R-CNN FPN, BatchNorm in the backbone with frozen statistics
# (two images per GPU are too few to estimate them), box head of two linear layers.
_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
model = dict(backbone=dict(norm_cfg=dict(type='BN'), norm_eval=True, frozen_stages=1))
