# A ResNet-18 that classifies pictures with WS + BCN at one image per step, small enough for two CPU
# cores: the embedded pictures of one shape each (drawn on first use), from scratch, minutes.
_base_ = [
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/norms/ws-bcn.py',
    '../_base_/regimes/quick_1xb1.py',
]
custom_imports = dict(imports=['wsbcn_mm', 'wsbcn_mm.openmmlab.datasets.shapes_pictures'])

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        num_classes=5,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(
        type='ResNet_CIFAR',  # a 3x3 stem: the images are small
        depth=18,
        base_channels=32,
        stem_channels=32,
        num_stages=3,
        strides=(2, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        norm_cfg={{_base_.norm}},
        conv_cfg={{_base_.conv}},
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=5, in_channels=128, topk=(1,)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    dataset=dict(
        type='ShapesPicturesDataset',
        data_root='data/pictures',
        data_prefix='train',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=20,
    dataset=dict(
        type='ShapesPicturesDataset',
        data_root='data/pictures',
        data_prefix='val',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

max_epochs = 2  # 4,000 steps of one image
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
# AdamW, as for the other quick classifier: quick_tsm_r18_ws-bcn_1xb1_shapes.py says why.
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.05, fused=True))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
)
randomness = dict(seed=0)
