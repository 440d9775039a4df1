# Mask R-CNN R50-FPN with WS + BCN wherever the paper's COCO recipe puts a norm: backbone, FPN, box
# head, mask head. The RPN has no norm, therefore no WS: without a norm behind it a WS convolution
# multiplies activations by sqrt(fan-in).
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './wsbcn.py']
model = dict(
    backbone=dict(norm_cfg={{_base_.bcn_cfg}}, conv_cfg={{_base_.ws_cfg}}),
    neck=dict(norm_cfg={{_base_.bcn_cfg}}, conv_cfg={{_base_.ws_cfg}}),
    roi_head=dict(
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',  # Shared2FC has no convolution that could take a norm
            conv_out_channels=256,
            norm_cfg={{_base_.bcn_cfg}},
            conv_cfg={{_base_.ws_cfg}},
        ),
        mask_head=dict(norm_cfg={{_base_.bcn_cfg}}, conv_cfg={{_base_.ws_cfg}}),
    ),
)
