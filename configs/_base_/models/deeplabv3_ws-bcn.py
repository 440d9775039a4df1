# DeepLabV3 with WS + BCN in backbone, ASPP (image pooling and bottleneck included) and auxiliary
# head: three places, each set here, because mmseg's models read their own norm_cfg.
_base_ = ['./deeplabv3_sync-bn.py', '../norms/ws-bcn.py']
model = dict(
    backbone=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    decode_head=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
    auxiliary_head=dict(norm_cfg={{_base_.norm}}, conv_cfg={{_base_.conv}}),
)
