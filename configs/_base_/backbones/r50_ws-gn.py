# ResNet-50, pretrained with WS + GN by the authors, therefore with their formula.
start = dict(
    backbone=dict(
        depth=50,
        conv_cfg=dict(formula='std_eps'),
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://jhu/resnet50_gn_ws'),
    )
)
