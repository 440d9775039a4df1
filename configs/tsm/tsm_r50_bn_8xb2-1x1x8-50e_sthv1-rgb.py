# TSM R50 with BatchNorm on Something-Something V1, two clips per GPU.
_base_ = ['../_base_/models/tsm_bn.py', '../_base_/regimes/sthv1_8xb2.py']
