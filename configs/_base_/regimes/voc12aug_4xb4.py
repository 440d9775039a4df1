# 4 GPUs x 4 images: still 16 in all, therefore the same rate.
_base_ = './voc12aug_16xb1.py'
train_dataloader = dict(batch_size=4)
