# RetinaNet FPN with GN in backbone, neck and the towers of the head. The towers run on all five
# levels with the same convolutions; every level has norms of its own, because its statistics
# differ.
_base_ = ['./retinanet_fpn_frozen-bn.py', '../norms/gn.py']
model = dict(
    backbone=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}, norm_eval=False),
    neck=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    bbox_head=dict(
        type='RetinaSepBNHead', num_ins=5, norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}
    ),
)
