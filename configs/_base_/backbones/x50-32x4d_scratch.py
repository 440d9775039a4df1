# ResNeXt-50 32x4d from random weights: neither weights nor statistics are worth freezing.
start = dict(
    backbone=dict(
        type='ResNeXt',
        depth=50,
        groups=32,
        base_width=4,
        init_cfg=None,
        norm_eval=False,
        frozen_stages=-1,
    )
)
