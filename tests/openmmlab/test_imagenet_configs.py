"""The configs that pretrain the backbones of the matrix, in MMPretrain's scope."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmengine', reason="configs are mmengine's")

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
FILES = sorted((CONFIGS / 'imagenet').glob('*.py'))
each = pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
NAME = re.compile(
    r'(?P<backbone>resnex?t\d+(-32x4d)?)_(?P<norm>ws-gn|ws-bcn)_8xb(?P<images>\d+)-'
    r'(?P<epochs>\d+)e_in1k'
)


def test_every_backbone_of_the_matrix_can_be_pretrained():
    names = [NAME.fullmatch(file.stem) for file in FILES]
    assert {(n['backbone'], n['norm']) for n in names} == {
        (backbone, norm)
        for backbone in ('resnet50', 'resnet101', 'resnext50-32x4d', 'resnext101-32x4d')
        for norm in ('ws-gn', 'ws-bcn')
    }
    assert len(names) == 8


def test_without_mmpretrain_the_missing_package_is_named(monkeypatch):
    from wsbcn_mm.openmmlab import compat, config

    find_spec = compat.find_spec
    monkeypatch.setattr(compat, 'find_spec', lambda n: None if n == 'mmpretrain' else find_spec(n))
    with pytest.raises(ImportError, match='mmpretrain'):
        config.load_config(str(FILES[0]))


@pytest.fixture
def mmpretrain():
    """Imported for its side effect: it registers models."""
    pytest.importorskip('mmpretrain', reason='only the ImageNet configs need mmpretrain')
    import wsbcn_mm.openmmlab  # noqa: F401  mmpretrain is imported without torchvision

    return pytest.importorskip('mmpretrain.models')


@pytest.fixture
def load(mmpretrain):
    from mmengine.config import Config

    return Config.fromfile


def build(cfg):
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(cfg.model)


@each
def test_the_authors_recipe(file, load):
    name, cfg = NAME.fullmatch(file.stem), load(file)
    images, epochs = int(name['images']), int(name['epochs'])
    # R50: 256 images, 90 epochs; the larger ones: 128 images, 100 epochs; rate 0.1 for both.
    assert (images, epochs) == ((32, 90) if name['backbone'] == 'resnet50' else (16, 100))
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8 * images)
    assert cfg.optim_wrapper.optimizer == dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.param_scheduler.milestones == ([30, 60] if epochs == 90 else [30, 60, 90])
    crop, flip = cfg.train_dataloader.dataset.pipeline[1:3]
    assert (crop.type, crop.scale, flip.type) == ('RandomResizedCrop', 224, 'RandomFlip')


@each
def test_the_layers_are_those_of_the_published_checkpoints(file, load):
    from torch import nn

    from wsbcn_mm import BatchChannelNorm2d, WSConv2d

    name = NAME.fullmatch(file.stem)
    backbone = build(load(file)).backbone
    blocks = [len(getattr(backbone, layer)) for layer in backbone.res_layers]
    assert blocks == [3, 4, 23 if '101' in name['backbone'] else 6, 3]
    assert backbone.layer1[0].conv2.groups == (32 if '32x4d' in name['backbone'] else 1)
    assert backbone.zero_init_residual
    convs = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    formula = {'ws-gn': 'std_eps', 'ws-bcn': 'var_eps'}[name['norm']]
    assert {(type(m), m.formula) for m in convs} == {(WSConv2d, formula)}
    kind = nn.GroupNorm if name['norm'] == 'ws-gn' else BatchChannelNorm2d
    norms = [m for m in backbone.modules() if isinstance(m, nn.GroupNorm)]
    assert {type(m) for m in norms} == {kind} and len(norms) == len(convs)
    if kind is BatchChannelNorm2d:
        assert {(m.mode, m.affine) for m in norms} == {('batch', 'group')}


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Two pictures in ImageNet's layout; a list says their classes, as not all 1,000 are there."""
    from PIL import Image

    root = tmp_path_factory.mktemp('imagenet')
    (root / 'meta').mkdir()
    for label, name in enumerate(('n01440764', 'n01443537')):
        (root / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (80, 70), (90 * label, 40, 160)).save(root / 'train' / name / '1.JPEG')
        with (root / 'meta/train.txt').open('a') as file:
            file.write(f'{name}/1.JPEG {label}\n')
    return str(root)


@each
def test_one_training_step_and_one_inference(file, load, imagenet, monkeypatch):
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope
    from mmengine.runner import Runner
    from mmpretrain.models.backbones import ResNet, ResNeXt

    from wsbcn_mm.openmmlab.data.check import check_dataset

    for kind in (ResNet, ResNeXt):
        settings = {d: (block, (1, 1, 1, 1)) for d, (block, _) in kind.arch_settings.items()}
        monkeypatch.setattr(kind, 'arch_settings', settings)
    cfg = load(file)
    model = build(cfg).train()
    model.init_weights()
    assert not model.backbone.layer1[0].norm3.weight.any()  # as the authors start
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    loader = cfg.train_dataloader
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    loader.dataset.data_root = imagenet
    loader.dataset.pipeline[1].scale = 64
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        loader = Runner.build_dataloader(loader)
    check_dataset(loader.dataset, model)  # of whose 1,000 names two are there twice
    data = next(iter(loader))
    assert {int(sample.gt_label) for sample in data['data_samples']} == {0, 1}
    before = model.backbone.conv1.weight.clone()
    data_preprocessor = model.data_preprocessor(data, training=True)
    assert data_preprocessor['inputs'].dtype == torch.float32
    losses = model.train_step(data, optimizer)
    assert losses['loss'].isfinite()
    assert not torch.equal(model.backbone.conv1.weight, before)
    model.eval()
    with torch.no_grad():
        predicted = model.test_step(data)
    assert len(predicted) == 2
    assert all(sample.pred_score.isfinite().all() for sample in predicted)


@pytest.mark.parametrize('data, classes', [('pictures', 5), ('cifar10', 10)])
def test_quick_classifiers(data, classes, load):
    """They train at one image; the map of a single small picture is enough for their norms."""
    cfg = load(CONFIGS / f'quick/quick_resnet18_ws-bcn_1xb1_{data}.py')
    assert cfg.train_dataloader.batch_size == 1
    model = build(cfg).train()
    loss = model.head.loss(model.extract_feat(torch.randn(1, 3, 32, 32)), [label_of(classes - 1)])
    loss['loss'].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.head.fc.out_features == classes


def label_of(label):
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(label)
