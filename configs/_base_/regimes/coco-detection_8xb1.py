# COCO at 8 GPUs x 1 image: the total of 4xb2, therefore its rate.
_base_ = './coco-detection_4xb2.py'
train_dataloader = dict(batch_size=1)
