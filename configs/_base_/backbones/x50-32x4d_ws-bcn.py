# ResNeXt-50 32x4d, pretrained with WS + BCN: the authors' rx50_bcn_ws.pth, converted, or a run of
# configs/imagenet (then with init_cfg's prefix='backbone.'). With their formula, to which the
# running estimates are tied.
#   python tools/model_converters/convert_checkpoint.py rx50_bcn_ws.pth \
#       -o checkpoints/resnext50_32x4d_ws-bcn.pth --from authors-bcn --to bcn-ws
start = dict(
    backbone=dict(
        type='ResNeXt',
        depth=50,
        groups=32,
        base_width=4,
        conv_cfg=dict(formula='var_eps'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/resnext50_32x4d_ws-bcn.pth'),
    )
)
