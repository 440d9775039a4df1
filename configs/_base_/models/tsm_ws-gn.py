# TSM with WS + GN in every convolution of the backbone, which begins with the authors' weights of
# ImageNet and their formula.
#   python tools/model_converters/convert_checkpoint.py resnet50_gn_ws.pth \
#       -o checkpoints/resnet50_ws-gn_tsm.pth --from openmmlab-gn-ws --to gn-ws --names mmaction-tsm
_base_ = ['mmaction::_base_/models/tsm_r50.py', '../norms/ws-gn.py']
model = dict(
    backbone=dict(
        pretrained=None,
        pretrained2d=False,  # else MMAction2 would look for the weights of a BN network
        norm_cfg={{_base_.norm}},
        conv_cfg=dict(type='WSConv2d', formula='std_eps'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/resnet50_ws-gn_tsm.pth'),
    ),
    cls_head=dict(num_classes=174, dropout_ratio=0.5),
)
