# A temporal shift network (TSM) with WS + BCN at one clip per step, small enough for two CPU cores:
# the embedded clips of moving shapes (drawn on first use), from scratch, minutes. How a shape moves
# is the class. With `frames = 1` the same network sees a single frame, which does not tell.
_base_ = [
    'mmaction::_base_/models/tsm_r50.py',
    'mmaction::_base_/default_runtime.py',
    '../_base_/norms/ws-bcn.py',
]
custom_imports = dict(imports=['wsbcn_mm', 'wsbcn_mm.openmmlab.datasets.shapes_clips'])

frames = 8  # of the 16 of a clip
num_classes = 8

model = dict(
    backbone=dict(
        depth=18,
        num_segments=frames,
        norm_cfg={{_base_.norm}},
        conv_cfg={{_base_.conv}},
        pretrained=None,
        pretrained2d=False,  # from scratch: MMAction2 would look for weights of a 2d network
    ),
    cls_head=dict(
        num_classes=num_classes,
        in_channels=512,
        num_segments=frames,
        dropout_ratio=0.2,
        topk=(1,),
    ),
)

data_root = 'data/clips'
train_pipeline = [
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=1, frame_interval=1, num_clips=frames),
    dict(type='DecordDecode'),
    # Left becomes right, and clockwise counter-clockwise.
    dict(type='Flip', flip_ratio=0.5, flip_label_map={0: 1, 1: 0, 4: 5, 5: 4}),
    dict(type='FormatShape', input_format='NCHW'),
    dict(type='PackActionInputs'),
]
test_pipeline = [
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=1, frame_interval=1, num_clips=frames, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='FormatShape', input_format='NCHW'),
    dict(type='PackActionInputs'),
]
train_dataloader = dict(
    batch_size=1,
    num_workers=0,  # a worker would take one of two cores from the training
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ShapesClipsDataset',
        ann_file=f'{data_root}/train_videos.txt',
        data_prefix=dict(video=f'{data_root}/videos'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ShapesClipsDataset',
        ann_file=f'{data_root}/val_videos.txt',
        data_prefix=dict(video=f'{data_root}/videos'),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='AccMetric', metric_options=dict(top_k_accuracy=dict(topk=(1,))))
test_evaluator = val_evaluator

max_epochs = 4  # 1,920 steps of one clip
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0),
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
auto_scale_lr = dict(enable=False, base_batch_size=1)
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best=None),
)
randomness = dict(seed=0)
