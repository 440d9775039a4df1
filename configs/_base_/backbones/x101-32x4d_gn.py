# ResNeXt-101 32x4d, pretrained with GN by the authors of WS.
start = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://jhu/resnext101_32x4d_gn'),
    )
)
