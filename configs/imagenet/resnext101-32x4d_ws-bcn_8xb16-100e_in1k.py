# ResNeXt-101 32x4d with WS + BCN on ImageNet.
_base_ = ['../_base_/models/imagenet_ws-bcn.py', '../_base_/schedules/imagenet_8xb16-100e.py']
model = dict(backbone=dict(type='ResNeXt', depth=101, groups=32, width_per_group=4))
train_dataloader = dict(batch_size=16)
