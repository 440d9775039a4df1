"""The names of the configs resolve to our layers, whichever OpenMMLab package asks."""

import pytest

pytest.importorskip('mmengine', reason="the registry is mmengine's")
pytest.importorskip('mmcv', reason='layers are built by mmcv')

import importlib

from mmcv.cnn import ConvModule, build_conv_layer, build_norm_layer
from mmengine.registry import HOOKS, MODELS, DefaultScope

from wsbcn_mm import layers
from wsbcn_mm.openmmlab import registry

CONVS = {
    'WSConv': layers.WSConv2d,
    'WSConv1d': layers.WSConv1d,
    'WSConv2d': layers.WSConv2d,
    'WSConv3d': layers.WSConv3d,
    'WSConvTranspose2d': layers.WSConvTranspose2d,
}
NORMS = {
    'BCN': layers.BatchChannelNorm2d,
    'BCN1d': layers.BatchChannelNorm1d,
    'BCN2d': layers.BatchChannelNorm2d,
    'BCN3d': layers.BatchChannelNorm3d,
}


@pytest.fixture(params=['mmengine', 'mmdet', 'mmseg', 'mmpretrain', 'mmaction'])
def models(request):
    """The MODELS registry of a package, with the package's scope as the current one."""
    package = request.param
    pytest.importorskip(package, reason=f'{package} is not installed')
    registry = importlib.import_module(f'{package}.registry').MODELS
    with DefaultScope.overwrite_default_scope(package):
        yield registry


@pytest.mark.parametrize('name', [*CONVS, *NORMS])
def test_name_resolves_in_every_scope(models, name):
    assert models.get(name) is {**CONVS, **NORMS}[name]


@pytest.mark.parametrize('name', CONVS)
def test_build_conv_layer(models, name):
    conv = build_conv_layer(dict(type=name, eps=1e-3), 4, 6, kernel_size=3, bias=False)
    assert type(conv) is CONVS[name]
    assert (conv.in_channels, conv.out_channels, conv.eps, conv.bias) == (4, 6, 1e-3, None)


@pytest.mark.parametrize('name', NORMS)
def test_build_norm_layer(models, name):
    attribute, norm = build_norm_layer(dict(type=name, num_groups=4, momentum=0.2), 12, postfix=3)
    assert attribute == 'bcn3'
    assert type(norm) is NORMS[name]
    assert (norm.num_channels, norm.num_groups, norm.momentum) == (12, 4, 0.2)


@pytest.mark.parametrize('dims', [1, 2, 3])
def test_conv_module(models, dims):
    norm_cfg = dict(type=f'BCN{dims}d', num_groups=2)
    module = ConvModule(4, 8, 3, conv_cfg=dict(type=f'WSConv{dims}d'), norm_cfg=norm_cfg)
    assert type(module.conv) is CONVS[f'WSConv{dims}d']
    assert type(module.norm) is NORMS[f'BCN{dims}d']
    assert module.conv.bias is None  # as before any other norm


def test_the_layers_live_in_the_root_registry():
    """Not in a package's own, where the other packages would not see them."""
    for name, layer in {**CONVS, **NORMS}.items():
        assert MODELS.module_dict[name] is layer


def test_the_table_names_what_upstream_has():
    """What a layer replaces, and what stands for it after folding, are names that mmcv builds."""
    for kind in {row.stock for row in (*registry.NORMS, *registry.CONVS, registry.MICRO_BN)}:
        assert kind in MODELS.module_dict
    upstream = {*registry.NORM_FOR, *registry.CONV_FOR} & set(MODELS.module_dict)
    assert {'BN', 'SyncBN', 'GN', 'Conv2d', 'ConvWS'} <= upstream


def test_the_hooks_are_there_on_import():
    ours = {name for name, kind in HOOKS.module_dict.items() if kind.__module__.startswith('wsbcn')}
    assert ours == {
        'AtomicCheckpointHook',
        'CheckpointReportHook',
        'DataCheckHook',
        'DiagnosticsHook',
        'EstimatesHook',
        'PreciseStatsHook',
        'StandardizationHook',
    }
    looked_for = {value for key, value in vars(registry).items() if key.endswith('_HOOK')}
    assert looked_for and looked_for <= ours
