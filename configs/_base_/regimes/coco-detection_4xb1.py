# COCO at 4 GPUs x 1 image, the authors' regime for R101 and X101: half the images, half the rate.
_base_ = './coco-detection_4xb2.py'
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=4)
