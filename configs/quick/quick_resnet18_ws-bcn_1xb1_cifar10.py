# As on the drawn pictures, on CIFAR-10 in a folder for each class: data/cifar10/{train,val}/CLASS/.
# One epoch. Not trained yet.
_base_ = './quick_resnet18_ws-bcn_1xb1_pictures.py'
model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(strides=(1, 2, 2)),  # 32 x 32 pixels
    head=dict(num_classes=10),
)
data = dict(type='CustomDataset', data_root='data/cifar10')
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
max_epochs = 1
train_cfg = dict(max_epochs=max_epochs)
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
