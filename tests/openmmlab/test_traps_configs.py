"""The traps of OpenMMLab that lie in configs: every config that we ship, loaded and built.

Asserts are made on the built model, by walking its modules: a config may say what it likes, a key
in the wrong place changes nothing. Files are found, not listed: a new config is tested at once.
"""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmcv', reason='layers are built by mmcv')
pytest.importorskip('mmdet', reason='half of the configs inherit from mmdet')
pytest.importorskip('mmseg', reason='half of the configs inherit from mmseg')

import ast
from collections import Counter
from pathlib import Path

import mmdet.models  # noqa: F401  registers
import mmseg.models  # noqa: F401
import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import nn

from tests.openmmlab import matrix
from tests.openmmlab.matrix import load
from wsbcn_mm import BatchChannelNorm2d
from wsbcn_mm.layers import WeightStandardized

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
# Those of mmpretrain and mmaction: test_imagenet_configs.py, test_recognition.py.
OTHERS = ('imagenet', 'tsm', 'quick_resnet', 'quick_tsm')
FILES = sorted(
    f
    for f in CONFIGS.rglob('*.py')
    if not any(part.startswith(('_base_', *OTHERS)) for part in f.relative_to(CONFIGS).parts)
)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def each(*words):
    """Parametrises over the configs whose path holds all the words."""
    files = [f for f in FILES if all(word in f.relative_to(CONFIGS).as_posix() for word in words)]
    return pytest.mark.parametrize('file', files, ids=lambda f: f.stem)


ALL, OURS = each(), each('ws-bcn')
DETECTION, SEGMENTATION = each('ws-bcn', 'mask-rcnn'), each('ws-bcn', 'deeplabv3')


@pytest.fixture(scope='module', params=FILES, ids=lambda f: f.stem)
def built(request):
    """A config and its model; built once, whatever the number of tests."""
    return load(request.param), matrix.built(request.param)


WITH_BCN = [f for f in FILES if 'ws-bcn' in f.name]


@pytest.fixture(scope='module', params=WITH_BCN, ids=lambda f: f.stem)
def ours(request):
    """Likewise, of the configs with WS + BCN."""
    return load(request.param), matrix.built(request.param)


def walk(value):
    """Every dict in a config, at any depth."""
    if isinstance(value, dict):
        yield value
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for item in value:
        yield from walk(item)


def norm_behind(model, name):
    """The norm that follows a convolution, by the structure of the module that holds it."""
    holder, _, attribute = name.rpartition('.')
    parent = model.get_submodule(holder)
    if isinstance(parent, ConvModule):
        assert parent.order.index('norm') == parent.order.index('conv') + 1
        return parent.norm
    if isinstance(parent, nn.Sequential):  # downsampling, deep stem
        return parent[int(attribute) + 1]
    return getattr(parent, attribute.replace('conv', 'norm'))  # ResNet and its blocks


def test_there_are_configs_of_every_kind():
    """So that a moved folder does not leave the tests below with nothing to do."""
    kinds = Counter(f.parent.name for f in FILES)
    assert {'mask_rcnn', 'faster_rcnn', 'retinanet', 'deeplabv3', 'quick'} == kinds.keys()


# ---- trap 17: merging is key by key ------------------------------------------------------------


def test_trap_17_the_host_merges_key_by_key(tmp_path):
    """Why our mixin holds variables alone: three ways in which a shared norm_cfg goes wrong."""
    (tmp_path / 'gn.py').write_text("norm_cfg = dict(type='GN', num_groups=2)\n")
    (tmp_path / 'bcn.py').write_text("norm_cfg = dict(_delete_=True, type='BCN', num_groups=2)\n")

    def config(text):
        (tmp_path / 'config.py').write_text(text)
        return Config.fromfile(tmp_path / 'config.py')

    # A key of the old norm stays and does not fit the new one.
    cfg = config("_base_ = './gn.py'\nnorm_cfg = dict(type='BN')")
    assert cfg.norm_cfg == dict(type='BN', num_groups=2)
    with pytest.raises(TypeError, match='num_groups'):
        build_norm_layer(cfg.norm_cfg, 8)
    # Two bases may not define the same key.
    with pytest.raises(KeyError, match='Duplicate'):
        config("_base_ = ['./gn.py', './bcn.py']")
    # _delete_ in a base, with nothing to delete, becomes a key of the result.
    assert '_delete_' in config("_base_ = './bcn.py'").norm_cfg

    # Ours goes beside a base of mmseg, which defines norm_cfg.
    mixin = CONFIGS / '_base_' / 'norms' / 'ws-bcn.py'
    cfg = config(f"_base_ = ['mmseg::_base_/models/deeplabv3_r50-d8.py', '{mixin}']")
    assert cfg.norm_cfg.type == 'SyncBN'
    assert cfg.norm.type == 'BCN'
    assert cfg.conv.type == 'WSConv2d'


@ALL
def test_trap_17_no_delete_key_and_no_reserved_key_is_left(file):
    """A `_delete_` that survives reaches a constructor, or silently deletes nothing."""
    for part in walk(load(file).to_dict()):
        assert not {'_delete_', '_base_'} & part.keys(), part


@ALL
def test_trap_17_custom_imports_still_name_the_package(file):
    """Lists are replaced, not extended: a config with imports of its own must repeat ours."""
    assert 'wsbcn_mm' in load(file).custom_imports.imports


ALLOWED = dict(
    norm_cfg={'type', 'requires_grad', 'num_groups', 'momentum', 'eps', 'affine', 'mode', 'sync'},
    conv_cfg={'type', 'eps', 'formula'},
)


@OURS
def test_trap_17_norm_and_conv_settings_hold_no_key_of_another_layer(file):
    """Whatever the bases said before: only arguments of our layers are left."""
    found = 0
    for part in walk(load(file).model.to_dict()):
        for key, allowed in ALLOWED.items():
            if part.get(key) is not None:
                found += 1
                assert part[key].keys() <= allowed, part[key]
    assert found >= 6  # three places or more, two settings each


# ---- traps 17, 18, 19, on the model ------------------------------------------------------------


def test_trap_17_18_every_norm_is_ours(ours):
    """mmseg's models read their own norm_cfg in three places: a top-level one changes nothing."""
    _, model = ours
    names = {name for name, m in model.named_modules() if isinstance(m, BatchChannelNorm2d)}
    assert names
    for name, module in model.named_modules():
        if isinstance(module, NORMS) and name not in names:
            holder, _, attribute = name.rpartition('.')
            assert holder in names, f'{name} is a {type(module).__name__}'
            assert attribute == 'bn', name
            assert not module.affine, name


def test_trap_13_19_weight_standardization_and_norm_come_together(ours):
    """A WS convolution without a norm multiplies activations by sqrt(fan-in).

    Here for every convolution of the models, and the other way round: no BCN without WS.
    """
    _, model = ours
    # By every name: the towers of RetinaNet run one convolution on each level, with other norms.
    convs = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, WeightStandardized)
    ]
    assert len(convs) >= 20
    behind = [norm_behind(model, name) for name in convs]
    for name, norm in zip(convs, behind):
        assert isinstance(norm, BatchChannelNorm2d), name
    assert len(set(behind)) == len(behind)
    assert set(behind) == {m for m in model.modules() if isinstance(m, BatchChannelNorm2d)}


def test_trap_18_19_the_places_of_each_kind_of_model(ours):
    """Backbone and every head that has a norm upstream; each place is asked by name."""
    cfg, model = ours
    modules = {'backbone.conv1': (model.backbone.conv1, model.backbone.norm1)}
    if cfg.default_scope == 'mmdet':
        assert len(model.neck.lateral_convs) >= 3  # they keep conv_cfg when they lose the norm
        assert len(model.neck.fpn_convs) >= 4
        places = ['neck.lateral_convs', 'neck.fpn_convs']
        if hasattr(model, 'roi_head'):
            # Shared2FC has no convolution, so that its norm_cfg does nothing.
            places.append('roi_head.bbox_head.shared_convs')
            # The RPN takes neither: no norm behind its convolution.
            assert not [m for m in model.rpn_head.modules() if isinstance(m, WeightStandardized)]
            if model.roi_head.with_mask:
                places.append('roi_head.mask_head.convs')
        else:
            places += [f'bbox_head.{t}_convs.{i}' for t in ('cls', 'reg') for i in range(5)]
        for place in places:
            assert len(model.get_submodule(place)) > 0
            for i, module in enumerate(model.get_submodule(place)):
                modules[f'{place}.{i}'] = (module.conv, module.norm)
    else:
        heads = [model.decode_head, model.auxiliary_head]
        assert len(model.decode_head.aspp_modules) == 4
        places = [model.decode_head.image_pool[1], model.decode_head.bottleneck]
        places += [*model.decode_head.aspp_modules, *model.auxiliary_head.convs]
        for i, module in enumerate(places):
            modules[f'heads.{i}'] = (module.conv, module.norm)
        for head in heads:
            assert not isinstance(head.conv_seg, WeightStandardized)  # no norm behind it either
    for name, (conv, norm) in modules.items():
        assert isinstance(conv, WeightStandardized), name
        assert isinstance(norm, BatchChannelNorm2d), name


def test_trap_06_the_built_backbone_obeys_the_config(built):
    """From scratch nothing is frozen: there are no statistics or weights worth keeping."""
    cfg, model = built
    backbone = model.backbone
    model.train()
    settings = cfg.model.backbone
    if settings.init_cfg is None:
        assert (settings.norm_eval, settings.frozen_stages) == (False, -1)
        assert all(m.training for m in backbone.modules())
        assert all(p.requires_grad for p in backbone.parameters())
    else:
        assert settings.init_cfg.type == 'Pretrained'
        # A pretrained stage may be frozen; the estimates behind it follow the weights.
        assert settings.frozen_stages in ((1,) if cfg.default_scope == 'mmdet' else (-1,))
        assert settings.norm_eval is ('frozen-bn' in cfg.filename)


@SEGMENTATION
def test_trap_18_pretrained_is_off_and_the_stem_is_plain(file):
    """mmseg's bases set ``pretrained`` (clashes with init_cfg) and ResNetV1c (another stem)."""
    model = load(file).model
    assert model.pretrained is None
    assert model.backbone.type == 'ResNet'
    assert not matrix.built(file).backbone.deep_stem


@DETECTION
def test_trap_19_box_head_has_convolutions(file):
    head = load(file).model.roi_head.bbox_head
    assert head.type == 'Shared4Conv1FCBBoxHead' or head.num_shared_convs > 0


# ---- trap 6: on purpose, not inherited ---------------------------------------------------------


def own_keywords(file):
    """The names that a config and its bases within configs/ set themselves."""
    tree = ast.parse(file.read_text().replace('{{', '(').replace('}}', ')'))
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            bases = ast.literal_eval(node.value)
            for base in [bases] if isinstance(bases, str) else bases:
                if '::' not in base:
                    names |= own_keywords((file.parent / base).resolve())
    return names


@ALL
def test_trap_06_22_what_upstream_presets_is_set_on_purpose(file):
    """mmdet's defaults freeze norms and a stage, and its learning rate is for 16 images."""
    assert {'norm_eval', 'frozen_stages', 'init_cfg', 'lr', 'batch_size'} <= own_keywords(file)


@ALL
def test_trap_22_the_learning_rate_names_its_batch_size(file):
    """`--auto-scale-lr` needs it; the file's name says GPUs x images."""
    cfg = load(file)
    gpus, images = next(
        part.split('-')[0].split('xb') for part in file.stem.split('_') if 'xb' in part
    )
    assert cfg.train_dataloader.batch_size == int(images)
    assert cfg.auto_scale_lr.base_batch_size == int(gpus) * int(images)
    assert not cfg.auto_scale_lr.enable


def test_trap_25_basenames_are_unique():
    """mim finds a config by its basename, anywhere in the package."""
    names = Counter(f.name for f in FILES)
    assert not [name for name, count in names.items() if count > 1]


# ---- traps 9 and 10, on whole models -----------------------------------------------------------


def empty_sample(cfg, height, width):
    """An image without any object."""
    if cfg.default_scope == 'mmdet':
        sample = DetDataSample(metainfo=dict(img_shape=(height, width), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.long),
            masks=BitmapMasks([], height, width),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        return sample
    sample = SegDataSample(metainfo=dict(img_shape=(height, width), scale_factor=(1.0, 1.0)))
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, height, width, dtype=torch.long))
    return sample


@each('ws-bcn', 'quick')
def test_trap_09_10_one_image_without_objects_trains(file):
    """The whole model on one image: no RoI for the mask head, one value per channel in ASPP."""
    cfg = load(file)
    height, width = 160, 192
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).train()
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch = dict(inputs=[image], data_samples=[empty_sample(cfg, height, width)])
        batch = model.data_preprocessor(batch, training=True)
        loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    for name, buffer in model.named_buffers():
        assert buffer.isfinite().all(), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert model.backbone.conv1.weight.grad.any()
    if cfg.default_scope == 'mmdet':
        for module in model.roi_head.mask_head.convs:
            assert module.norm.bn.num_batches_tracked == 0
            assert (module.norm.bn.running_var == 1).all()
    else:
        assert model.decode_head.image_pool[1].norm.bn.num_batches_tracked == 1
