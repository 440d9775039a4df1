# Mask R-CNN R50-FPN with WS + BCN on COCO, one image per GPU, from scratch.
# Fewer GPUs: `tools/train.py CONFIG --auto-scale-lr` divides the learning rate.
_base_ = [
    '../_base_/mask-rcnn_r50_fpn_ws-bcn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        # No BCN+WS checkpoint is published in OpenMMLab's layout. With one of your own:
        # init_cfg=dict(type='Pretrained', checkpoint=...), frozen_stages=1, and the 2x schedule.
        init_cfg=None,
        norm_eval=False,  # the estimates must follow the weights, which start at random
        frozen_stages=-1,  # random weights must not be frozen
    )
)
train_dataloader = dict(batch_size=1)  # the regime of this project
# The authors' rate for COCO (0.01 for 8 images in all; 1 image on each of 8 GPUs here).
optim_wrapper = dict(
    optimizer=dict(lr=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0),  # as MMDetection's from-scratch configs
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
# 6x: from scratch COCO needs about as long as pretraining and 2x fine-tuning together
# (He et al., Rethinking ImageNet Pre-training; MMDetection's scratch configs).
max_epochs = 73
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(
        type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[65, 71], gamma=0.1
    ),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
