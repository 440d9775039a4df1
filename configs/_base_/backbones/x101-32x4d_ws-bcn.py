# ResNeXt-101 32x4d, pretrained with WS + GN by the authors and converted to WS + BCN (none with WS
# + BCN is published): with their formula and, as in GN, a scale for every channel.
#   python tools/model_converters/convert_checkpoint.py resnext101_32x4d_gn_ws.pth \
#       -o checkpoints/resnext101_32x4d_gn.pth --from openmmlab-gn-ws --to bcn-ws
#   python tools/model_converters/recalibrate.py CONFIG checkpoints/resnext101_32x4d_gn.pth \
#       -o checkpoints/resnext101_32x4d_ws-bcn.pth --keep-function
start = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        norm_cfg=dict(affine='channel'),
        conv_cfg=dict(formula='std_eps'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/resnext101_32x4d_ws-bcn.pth'),
    )
)
