# DeepLabV3 with WS + BCN at one image per step, ASPP with image pooling (one value per channel,
# where BatchNorm cannot train), small enough for two CPU cores: the embedded dataset (drawn on
# first use), from scratch, minutes.
_base_ = [
    'mmseg::_base_/models/deeplabv3_r50-d8.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/norms/ws-bcn.py',
    '../_base_/regimes/quick_1xb1.py',
]
custom_imports = dict(imports=['wsbcn_mm', 'wsbcn_mm.openmmlab.datasets.shapes_voc'])

norm_cfg = dict(type='BCN', num_groups=16)  # 64 channels in the heads: 4 per group
conv_cfg = {{_base_.conv}}
num_classes = 6  # five shapes and the background

model = dict(
    data_preprocessor=dict(size=(160, 192)),
    pretrained=None,  # mmseg's base sets it, and it clashes with init_cfg
    backbone=dict(
        type='ResNet',  # plain 7x7 stem; ResNetV1c has another
        depth=18,
        base_channels=32,
        num_stages=3,  # stride 8, 128 channels: enough for objects of 32 to 96 pixels
        strides=(1, 2, 1),
        dilations=(1, 1, 2),
        out_indices=(0, 1, 2),
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        norm_eval=False,  # from scratch: there are no statistics yet to freeze
        frozen_stages=-1,  # nor weights
        init_cfg=None,
        contract_dilation=False,
    ),
    decode_head=dict(
        in_channels=128,
        in_index=2,
        channels=64,
        dilations=(1, 3, 6, 9),
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
    ),
    auxiliary_head=dict(
        in_channels=64,
        in_index=1,
        channels=64,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
    ),
)

data_root = 'data/shapes/VOCdevkit/VOC2012'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
prefix = dict(img_path='JPEGImages', seg_map_path='SegmentationClass')
train_dataloader = dict(
    dataset=dict(
        type='ShapesVOCDataset',
        data_root=data_root,
        ann_file='ImageSets/Segmentation/train.txt',
        data_prefix=prefix,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type='ShapesVOCDataset',
        data_root=data_root,
        ann_file='ImageSets/Segmentation/val.txt',
        data_prefix=prefix,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

max_epochs = 6  # 2,160 one-image steps
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='PolyLR',
        power=0.9,
        eta_min=0.0002,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
log_processor = dict(by_epoch=True)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook', interval=1),  # every image, where asked to draw
)
visualizer = dict(alpha=0.5)  # the black of the background class would hide the image
randomness = dict(seed=0)
