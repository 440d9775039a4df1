# DeepLabV3 R101 at output stride 16 with WS + BCN in backbone, ASPP (image pooling and bottleneck
# included) and auxiliary head: three places, each set here, because mmseg's models read their own
# norm_cfg and a top-level one changes nothing.
_base_ = ['mmseg::_base_/models/deeplabv3_r50-d8.py', './wsbcn.py']
# The authors crop at 513, which leaves a map of 33x33 at stride 16.
data_preprocessor = dict(size=(513, 513))
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,  # mmseg's base sets it, and it clashes with init_cfg
    backbone=dict(
        type='ResNet',  # plain 7x7 stem, as the WS checkpoints have; ResNetV1c has another
        depth=101,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),  # output stride 16
        multi_grid=(1, 1, 1),
        norm_cfg={{_base_.bcn_cfg}},
        conv_cfg={{_base_.ws_cfg}},
    ),
    decode_head=dict(
        channels=256,
        dilations=(1, 6, 12, 18),
        num_classes=21,
        norm_cfg={{_base_.bcn_cfg}},
        conv_cfg={{_base_.ws_cfg}},
    ),
    auxiliary_head=dict(
        num_classes=21, norm_cfg={{_base_.bcn_cfg}}, conv_cfg={{_base_.ws_cfg}}
    ),
)
