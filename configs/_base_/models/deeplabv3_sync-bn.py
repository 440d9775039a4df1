# DeepLabV3 at output stride 16 as the authors train it on VOC; SyncBatchNorm, as in mmseg's base.
_base_ = 'mmseg::_base_/models/deeplabv3_r50-d8.py'
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
# The authors crop at 513, which leaves a map of 33x33 at stride 16.
data_preprocessor = dict(size=(513, 513))
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,  # mmseg's base sets it, and it clashes with init_cfg
    backbone=dict(
        type='ResNet',  # plain 7x7 stem, as the WS checkpoints have; ResNetV1c has another
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),  # output stride 16
        multi_grid=(1, 1, 1),
        norm_eval=False,
        frozen_stages=-1,
    ),
    decode_head=dict(channels=256, dilations=(1, 6, 12, 18), num_classes=21),
    auxiliary_head=dict(num_classes=21),
)
