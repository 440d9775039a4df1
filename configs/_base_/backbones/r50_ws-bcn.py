# ResNet-50, pretrained with WS + BCN: the authors' rn50_bcn_ws.pth, converted, or a run of
# configs/imagenet (then with init_cfg's prefix='backbone.'). With their formula, to which the
# running estimates are tied.
#   python tools/model_converters/convert_checkpoint.py rn50_bcn_ws.pth \
#       -o checkpoints/resnet50_ws-bcn.pth --from authors-bcn --to bcn-ws
start = dict(
    backbone=dict(
        depth=50,
        conv_cfg=dict(formula='var_eps'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/resnet50_ws-bcn.pth'),
    )
)
