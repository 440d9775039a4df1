# 73 epochs, the rate drops at 65 and 71. From scratch COCO needs about as long as pretraining and
# 2x fine-tuning together (He et al., Rethinking ImageNet Pre-training; MMDetection's scratch
# configs).
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=73, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=73, by_epoch=True, milestones=[65, 71], gamma=0.1),
]
