"""Training through the Runner: what OpenMMLab's switches do to the estimates, one test each."""

import pytest

pytest.importorskip('mmdet', reason='the model has a ResNet of mmdet')

import functools
import itertools
import logging
import sys

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import wsbcn_mm.openmmlab  # noqa: F401
from tests.ranks import in_two_ranks
from wsbcn_mm import BatchChannelNorm2d
from wsbcn_mm.estimates import layers_of, rate_of_step
from wsbcn_mm.layers.channel_stage import ChannelStage
from wsbcn_mm.recalibration import recalibrate

BCN, WS = dict(type='BCN', num_groups=4), dict(type='WSConv2d')
_numbers = itertools.count()


class Model(BaseModel):
    """A ResNet-18 of mmdet with 8 base channels, a BCN neck, a score per image."""

    def __init__(self, branch=False, **backbone):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = MODELS.build(
            dict(
                type='mmdet.ResNet',
                depth=18,
                base_channels=8,
                norm_cfg=BCN,
                conv_cfg=WS,
                **{'norm_eval': False, 'frozen_stages': -1, **backbone},
            )
        )
        self.neck, self.head = BatchChannelNorm2d(64, 4), nn.Conv2d(64, 1, 1)
        self.branch = None
        if branch:
            self.branch = nn.Sequential(nn.Conv2d(64, 8, 1), BatchChannelNorm2d(8, 2))

    def forward(self, inputs, mode='tensor', **_):
        x = torch.stack(list(inputs))
        features = self.neck(self.backbone(x)[-1])
        score = self.head(features.relu()).mean((1, 2, 3))
        loss = F.mse_loss(score, x[:, 0, 0, 0])
        if self.branch is not None and x[0, 1, 0, 0] > 0:  # only with some images
            loss = loss + self.branch(features).square().mean()
        return dict(loss=loss) if mode == 'loss' else [score]


class FrozenBatchNorm2d(nn.Module):
    """As of torchvision and Detectron2: statistics that nothing updates, and no rate."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer('running_mean', torch.zeros(channels))
        self.register_buffer('running_var', torch.ones(channels))


@DATASETS.register_module(force=True)
class Noise(torch.utils.data.Dataset):
    """Images of different light; one may be damaged.

    Their last maps are 2x2: torch's conv2d is not deterministic at 1x1 on every CPU with two
    threads, and bits are compared here.
    """

    def __init__(self, count=6, overflow=None, pipeline=None, offset=0):
        g = torch.Generator().manual_seed(offset)
        light = torch.arange(count).view(-1, 1, 1, 1)
        self.images = torch.randn(count, 3, 64, 64, generator=g) + light
        if overflow is not None:
            self.images[overflow] *= 1e38
        self.images[:, 1, 0, 0] = torch.tensor([1.0, -1.0]).repeat(count)[:count]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index])


def make_runner(work_dir, epochs=2, model=None, hooks=(), data=None, batch_size=1, **kwargs):
    dataset = dict(type='Noise', **(data or {}))
    loader = dict(
        dataset=dataset,
        batch_size=batch_size,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    tested = dict(loader, dataset=dict(dataset, pipeline=[]))
    cfg = dict(train_dataloader=loader, test_dataloader=tested)
    runner = Runner(
        Model() if model is None else model,
        str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        **{'optim_wrapper': dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)), **kwargs},
        param_scheduler=dict(type='MultiStepLR', milestones=[5]),
        custom_hooks=[dict(type='EstimatesHook', warmup=True), *hooks],
        default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook')),
        experiment_name=f'training_{next(_numbers)}',
        log_level='ERROR',
        randomness=dict(seed=0),
    )
    runner.cfg.merge_from_dict(cfg)
    return runner


def statistics(model):
    return {
        f'{name}.{kind}': getattr(layer.bn, kind).clone()
        for name, layer in layers_of(model).items()
        for kind in ('running_mean', 'running_var', 'num_batches_tracked')
    }


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **{'rtol': 0, 'atol': 0, **tolerance})


def chosen(count):
    """The images that are measured, in their order."""
    return Noise().images[np.random.default_rng(0).permutation(6)[:count]]


def test_norm_eval_and_frozen_stages_keep_the_backbones_estimates(tmp_path):
    """mmdet's defaults: what a fine-tuning config inherits."""
    model = Model(norm_eval=True, frozen_stages=1)
    before = statistics(model)
    make_runner(tmp_path, model=model).train()
    for name, value in statistics(model).items():
        assert torch.equal(value, before[name]) == name.startswith('backbone'), name
    thawed = Model(frozen_stages=1)
    make_runner(tmp_path / 'b', model=thawed).train()
    frozen = ('backbone.bcn1', 'backbone.layer1')
    for name, value in statistics(thawed).items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


def test_resuming_is_as_if_nothing_had_happened(tmp_path):
    """Weights, estimates and their rate, bit for bit."""
    whole = make_runner(tmp_path / 'whole', epochs=3)
    whole.train()
    make_runner(tmp_path / 'parts', epochs=2).train()
    resumed = make_runner(tmp_path / 'parts', epochs=3, resume=True)
    resumed.train()
    assert resumed.iter == 18
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    rates = [r.message_hub.get_scalar('train/bcn_rate').data[0] for r in (resumed, whole)]
    assert rates[0].tolist() == rates[1].tolist()
    assert rates[0].tolist() == [rate_of_step(0.01, 1, i) for i in range(18)]


def test_gradient_accumulation_updates_with_every_image(tmp_path):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.0), accumulative_counts=3)
    runner = make_runner(tmp_path, epochs=1, optim_wrapper=wrapper)
    runner.train()
    neck = runner.model.neck.bn
    assert neck.num_batches_tracked == 6
    # With the rate 1/t and still weights: the mean over the images.
    assert runner.model.backbone.bcn1.bn.num_batches_tracked == 6
    images = Noise().images
    with torch.no_grad():
        expected = runner.model.backbone.conv1(images).mean((0, 2, 3))
    assert_same(runner.model.backbone.bcn1.bn.running_mean, expected, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_changes_nothing(tmp_path):
    states = []
    for with_cp in (False, True):
        runner = make_runner(tmp_path / str(with_cp), model=Model(with_cp=with_cp))
        runner.train()
        states.append(runner.model.state_dict())
    assert_same(states[1], states[0], rtol=1e-5, atol=1e-6)


def test_auto_scale_lr_and_the_rate_follow_the_images_per_step(tmp_path):
    runner = make_runner(
        tmp_path, epochs=1, batch_size=2, auto_scale_lr=dict(enable=True, base_batch_size=8)
    )
    runner.train()
    assert runner.optim_wrapper.get_lr()['lr'] == [0.0025]
    rates = runner.message_hub.get_scalar('train/bcn_rate').data[0]
    assert rates.tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    again = make_runner(tmp_path / 'b', epochs=1, batch_size=2)
    (hook,) = (h for h in again.hooks if type(h).__name__ == 'EstimatesHook')
    hook.warmup = False
    again.train()
    rates = again.message_hub.get_scalar('train/bcn_rate').data[0]
    assert rates.tolist() == pytest.approx([0.0199] * 3)
    assert runner.model.neck.momentum == 0.01  # the config's again


def test_loss_scaling_survives_an_overflow(tmp_path, monkeypatch):
    """An image whose activations overflow: its step is left out, by optimizer and estimates."""
    module = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
    monkeypatch.setattr(f'{module}.is_cuda_available', lambda: True)  # it asks for one by name
    scaler = functools.partial(torch.amp.GradScaler, 'cpu')
    monkeypatch.setattr(f'{module}.GradScaler', scaler)
    wrapper = dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        loss_scale=dict(init_scale=16.0),
        optimizer=dict(type='SGD', lr=0.01),
    )
    runner = make_runner(tmp_path, epochs=2, optim_wrapper=wrapper, data=dict(overflow=3))
    told = []
    monkeypatch.setattr(
        'wsbcn_mm.openmmlab.hooks.estimates.print_log', lambda text, *_, **__: told.append(text)
    )
    runner.train()
    for name, value in runner.model.state_dict().items():
        assert value.isfinite().all(), name
    assert runner.optim_wrapper.loss_scaler.get_scale() == 4.0  # halved by each of two steps
    assert len(told) == 1  # once, though it looks before each checkpoint and at the end
    assert 'backbone.bcn1 (2)' in told[0]
    assert 'neck (2)' in told[0]
    found = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)['state_dict']
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize('update_buffers', [False, True])
def test_the_averaged_model_has_estimates(tmp_path, update_buffers):
    ema = dict(type='EMAHook', momentum=0.1, update_buffers=update_buffers, priority='NORMAL')
    runner = make_runner(tmp_path, hooks=[ema])
    runner.train()
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    averaged, own = statistics(hook.ema_model.module), statistics(runner.model)
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)['state_dict']
    assert_same(saved['neck.bn.running_mean'], averaged['neck.running_mean'])
    same = torch.equal(averaged['neck.running_mean'], own['neck.running_mean'])
    assert same != update_buffers
    assert all(value.isfinite().all() for value in averaged.values())


def test_precise_statistics_are_what_is_saved(tmp_path):
    hook = dict(type='PreciseStatsHook', num_images=6, passes=4)
    runner = make_runner(tmp_path, hooks=[hook])
    runner.train()
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)['state_dict']
    model = Model()
    model.load_state_dict(saved)
    before = statistics(model)
    recalibrate(model, chosen(6).split(1), passes=4)
    assert_same(statistics(model), before, rtol=1e-4, atol=1e-4)
    assert before['neck.num_batches_tracked'] == 12


def test_precise_statistics_of_the_averaged_model(tmp_path):
    hooks = [dict(type='EMAHook', momentum=0.1), dict(type='PreciseStatsHook', num_images=4)]
    with pytest.raises(ValueError, match='update_buffers=True'):
        make_runner(tmp_path / 'a', hooks=hooks).train()
    hooks[0]['update_buffers'] = True
    make_runner(tmp_path / 'b', hooks=hooks).train()
    saved = torch.load(tmp_path / 'b' / 'epoch_2.pth', weights_only=True)['state_dict']
    model = Model()
    model.load_state_dict(saved)
    with torch.no_grad():
        expected = model.backbone.conv1(chosen(4)).mean((0, 2, 3))
    assert_same(saved['backbone.bcn1.bn.running_mean'], expected, rtol=1e-5, atol=1e-5)


def test_hooks_say_what_they_cannot_do(tmp_path, caplog):
    with pytest.raises(ValueError, match="schedule must be one of 'constant', 'lr'"):
        HOOKS.build(dict(type='EstimatesHook', schedule='poly'))
    with pytest.raises(ValueError, match="scale must be one of 'ranks', 'images', None"):
        HOOKS.build(dict(type='EstimatesHook', scale=True))
    with pytest.raises(ValueError, match='interval must be at least 1'):
        HOOKS.build(dict(type='EstimatesHook', interval=0))


@pytest.mark.parametrize(
    'arguments, expected',
    [
        ((0.01,), 0.01),
        ((0.01, 2), 0.0199),
        ((0.5, 2, None, 0.5), 0.4375),
        ((0.01, 1, 0), 1.0),
        ((0.01, 1, 9), 0.1),
        ((0.01, 1, 1000), 0.01),
        ((0.0,), 0.0),
        ((1.0, 4, 3), 1.0),
        ((0.9, 1, None, 2.0), 1.0),
    ],
)
def test_rate_of_step(arguments, expected):
    assert rate_of_step(*arguments) == pytest.approx(expected)


def test_rate_of_step_is_a_memory_in_images():
    """Four images at once forget as much as four steps of one."""
    kept = (1 - rate_of_step(0.03)) ** 4
    assert 1 - rate_of_step(0.03, 4) == pytest.approx(kept)
    with pytest.raises(ValueError, match='rate must lie in'):
        rate_of_step(1.5)
    with pytest.raises(ValueError, match='images must be at least 1'):
        rate_of_step(0.1, 0)


def test_the_rate_of_the_config_is_the_default(tmp_path):
    runner = make_runner(tmp_path, epochs=1)
    runner._hooks = [h for h in runner.hooks if type(h).__name__ != 'EstimatesHook']
    runner.register_hook(dict(type='EstimatesHook'))
    runner.train()
    rates = runner.message_hub.get_scalar('train/bcn_rate').data[0]
    assert rates.tolist() == pytest.approx([0.01] * 6)


@pytest.mark.parametrize('scale, images', [('images', 8), ('ranks', 4), (None, 1)])
def test_what_the_rate_of_the_config_is_the_weight_of(scale, images, tmp_path, monkeypatch):
    """Four ranks with two images each; a layer that shares nothing has its own alone."""
    runner = make_runner(tmp_path, batch_size=2)
    hook = HOOKS.build(dict(type='EstimatesHook', scale=scale))
    monkeypatch.setattr(sys.modules[type(hook).__module__], 'get_dist_info', lambda: (0, 4))
    layers = layers_of(runner.model)
    alone = next(iter(layers))
    layers[alone].sync = None
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    for name, layer in layers.items():
        if layer.mode == 'estimate':
            seen = images // 4 or 1 if name == alone else images
            assert layer.momentum == pytest.approx(1 - 0.99**seen)


class Operations(TorchDispatchMode):
    """Counts the operations on tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('compiled', [False, True])
def test_a_step_of_one_process_costs_next_to_nothing(compiled, tmp_path, monkeypatch):
    """Nothing is set that is there already; what others have set or put there is."""
    runner = make_runner(tmp_path, batch_size=2)
    runner.cfg.compile = compiled
    hook = HOOKS.build(dict(type='EstimatesHook'))
    hook.before_train(runner)
    stages = [layer.bn for layer in layers_of(runner.model).values()]
    was_set, set_ = [], ChannelStage.__setattr__

    def noted(stage, name, value):
        was_set.append(name)
        set_(stage, name, value)

    monkeypatch.setattr(ChannelStage, '__setattr__', noted)

    def step():
        was_set.clear()
        with Operations() as operations:
            hook.before_train_iter(runner, 0)
            hook.after_train_iter(runner, 0)
        return was_set.count('momentum'), operations.count

    fill = 1 if compiled else 0  # of one tensor, the rate of all layers
    assert step() == (len(stages), fill)
    assert step() == (0, fill)

    backbone, rate = runner.model.backbone, 1 - 0.99**2
    backbone.bcn1.momentum = 0.5
    runner.model.neck.bn = nn.BatchNorm2d(64)
    backbone.layer1[0].bcn1.momentum = 'cumulative'
    backbone.layer1[0].bcn2.bn = frozen = FrozenBatchNorm2d(8)
    assert step() == (3, fill)
    others = [layer for layer in layers_of(runner.model).values() if layer.bn is not frozen]
    assert [float(layer.momentum) for layer in others] == [pytest.approx(rate)] * len(others)
    assert not hasattr(frozen, 'momentum')
    assert step() == (0, fill)

    backbone(torch.randn(2, 3, 64, 64))
    assert backbone.bcn1.counts[0].all()
    assert step() == (0, fill)
    hook.after_train(runner)
    assert backbone.bcn1.momentum == 0.01
    assert not backbone.bcn1.counts.any()  # other ranks that come later share what comes later


def test_a_batch_norm_that_was_frozen_by_a_host_stays_frozen(tmp_path):
    """From the beginning, also where the rates are to be set and averaged over."""
    runner = make_runner(tmp_path, epochs=1)  # with warmup
    runner.model.neck.bn = FrozenBatchNorm2d(64)
    runner.train()
    assert not runner.model.neck.bn.running_mean.any()


def test_the_rate_follows_the_learning_rate(tmp_path):
    runner = make_runner(tmp_path, epochs=7)
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'EstimatesHook')
    hook.schedule, hook.warmup = 'lr', False
    runner.train()
    rates = runner.message_hub.get_scalar('train/bcn_rate').data[0]
    assert rates.tolist() == pytest.approx([0.01] * 30 + [0.001] * 12)  # dropped after epoch 5


def test_estimates_are_frozen_after_so_many_iterations(tmp_path):
    """Averages, too, which get their rate back at the end."""
    found = []
    for epochs, after in ((1, None), (2, 6)):
        runner = make_runner(tmp_path / str(epochs), epochs=epochs)
        runner.model.neck.momentum = 'cumulative'
        (hook,) = (h for h in runner.hooks if type(h).__name__ == 'EstimatesHook')
        hook.freeze_after = after
        runner.train()
        assert runner.model.neck.momentum == 'cumulative'
        found.append({k: v for k, v in statistics(runner.model).items() if 'running' in k})
    assert_same(*found)
    rates = runner.message_hub.get_scalar('train/bcn_rate').data[0]
    assert (rates[:6] > 0).all() and (rates[6:] == 0).all()
    with pytest.raises(ValueError, match='freeze_after must be at least 0, or None'):
        type(hook)(freeze_after=-1)


def two_ranks(rank, folder):
    logging.disable(logging.WARNING)
    torch.distributed.init_process_group('gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=True,
    )
    found = {}
    precise = dict(type='PreciseStatsHook', num_images=5)
    for name, hooks in dict(plain=[], precise=[precise]).items():
        runner = make_runner(
            f'{folder}/{name}',
            model=Model(branch=True),
            hooks=hooks,
            launcher='pytorch',
            cfg=dict(model_wrapper_cfg=wrapper),
        )
        runner.train()
        model = runner.model.module
        found[name] = dict(
            statistics=statistics(model),
            weights=dict(model.named_parameters()),
            rates=runner.message_hub.get_scalar('train/bcn_rate').data[0].tolist(),
        )
    return found


def test_two_ranks_with_unused_parameters_end_with_the_same_estimates(tmp_path):
    """DistributedDataParallel with a branch that only rank 0's images take; validation apart."""
    first, second = in_two_ranks(two_ranks, str(tmp_path))
    for name in ('plain', 'precise'):
        for kind in ('statistics', 'weights'):
            for key, value in first[name][kind].items():
                if not key.endswith('tracked'):
                    assert_same(second[name][kind][key], value)
        assert first[name]['rates'] == [rate_of_step(0.01, 2, i) for i in range(6)]
        saved = torch.load(tmp_path / name / 'epoch_2.pth', weights_only=True)['state_dict']
        assert_same(saved['neck.bn.running_var'], first[name]['statistics']['neck.running_var'])
    # Only rank 0 took the branch: its update alone counts, with all of its weight. It is an update
    # of both: what else is the average of 6 inputs on rank 1?
    for found in (first, second):
        assert found['plain']['statistics']['branch.1.num_batches_tracked'] == 6
