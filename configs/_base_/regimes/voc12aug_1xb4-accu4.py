# One GPU, 4 images at a time, a step of the optimizer every 4: 16 images in all, the same rate.
_base_ = './voc12aug_16xb1.py'
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(accumulative_counts=4)
auto_scale_lr = dict(base_batch_size=4)  # MMEngine does not count accumulation
