# Mask R-CNN R50-FPN with WS + BCN on COCO, two images per GPU (the authors' 4 GPUs), from scratch.
_base_ = './mask-rcnn_r50_fpn_ws-bcn_8xb1-scratch-6x_coco.py'
# The total batch of 8 stays, so the learning rate does. The estimates see two images per update:
# twice the rate keeps their memory, counted in images, the same.
train_dataloader = dict(batch_size=2)
rate = dict(momentum=0.02)
model = dict(
    backbone=dict(norm_cfg=rate),
    neck=dict(norm_cfg=rate),
    roi_head=dict(bbox_head=dict(norm_cfg=rate), mask_head=dict(norm_cfg=rate)),
)
