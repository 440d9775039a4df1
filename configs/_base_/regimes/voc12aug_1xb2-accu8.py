# One GPU, 2 images at a time, a step of the optimizer every 8: 16 images in all, the same rate.
_base_ = './voc12aug_16xb1.py'
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=8)
auto_scale_lr = dict(base_batch_size=2)  # MMEngine does not count accumulation
