# ResNeXt-101 32x4d, pretrained with WS + GN by the authors, therefore with their formula.
start = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        conv_cfg=dict(formula='std_eps'),
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://jhu/resnext101_32x4d_gn_ws'),
    )
)
