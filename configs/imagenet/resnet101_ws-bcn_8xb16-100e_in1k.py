# ResNet-101 with WS + BCN on ImageNet.
_base_ = ['../_base_/models/imagenet_ws-bcn.py', '../_base_/schedules/imagenet_8xb16-100e.py']
model = dict(backbone=dict(depth=101))
train_dataloader = dict(batch_size=16)
