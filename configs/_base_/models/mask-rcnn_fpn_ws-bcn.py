# Mask R-CNN FPN with WS + BCN in backbone, neck, box head and mask head. The RPN has no norm,
# therefore no WS.
_base_ = ['./mask-rcnn_fpn_frozen-bn.py', '../norms/ws-bcn.py']
model = dict(
    backbone=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}, norm_eval=False),
    neck=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    roi_head=dict(
        bbox_head=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
        mask_head=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    ),
)
