# DeepLabV3 R101 with WS + BCN on PASCAL VOC 2012 (its own 1,464 training images), one image per
# GPU, from scratch. Fewer GPUs: `tools/train.py CONFIG --auto-scale-lr` divides the learning rate.
_base_ = [
    '../_base_/deeplabv3_r101_ws-bcn.py',
    'mmseg::_base_/datasets/pascal_voc12.py',
    'mmseg::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        # No BCN+WS checkpoint is published in OpenMMLab's layout. With one of your own:
        # init_cfg=dict(type='Pretrained', checkpoint=...); VOC is small, it is worth many points.
        init_cfg=None,
        norm_eval=False,  # the estimates must follow the weights, which start at random
        frozen_stages=-1,  # random weights must not be frozen
    )
)
crop_size = (513, 513)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2052, 513), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),  # single scale, the image as it is, as the authors evaluate
]
train_dataloader = dict(
    batch_size=1,  # the regime of this project
    sampler=dict(type='DefaultSampler', shuffle=True),  # the schedule counts epochs
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
# The authors' rate and schedule (0.007 for 16 images in all, poly 0.9, 50 epochs).
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.007, momentum=0.9, weight_decay=1e-4),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
max_epochs = 50
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=5)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(
        type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=max_epochs, by_epoch=True,
        convert_to_iter_based=True,
    )
]
log_processor = dict(by_epoch=True)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=5, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
