# RetinaNet FPN, BatchNorm in the backbone with frozen statistics, no norm elsewhere: MMDetection's.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
model = dict(backbone=dict(norm_cfg=dict(type='BN'), norm_eval=True, frozen_stages=1))
