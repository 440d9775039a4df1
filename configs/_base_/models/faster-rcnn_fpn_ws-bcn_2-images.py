# At two images per GPU the estimates see two images per update: twice the rate keeps their memory,
# counted in images, the same.
_base_ = './faster-rcnn_fpn_ws-bcn.py'
rate = dict(momentum=0.02)
model = dict(
    backbone=dict(norm_cfg=rate),
    neck=dict(norm_cfg=rate),
    roi_head=dict(bbox_head=dict(norm_cfg=rate)),
)
