# As on the drawn pictures, on CIFAR-10 in a folder for each class: data/cifar10/{train,val}/CLASS/.
# 8,000 steps of one image: top-1 0.394 at seed 0.
_base_ = './quick_resnet18_ws-bcn_1xb1_pictures.py'
model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(strides=(1, 2, 2)),  # 32 x 32 pixels
    head=dict(num_classes=10),
)
data = dict(type='CustomDataset', data_root='data/cifar10')
train_dataloader = dict(
    dataset=data,
    sampler=dict(type='InfiniteSampler', shuffle=True, _delete_=True),
)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
max_iters = 8000
train_cfg = dict(
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=max_iters // 2,
    _delete_=True,
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=0,
        end=max_iters,
        T_max=max_iters,
        eta_min=1e-5,
    ),
]
default_hooks = dict(
    logger=dict(interval=500),
    checkpoint=dict(by_epoch=False, interval=max_iters // 2),
)
log_processor = dict(by_epoch=False)
