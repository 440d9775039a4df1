# TSM R50 with GroupNorm on Something-Something V1, one clip per GPU.
_base_ = ['../_base_/models/tsm_gn.py', '../_base_/regimes/sthv1_8xb1.py']
