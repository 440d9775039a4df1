# A classifier of MMPretrain (`pip install mmpretrain`; only these configs need it), and the
# authors' data: crop of 224, flip.
_base_ = [
    'mmpretrain::_base_/models/resnet50.py',
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
