# COCO at 4 GPUs x 2 images, the authors' regime for R50 and X50: short side 800, rate 0.01.
_base_ = ['mmdet::_base_/datasets/coco_instance.py', 'mmdet::_base_/default_runtime.py']
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4)
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
