# ResNet-50 from random weights: neither weights nor statistics are worth freezing.
start = dict(
    backbone=dict(
        depth=50,
        init_cfg=None,
        norm_eval=False,
        frozen_stages=-1,
    )
)
