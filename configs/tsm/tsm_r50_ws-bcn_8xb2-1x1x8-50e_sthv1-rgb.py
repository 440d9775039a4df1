# TSM R50 with WS + BCN on Something-Something V1, two clips per GPU.
_base_ = ['../_base_/models/tsm_ws-bcn.py', '../_base_/regimes/sthv1_8xb2.py']
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
