# Mask R-CNN with WS + BCN at one image per step, small enough for two CPU cores: the embedded
# dataset (drawn on first use), from scratch, minutes. `bash tools/quickstart.sh` runs it.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/norms/ws-bcn.py',
    '../_base_/regimes/quick_1xb1.py',
]
custom_imports = dict(imports=['wsbcn_mm', 'wsbcn_mm.openmmlab.datasets.shapes_coco'])

# 64 channels in neck and heads: 4 per group. The estimates remember about 20 images: in a run of
# minutes the weights move too fast for the default's 100.
norm_cfg = dict(type='BCN', num_groups=16, momentum=0.05)
conv_cfg = {{_base_.conv}}
num_classes = 5

model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        norm_eval=False,  # from scratch: there are no statistics yet to freeze
        frozen_stages=-1,  # nor weights
        init_cfg=None,
    ),
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=64,
        num_outs=4,
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
    ),
    rpn_head=dict(  # no norm in the RPN, therefore no WS either
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[5], strides=[4, 8, 16, 32]),  # objects of 32 to 96 pixels
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(
            # One normalised convolution and one layer: the usual four learn too slowly for minutes.
            type='ConvFCBBoxHead',
            num_shared_convs=1,
            num_shared_fcs=1,
            in_channels=64,
            conv_out_channels=64,
            fc_out_channels=256,
            num_classes=num_classes,
            loss_bbox=dict(loss_weight=2.0),
            reg_class_agnostic=True,  # minutes are too few to learn five box regressors
            norm_cfg=norm_cfg,
            conv_cfg=conv_cfg,
        ),
        mask_roi_extractor=dict(
            out_channels=64,
            finest_scale=28,
            # Masks of 20x20 instead of 28x28: half the work, enough for objects of 32 to 96 pixels.
            roi_layer=dict(sampling_ratio=1, output_size=10),
        ),
        mask_head=dict(
            class_agnostic=True,  # likewise five masks
            num_convs=2,  # with four the mask head is half of a step
            in_channels=64,
            conv_out_channels=48,
            num_classes=num_classes,
            norm_cfg=norm_cfg,
            conv_cfg=conv_cfg,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=100, max_per_img=100),
        rcnn=dict(sampler=dict(num=48, pos_fraction=0.5), mask_size=20),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=100), rcnn=dict(max_per_img=50)),
)

data_root = 'data/shapes/coco/'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 160), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    dataset=dict(
        type='ShapesCocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        filter_cfg=dict(filter_empty_gt=False),  # images without objects are part of the job
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type='ShapesCocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric',
    ann_file=data_root + 'annotations/instances_val2017.json',
    metric=['bbox', 'segm'],
)
test_evaluator = val_evaluator

max_epochs = 6  # 2,160 one-image steps
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(
    # AdamW, because SGD needs more steps than minutes allow to tell the classes apart; its second
    # moments remember 50 steps, not 1,000: the first ones are much steeper than the rest.
    optimizer=dict(type='AdamW', lr=0.002, betas=(0.9, 0.98), weight_decay=0.02, fused=True),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        eta_min=2e-5,
        convert_to_iter_based=True,
    ),
]
randomness = dict(seed=0)
