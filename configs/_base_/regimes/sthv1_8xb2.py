# Something-Something V1, two clips on each of 8 GPUs.
_base_ = './sthv1_8xb1.py'
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=0.0025))
auto_scale_lr = dict(base_batch_size=16)
