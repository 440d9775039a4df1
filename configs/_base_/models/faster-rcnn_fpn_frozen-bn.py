# Faster R-CNN FPN with the 4conv1fc box head, which every row of the matrix has; frozen BatchNorm
# in the backbone and no norm elsewhere.
_base_ = './faster-rcnn_fpn_frozen-bn-2fc.py'
model = dict(roi_head=dict(bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256)))
