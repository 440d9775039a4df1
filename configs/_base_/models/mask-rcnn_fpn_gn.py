# Mask R-CNN FPN with GN in backbone, neck, box head and mask head. The RPN has no norm.
_base_ = ['./mask-rcnn_fpn_frozen-bn.py', '../norms/gn.py']
model = dict(
    backbone=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}, norm_eval=False),
    neck=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    roi_head=dict(
        bbox_head=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
        mask_head=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    ),
)
