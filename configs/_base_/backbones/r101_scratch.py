# ResNet-101 from random weights: neither weights nor statistics are worth freezing.
start = dict(
    backbone=dict(
        depth=101,
        init_cfg=None,
        norm_eval=False,
        frozen_stages=-1,
    )
)
