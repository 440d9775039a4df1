# ResNet-50 with WS + GN on ImageNet.
_base_ = ['../_base_/models/imagenet_ws-gn.py', '../_base_/schedules/imagenet_8xb32-90e.py']
model = dict(backbone=dict(depth=50))
train_dataloader = dict(batch_size=32)
