# ResNet-50, pretrained with GN for Detectron, which feeds BGR images and divides by nothing.
start = dict(
    data_preprocessor=dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(
        depth=50,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://detectron/resnet50_gn'),
    ),
)
