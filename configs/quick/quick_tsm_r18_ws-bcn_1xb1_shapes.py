# A temporal shift network (TSM) with WS + BCN at one clip per step, small enough for two CPU cores:
# the embedded clips of moving shapes (drawn on first use), from scratch, minutes. How a shape moves
# is the class. ..._single-frame.py trains the same network on single frames, which do not tell.
_base_ = [
    'mmaction::_base_/models/tsm_r50.py',
    'mmaction::_base_/default_runtime.py',
    '../_base_/norms/ws-bcn.py',
    '../_base_/regimes/quick_1xb1.py',
]
custom_imports = dict(imports=['wsbcn_mm', 'wsbcn_mm.openmmlab.datasets.shapes_clips'])

frames = 8  # of the 16 of a clip
num_classes = 8

model = dict(
    backbone=dict(
        depth=18,
        num_segments=frames,
        shift_div=4,  # half of the channels see other frames: there is nothing else to see
        norm_cfg={{_base_.norm}},
        conv_cfg={{_base_.conv}},
        pretrained=None,
        pretrained2d=False,  # from scratch: MMAction2 would look for weights of a 2d network
    ),
    cls_head=dict(
        num_classes=num_classes,
        in_channels=512,
        num_segments=frames,
        dropout_ratio=0,
        # With MMAction2's 0.001, for trained backbones, next to no gradient reaches this one, and
        # no classifier of untrained features learns: no single frame tells.
        init_std=0.03,
        topk=(1,),
    ),
)

data_root = 'data/clips'
train_pipeline = [
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=1, frame_interval=1, num_clips=frames),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(48, 48), keep_ratio=False),
    # Left becomes right, and clockwise counter-clockwise.
    dict(type='Flip', flip_ratio=0.5, flip_label_map={0: 1, 1: 0, 4: 5, 5: 4}),
    dict(type='FormatShape', input_format='NCHW'),
    dict(type='PackActionInputs'),
]
test_pipeline = [
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=1, frame_interval=1, num_clips=frames, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(48, 48), keep_ratio=False),
    dict(type='FormatShape', input_format='NCHW'),
    dict(type='PackActionInputs'),
]
train_dataloader = dict(
    dataset=dict(
        type='ShapesClipsDataset',
        ann_file=f'{data_root}/train_videos.txt',
        data_prefix=dict(video=f'{data_root}/videos'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
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

max_epochs = 5  # 2,400 steps of one clip
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
# AdamW: what all features have in common is 15 times as large as what tells clips apart, so at one
# clip per step a rate of SGD that the classifier bears does not move the convolutions.
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=0.0005, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(custom_keys=dict(cls_head=dict(lr_mult=0.5))),
)
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
    logger=dict(interval=50),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best=None),
)
randomness = dict(seed=0)
