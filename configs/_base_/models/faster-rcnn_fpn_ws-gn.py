# Faster R-CNN FPN with WS + GN in backbone, neck and box head. The RPN has no norm, therefore no
# WS.
_base_ = ['./faster-rcnn_fpn_frozen-bn.py', '../norms/ws-gn.py']
model = dict(
    backbone=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}, norm_eval=False),
    neck=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    roi_head=dict(
        bbox_head=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    ),
)
