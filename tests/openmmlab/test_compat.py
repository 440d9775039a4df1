"""The gaps that wsbcn_mm.openmmlab.compat closes, each against the real host."""

import pytest

pytest.importorskip('mmengine', reason="the gaps are mmengine's")
pytest.importorskip('mmcv', reason='layers are built by mmcv')

import importlib
import os
import subprocess
import sys

from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.config import Config
from mmengine.config import config as config_module
from mmengine.config.utils import MODULE2PACKAGE

from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.networks.layer_kinds import is_conv
from wsbcn_mm.openmmlab import compat
from wsbcn_mm.openmmlab.conversion.convert import convert_config
from wsbcn_mm.structure import standardizable

# ---- configs of packages -----------------------------------------------------------------------

INHERITING = """
_base_ = ['mmdet::_base_/default_runtime.py', 'wsbcn_mm::_base_/norms/ws-bcn.py']
norm_cfg = {{_base_.norm}}
"""


def test_a_config_inherits_from_ours_and_from_mmdet_by_package_name(tmp_path):
    pytest.importorskip('mmdet', reason='inherits from mmdet')
    file = tmp_path / 'config.py'
    file.write_text(INHERITING)
    cfg = Config.fromfile(file)
    assert (cfg.norm_cfg.type, cfg.norm_cfg.num_groups) == ('BCN', 32)
    assert [hook.type for hook in cfg.custom_hooks] == ['EstimatesHook']
    assert cfg.default_scope == 'mmdet'


def walk(value):
    """Every dict in a config, at any depth."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from walk(item)


@pytest.mark.parametrize('base', ['_base_/norms/ws-bcn.py', 'quick'])
def test_what_is_inherited_by_package_name_can_be_built(base, tmp_path, root):
    """mmengine marks dicts of another package's config with ``_scope_='wsbcn_mm'``.

    `build_norm_layer` hands that to the layer as an argument; and there is no registry of that
    scope, so that CocoMetric, ShapesCocoDataset and optimizers are looked for in the wrong one.
    """
    pytest.importorskip('mmdet', reason='the quick config inherits from mmdet')
    if base == 'quick':
        base = f'quick/{next((root / "configs" / "quick").glob("*mask-rcnn*.py")).name}'
    file = tmp_path / 'config.py'
    variables = 'ours = dict(a={{_base_.norm}}, b={{_base_.conv}})'
    file.write_text(f"_base_ = 'wsbcn_mm::{base}'\n{variables}\n")
    cfg = Config.fromfile(file)
    assert type(build_norm_layer(cfg.ours.a, 32)[1]) is BatchChannelNorm2d
    assert type(build_conv_layer(cfg.ours.b, 4, 8, 3)) is WSConv2d
    marked = [part for part in walk(cfg.to_dict()) if part.get('_scope_') == 'wsbcn_mm']
    assert not marked


def test_a_whole_config_of_ours_is_found_through_the_model_index(tmp_path, root):
    """The place where mim, too, looks: ``.mim/model-index.yml`` and the metafiles it names."""
    pytest.importorskip('mmdet', reason='inherits from mmdet')
    inner = next((root / 'configs' / 'mask_rcnn').glob('*.py'))
    file = tmp_path / 'config.py'
    file.write_text(f"_base_ = 'wsbcn_mm::mask_rcnn/{inner.name}'\n")
    cfg, expected = Config.fromfile(file), Config.fromfile(inner)
    assert cfg.model.backbone.norm_cfg == expected.model.backbone.norm_cfg


WITHOUT_PKG_RESOURCES = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'pkg_resources':
            raise ModuleNotFoundError('blocked: ' + name, name=name)

sys.meta_path.insert(0, Block())
from mmengine.config import Config
file = sys.argv[1]
try:
    Config.fromfile(file)
except (ModuleNotFoundError, AssertionError) as error:
    print('before:', error)
import wsbcn_mm
print('after:', Config.fromfile(file).norm_cfg.type)
print(sorted(m for m in sys.modules if m.startswith('pkg_resources')))
"""


def test_packages_are_found_without_pkg_resources(tmp_path, root):
    """setuptools >= 82 has none, and mmengine asks it where mmdet is.

    Our own import closes the gap; before it, the same config fails.
    """
    pytest.importorskip('mmdet', reason='inherits from mmdet')
    (tmp_path / 'config.py').write_text(INHERITING)
    environment = {**os.environ, 'PYTHONPATH': str(root), 'PYTHONWARNINGS': 'ignore'}
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_PKG_RESOURCES, 'config.py'],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after, loaded = done.stdout.strip().splitlines()[-3:]
    asks_not = 'before: mmengine does not support to load wsbcn_mm config.'  # the fork's
    assert before in ('before: blocked: pkg_resources', asks_not)
    assert after == 'after: BCN'
    assert loaded == '[]'


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(MODULE2PACKAGE, 'no_such_package', 'no-such-package')
    file = tmp_path / 'config.py'
    file.write_text("_base_ = 'no_such_package::_base_/x.py'")
    with pytest.raises(ModuleNotFoundError, match='no-such-package is not installed'):
        Config.fromfile(file)
    with pytest.raises(ModuleNotFoundError, match="'no_such_package', which is not installed"):
        config_module.get_installed_path('no-such-package')


@pytest.mark.parametrize('scope', ['wsbcn_mm', 'mmdet'])
def test_a_wrong_name_gets_one_clear_error(scope, tmp_path):
    pytest.importorskip('mmdet', reason='inherits from mmdet')
    file = tmp_path / 'config.py'
    near = 'mask-rcnn_r101_fpn_ws-bcn_4xb1-2x_coco'
    if scope == 'mmdet':
        near = 'mask-rcnn_r50_fpn_1x_coco'
    name = near[:-1]
    file.write_text(f"_base_ = '{scope}::mask_rcnn/{name}.py'")
    with pytest.raises(FileNotFoundError) as error:
        Config.fromfile(file)
    message = str(error.value)
    assert f'{scope}::mask_rcnn/{name}.py' in message and str(file) in message
    assert 'did you mean' in message and f'/{near}.py' in message


def test_bases_are_found_without_reading_every_metafile(tmp_path, monkeypatch):
    """A hundred YAML files for each base, of which nothing is used."""
    pytest.importorskip('mmdet', reason='inherits from mmdet')

    def read(*_):
        raise AssertionError('a metafile was read')

    monkeypatch.setattr('mmengine.config.utils._get_cfg_metainfo', read)
    (tmp_path / 'config.py').write_text(INHERITING)
    assert Config.fromfile(tmp_path / 'config.py').norm_cfg.type == 'BCN'


# ---- apply, require ----------------------------------------------------------------------------


def test_apply_twice_changes_nothing():
    """Not a second patch around the first one."""
    module = importlib.import_module('mmcv.cnn.utils.fuse_conv_bn')
    compat.apply()
    fuse, packages = module._fuse_conv_bn, dict(MODULE2PACKAGE)
    compat.apply()
    assert module._fuse_conv_bn is fuse
    assert packages == MODULE2PACKAGE
    assert fuse.__wrapped__.__module__ == 'mmcv.cnn.utils.fuse_conv_bn'
    assert not hasattr(fuse.__wrapped__, '__wrapped__')


def test_require_accepts_what_is_installed():
    compat.require('mmengine', 'mmcv')


@pytest.mark.parametrize('name', compat.PACKAGES)
def test_require_says_how_to_install_what_is_missing(name, monkeypatch):
    find_spec = compat.find_spec
    monkeypatch.setattr(compat, 'find_spec', lambda n: None if n == name else find_spec(n))
    with pytest.raises(ModuleNotFoundError) as error:
        compat.require('mmengine', name)
    assert str(error.value).startswith(f'{name} is not installed')
    assert compat.PACKAGES[name][1] in str(error.value)
    assert error.value.name == name


@pytest.mark.parametrize('name, old', [('mmengine', '0.7.4'), ('mmcv', '1.7.2'), ('mmdet', '2.28')])
def test_require_says_how_to_update_what_is_too_old(name, old, monkeypatch):
    monkeypatch.setattr(compat, 'find_spec', lambda n: object())
    monkeypatch.setattr(compat, '_version_of', lambda n: old)
    with pytest.raises(ImportError) as error:
        compat.require(name)
    oldest, command = compat.PACKAGES[name]
    assert f'{name} >= {oldest}' in str(error.value)
    assert f'got {old}' in str(error.value)
    assert command in str(error.value)


def test_require_compares_versions_as_numbers(monkeypatch):
    """'0.10.7' is newer than '0.9.0', and a suffix does not disturb."""
    monkeypatch.setattr(compat, '_version_of', lambda n: '0.10.7+local')
    compat.require('mmengine')
    monkeypatch.setattr(compat, '_version_of', lambda n: '0.9.9')
    with pytest.raises(ImportError, match='0.9.9'):
        compat.require('mmengine')


def test_require_tells_mmcv_without_ops_from_mmcv(monkeypatch):
    """mmcv-lite imports, and `import mmdet.models` then fails on a name nobody knows."""
    monkeypatch.setattr(compat, 'find_spec', lambda n: None if n == 'mmcv._ext' else object())
    monkeypatch.setattr(compat, '_version_of', lambda n: '9.9.9')
    compat.require('mmcv')  # mmdet is what needs the ops
    with pytest.raises(ImportError) as error:
        compat.require('mmcv', 'mmdet')
    assert 'mmcv-lite' in str(error.value)
    assert 'MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv==' in str(error.value)


def test_the_convolutions_of_tridentnet_are_initialised():
    """MMDetection leaves them as the memory happened to be, if no checkpoint fills them."""
    trident = pytest.importorskip('mmdet.models.backbones.trident_resnet', reason='its backbone')
    stages = dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,))
    backbone = trident.TridentResNet(50, 3, 1, (1, 2, 3), **stages)
    weights = [m.weight for m in backbone.modules() if isinstance(m, trident.TridentConv)]
    for weight in weights:
        weight.data.fill_(float('nan'))
    backbone.init_weights()
    expected = (2 / (256 * 9)) ** 0.5  # Kaiming's, by the outputs
    assert len(weights) == 6
    assert all(abs(weight.std().item() / expected - 1) < 0.05 for weight in weights)


def test_the_convolutions_of_tridentnet_have_no_ws_form():
    """They take and give a list of maps; the converter says so."""
    trident = pytest.importorskip('mmdet.models.backbones.trident_resnet', reason='its backbone')
    conv = trident.TridentConv(4, 4, 3)
    assert is_conv(conv) and not standardizable(conv)
    conversion = convert_config('mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py')
    assert any('TridentConv (first ' in line for line in conversion.left)
