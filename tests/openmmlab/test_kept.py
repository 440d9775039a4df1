"""wsbcn_mm.openmmlab.layers.Kept: parts that stay as their weights were trained."""

import pytest

pytest.importorskip('mmengine', reason='parts are built by its registry')
pytest.importorskip('mmdet', reason='builds backbones of mmdet')
pytest.importorskip('mmseg', reason='builds backbones of mmseg')

import copy
import importlib

import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from wsbcn_mm.openmmlab import registry  # noqa: F401 (registers)

# With frozen_stages (of which some never freeze the last layers), without it, without norm_eval,
# with other maps in training (DDRNet), with a network inside (BiSeNetV1).
BACKBONES = {
    'mmdet': [
        dict(type='ResNet', depth=18, base_channels=4, stem_channels=4),
        dict(type='CSPNeXt', widen_factor=0.05, deepen_factor=0.1),
        dict(type='MobileNetV2', widen_factor=0.1, out_indices=(7,)),
        dict(type='HRNet', extra={
            f'stage{n}': dict(num_modules=1, num_branches=n, num_blocks=(1,) * n,
                              block='BASIC' if n > 1 else 'BOTTLENECK',
                              num_channels=(4, 8, 16, 32)[:n])
            for n in (1, 2, 3, 4)}),
    ],
    'mmseg': [
        dict(type='ResNetV1c', depth=18, base_channels=4, stem_channels=4, norm_eval=True),
        dict(type='MobileNetV3', arch='small', frozen_stages=1),
        dict(type='DDRNet', channels=4, ppm_channels=4),
        dict(type='BiSeNetV1', backbone_cfg=dict(type='ResNet', depth=18, base_channels=4),
             context_channels=(8, 16, 32), spatial_channels=(4, 4, 4, 8), out_channels=8),
        dict(type='UNet', base_channels=2, num_stages=3, strides=(1, 1, 1), enc_num_convs=(1, 1, 1),
             dec_num_convs=(1, 1), downsamples=(True, True), enc_dilations=(1, 1, 1),
             dec_dilations=(1, 1)),
    ],
}  # fmt: skip
EVERY = [pytest.param(s, c, id=f'{s}-{c["type"]}') for s, each in BACKBONES.items() for c in each]


class Network(nn.Module):
    """A backbone, and something that trains in front of it and behind it."""

    def __init__(self, scope, backbone):
        super().__init__()
        importlib.import_module(f'{scope}.models')
        self.scale = nn.Parameter(torch.ones(()))
        with DefaultScope.overwrite_default_scope(scope):
            self.backbone = MODELS.build(dict(backbone))
        self.head = nn.Linear(1, 1)

    def forward(self, x):
        maps = self.backbone(x * self.scale)
        means = [m.mean() for m in (maps if isinstance(maps, (list, tuple)) else [maps])]
        return len(means), self.head(torch.stack(means).sum()[None]).square().sum()


def kept(scope, backbone, **rest):
    return Network(scope, {**backbone, 'type': 'Kept', 'kind': backbone['type'], **rest})


def steps(network, count=2):
    """Trains with clipped gradients; what is in the backbone before and afterwards."""
    wrapper = build_optim_wrapper(
        network,
        dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1), clip_grad=dict(max_norm=1)),
    )
    module = getattr(network, 'module', network)
    before = copy.deepcopy(module.state_dict())
    for _ in range(count):
        network.train()
        wrapper.update_params(network(torch.randn(2, 3, 64, 64))[1])
    changed = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert changed >= {'scale', 'head.weight'}
    return changed - {'scale', 'head.weight', 'head.bias'}


@pytest.mark.parametrize('scope, backbone', EVERY)
def test_nothing_of_it_changes_in_training(scope, backbone):
    torch.manual_seed(0)
    plain, frozen = Network(scope, backbone), kept(scope, backbone)
    frozen.load_state_dict(plain.state_dict())  # the names are the part's own
    assert type(frozen.backbone) is type(plain.backbone)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.eval()(x)[1], frozen.eval()(x)[1])
    assert plain.train()(x)[0] == frozen.train()(x)[0]  # as many maps as in its own training
    norms = [m for m in frozen.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and not any(norm.training for norm in norms)
    assert not steps(frozen)
    assert all(p.grad is None and not p.requires_grad for p in frozen.backbone.parameters())


@pytest.mark.parametrize('scope, backbone', [EVERY[0], EVERY[-2]])
def test_its_weights_may_train_and_its_statistics_stay(scope, backbone):
    changed = steps(kept(scope, backbone, frozen=False))
    assert changed and not any('running' in name or 'tracked' in name for name in changed)
    assert {name.rpartition('.')[2] for name in changed} >= {'weight', 'bias'}


def test_copies_and_what_is_frozen_already():
    scope, backbone = EVERY[0].values
    network = kept(scope, backbone, frozen=False, frozen_stages=1)
    twin = copy.deepcopy(network)  # as EMAHook makes one
    twin.train(), network.eval()
    assert not any(m.training for m in network.modules())
    assert twin.backbone.training and not twin.backbone.layer2[0].bn1.training
    assert not any('layer1' in name or '.conv1' in name[:14] for name in steps(network))


def test_several_processes_do_not_wait_for_its_gradients(tmp_path):
    """Frozen after it was wrapped, the second step would raise: gradients that never come."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1
    )
    try:
        assert not steps(nn.parallel.DistributedDataParallel(kept(*EVERY[0].values)))
    finally:
        torch.distributed.destroy_process_group()
