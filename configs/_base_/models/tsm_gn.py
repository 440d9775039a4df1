# TSM with GroupNorm, from scratch: the weights of ImageNet with GN are for images that are prepared
# in another way than MMAction2 does.
_base_ = ['mmaction::_base_/models/tsm_r50.py', '../norms/gn.py']
model = dict(
    backbone=dict(
        pretrained=None,
        pretrained2d=False,  # else MMAction2 would look for the weights of a BN network
        norm_cfg={{_base_.norm}},
    ),
    cls_head=dict(num_classes=174, dropout_ratio=0.5),
)
