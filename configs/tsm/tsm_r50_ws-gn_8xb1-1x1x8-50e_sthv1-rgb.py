# TSM R50 with WS + GN on Something-Something V1, one clip per GPU.
_base_ = ['../_base_/models/tsm_ws-gn.py', '../_base_/regimes/sthv1_8xb1.py']
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
