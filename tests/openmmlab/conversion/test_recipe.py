"""What another batch changes: recipe, rates, length, rescaling and schedulers."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmdet', reason='one scheduler is of mmdet')

import torch
from mmengine.config import Config

from wsbcn_mm.openmmlab.conversion import length, rates, recipe, rescaling, schedulers
from wsbcn_mm.openmmlab.conversion.options import ConversionOptions

LR = 'optim_wrapper.optimizer.lr'


def config(name='some_config.py', images=2, lr=0.02, **rest):
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=lr))
    loader = dict(batch_size=images)
    keys = dict(default_scope='mmdet', train_dataloader=loader, optim_wrapper=wrapper, **rest)
    return Config(keys, cfg_text='# no file', filename=name)


def rescaled(cfg, images, start=None, **options):
    return rescaling.rescaled(cfg, ConversionOptions(images_per_gpu=images, **options), start)


def changes(cfg, **batch):
    """What is set, by its place, and the warnings."""
    settings, warnings = rescaled(cfg, **batch)
    return {'.'.join(map(str, s.place)): s.value for s in settings}, warnings


BASE_16 = dict(auto_scale_lr=dict(enable=False, base_batch_size=16))


@pytest.mark.parametrize(
    'cfg, batch, lr, base',
    [
        (config(**BASE_16), dict(images=1), 0.01, 8),
        (config(**BASE_16), dict(images=1, gpus=1), 0.00125, 1),
        (config(**BASE_16), dict(images=1, gpus=1, accumulate=16), None, 1),
        (config('tiny_4xb2-1x.py'), dict(images=1, gpus=2), 0.005, 2),
        (config('tiny_4xb2-1x.py'), dict(images=1), 0.01, 4),
        # What the rate is for is said by auto_scale_lr; the name of a child says something else.
        (config('person_mask-rcnn_1xb2.py', **BASE_16), dict(images=1), 0.01, 8),
        (config('person_mask-rcnn_1xb2.py', **BASE_16), dict(images=2, gpus=1), 0.0025, 2),
        (config('tiny_8xb2.py', **BASE_16), dict(images=2), None, 16),
    ],
)
def test_the_rate_goes_with_the_images_per_step(cfg, batch, lr, base):
    found, warnings = changes(cfg, **batch)
    assert found.get(LR) == lr and not warnings
    assert found['auto_scale_lr'] == dict(enable=False, base_batch_size=base)
    accumulate = batch.get('accumulate')
    assert found.get('optim_wrapper.accumulative_counts') == accumulate


def test_where_nothing_tells_the_number_of_gpus():
    assert changes(config(), images=1)[0] == {'train_dataloader.batch_size': 1, LR: 0.01}
    found, warnings = changes(config(), images=1, gpus=4)
    assert found[LR] == 0.01 and 'taken to be for 4' in warnings[0]


def test_the_name_of_what_a_config_inherits_its_rate_from(tmp_path):
    """A child of MMSegmentation's, whose names alone say for how many images a rate is."""
    wrapper = "optim_wrapper = dict(optimizer=dict(type='SGD', lr={}))\n"
    (tmp_path / 'a_4xb4.py').write_text('train_dataloader=dict(batch_size=4)\n' + wrapper.format(1))
    (tmp_path / 'b.py').write_text("_base_ = 'a_4xb4.py'\n")
    (tmp_path / 'mine.py').write_text("_base_ = 'b.py'\n")
    (tmp_path / 'other.py').write_text("_base_ = 'b.py'\n" + wrapper.format(2))
    mine, other = (Config.fromfile(tmp_path / name) for name in ('mine.py', 'other.py'))
    assert changes(mine, images=1, gpus=1) == (
        {
            'train_dataloader.batch_size': 1,
            LR: 1 / 16,
            'auto_scale_lr': dict(enable=False, base_batch_size=1),
        },
        [],
    )
    assert changes(other, images=1, gpus=1)[0][LR] == 2 / 4  # a rate of its own
    assert recipe.gpus_to_train_with(mine) is None


def test_why_the_rate_changes_is_said_in_numbers_that_agree():
    """RTMDet's 8xb32 has an ``auto_scale_lr`` for 16 images."""
    for images, words in (
        (2, '2 -> 1 images per GPU, 8 -> 1 GPUs: total 16 -> 1'),
        (32, '32 -> 1 images per GPU, 1 GPUs: 1 images per step, and auto_scale_lr says 16'),
    ):
        settings, _ = rescaled(config(images=images, **BASE_16), images=1, gpus=1)
        (reason,) = [s.why for s in settings if s.place[-1] == 'lr']
        assert reason == f'linear rule: {words}'


def test_a_rate_that_is_kept():
    found, _ = changes(config(**BASE_16), images=1, gpus=1, keep_lr=True)
    assert found == {'train_dataloader.batch_size': 1}


@pytest.mark.parametrize(
    'scope, start, gpus, old, new',
    [
        ('mmseg', 'scratch', 1, 0.01, 0.03),  # the linear rule says 0.000625, which learns nothing
        ('mmseg', 'pretrained', 1, 0.01, 0.01),
        ('mmdet', 'scratch', 1, 0.02, 0.02),
        ('mmseg', 'scratch', 4, 0.01, 0.12),  # upwards from one image it holds
        ('mmseg', 'scratch', 32, 0.01, 0.12),  # as far as that was measured
        ('mmdet', 'scratch', 4, 0.02, 0.02),
        ('mmseg', 'scratch', 4, 0.8, 0.2),  # above what is least the linear rule holds
        ('mmpretrain', 'scratch', 1, 0.01, 0.003),
        ('mmseg', None, 1, 0.01, 0.000625),
    ],
)
def test_the_rate_does_not_go_below_what_was_measured(scope, start, gpus, old, new):
    cfg = config(lr=old, **BASE_16)
    cfg.default_scope = scope
    assert changes(cfg, images=1, gpus=gpus, start=start)[0].get(LR, old) == pytest.approx(new)
    cfg.default_scope, cfg.model = None, dict(type=f'{scope}.models.A')  # in pure Python
    assert changes(cfg, images=1, gpus=gpus, start=start)[0].get(LR, old) == pytest.approx(new)


@pytest.mark.parametrize(
    'scope, old, new',  # RTMDet, DETR, SegFormer
    [('mmdet', 0.004, 0.001), ('mmdet', 0.0001, 0.0001), ('mmseg', 6e-5, 6e-5)],
)
def test_the_rate_of_adam_is_not_raised(scope, old, new):
    cfg = config(lr=old, **BASE_16)
    cfg.optim_wrapper.optimizer.type, cfg.default_scope = 'AdamW', scope
    assert changes(cfg, images=1, gpus=1, start='scratch')[0].get(LR, old) == new


@pytest.mark.parametrize('kind, start', [('Adam', 'scratch'), ('AdamW', 'pretrained')])
def test_the_rate_of_adam_goes_with_the_root_of_the_batch(kind, start):
    """Mask2Former: the linear rule makes 6.25e-6 of it for one image."""
    cfg = config(lr=6e-5, **BASE_16)
    cfg.optim_wrapper.optimizer.type, cfg.default_scope = kind, 'mmseg'
    settings, _ = rescaled(cfg, images=1, gpus=1, start=start)
    ((rate, why),) = [(s.value, s.why) for s in settings if s.place[-1] == 'lr']
    assert rate == pytest.approx(6e-5 / 4) and why.startswith('root rule: 2 -> 1 images per GPU')
    assert changes(cfg, images=1, gpus=4, accumulate=16, start=start)[0][LR] == 1.2e-4  # upwards


@pytest.mark.parametrize(
    'scope, start, kind, given, clipped',
    [
        ('mmdet', 'scratch', 'SGD', None, True),
        ('mmdet', 'scratch', 'SGD', dict(max_norm=35), False),
        ('mmdet', 'pretrained', 'SGD', None, False),
        ('mmdet', 'scratch', 'AdamW', None, False),
        ('mmseg', 'scratch', 'SGD', None, False),
    ],
)
def test_a_detector_from_scratch_gets_clipped_gradients(scope, start, kind, given, clipped):
    cfg = config(**BASE_16)
    cfg.default_scope, cfg.optim_wrapper.optimizer.type = scope, kind
    cfg.optim_wrapper.clip_grad = given
    found = [(s.place[-1], s.value) for s in rescaling.clipping(cfg, start)]
    assert found == ([('clip_grad', dict(max_norm=10))] if clipped else [])


def test_rates_of_others_are_left_to_the_linear_rule():
    """An optimizer that was not measured, and rates by layer."""
    cfg = config(**BASE_16)
    cfg.optim_wrapper.optimizer.type = 'RMSprop'
    assert changes(cfg, images=1, gpus=1, start='scratch')[0][LR] == 0.00125
    cfg = config(**BASE_16)
    cfg.optim_wrapper.constructor = 'LearningRateDecayOptimizerConstructor'
    assert changes(cfg, images=1, gpus=1, start='scratch')[0][LR] == 0.00125


def test_schedulers_rise_with_the_rate():
    poly = dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=100, by_epoch=False)
    cfg = config(lr=0.01, param_scheduler=[poly], **BASE_16)
    cfg.default_scope = 'mmseg'
    found, _ = changes(cfg, images=1, gpus=1, start='scratch', schedule='keep')
    assert found['param_scheduler'] == [dict(poly, eta_min=3e-4)]


def test_the_steps_of_a_training(tmp_path):
    loop = dict(type='IterBasedTrainLoop', max_iters=1000)
    cfg = config(train_cfg=loop)
    cfg.optim_wrapper.accumulative_counts = 4
    assert length.steps(cfg, processes=2) == 250
    (tmp_path / 'a.json').write_text('{"images": [{}, {}, {}, {}, {}]}')
    dataset = dict(type='CocoDataset', data_root=str(tmp_path), ann_file='a.json')
    cfg = config(train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=12))
    assert length.steps(cfg, processes=1) is None
    cfg.train_dataloader.dataset = dataset
    assert length.steps(cfg, processes=1) == 12 * 3
    for taken, images in ((3, 3), (-4, 4), ([0, 4], 2), (9, 5), (0, None)):
        cfg.train_dataloader.dataset = dict(dataset, indices=taken)
        assert length.training_images(cfg) == images
    cfg.train_dataloader.dataset = dict(dataset, ann_file='nowhere.json', indices=3)
    assert length.training_images(cfg) == 3
    (tmp_path / 'damaged.json').write_text('{"images": [{}')
    cfg.train_dataloader.dataset = dict(dataset, ann_file='damaged.json')
    assert length.steps(cfg, processes=1) is None  # whoever trains on it says so
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=dataset)
    assert length.steps(cfg, processes=1) is None
    (tmp_path / 'images').mkdir()
    for name in 'abc':
        (tmp_path / 'images' / f'{name}.png').touch()
    prefix = dict(img_path='images')
    folder = dict(type='BaseSegDataset', data_root=str(tmp_path), data_prefix=prefix)
    cfg.train_dataloader.dataset = dict(folder, img_suffix='.png')
    assert length.steps(cfg, processes=1) == 12 * 2


def test_the_rate_that_mmengine_makes():
    cfg = config(auto_scale_lr=dict(enable=True, base_batch_size=16))
    scaled = rates.as_scaled(cfg, processes=2)
    assert scaled.optim_wrapper.optimizer.lr == 0.005 and cfg.optim_wrapper.optimizer.lr == 0.02
    assert scaled.auto_scale_lr == dict(enable=False, base_batch_size=4)


def test_iterations_follow_the_images():
    loop = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=100)
    hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=100))
    schedule = [
        dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
        dict(type='OneCycleLR', eta_max=0.1, total_steps=1000, by_epoch=False),
    ]
    cfg = config(train_cfg=loop, default_hooks=hooks, param_scheduler=schedule, **BASE_16)
    found, _ = changes(cfg, images=1, gpus=2)
    assert found['train_cfg.max_iters'] == 8000 and found['train_cfg.val_interval'] == 800
    assert found['default_hooks.checkpoint.interval'] == 800
    assert found['param_scheduler'] == [
        dict(schedule[0], end=400),
        dict(schedule[1], eta_max=0.0125, total_steps=8000),
    ]
    kept, warnings = changes(cfg, images=1, gpus=2, schedule='keep')
    assert not any(place.startswith(('train_cfg', 'default_hooks')) for place in kept)
    assert kept['param_scheduler'] == [schedule[0], dict(schedule[1], eta_max=0.0125)]
    assert '1000 of them now see 0.125 times the images' in warnings[0]


def test_what_counts_epochs_stays():
    steps = dict(type='MultiStepLR', milestones=[8, 11], gamma=0.1, by_epoch=True, begin=0, end=12)
    loop = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
    found, _ = changes(config(train_cfg=loop, param_scheduler=steps, **BASE_16), images=1)
    assert found.keys() == {'train_dataloader.batch_size', LR, 'auto_scale_lr'}


def test_items_of_several_images():
    """A person search draws several images of each of several persons at once."""
    cfg = config(**BASE_16)
    cfg.train_dataloader.update(
        batch_size=1, dataset=dict(triplet_sampler=dict(num_ids=8, ins_per_id=4))
    )
    assert recipe.images_per_gpu(cfg) == 32
    settings, warnings = changes(cfg, images=1)
    assert settings == {} and 'stays 1: one item of its data is 32 images' in warnings[0]


def test_the_line_for_a_rate():
    cfg = config(
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.01, end=10, by_epoch=False),
            dict(type='PolyLR', eta_min=1e-4, power=0.9, end=100, by_epoch=False),
        ]
    )
    assert schedulers.rate_options(cfg, 0.2) == f'{LR}=0.2 param_scheduler.1.eta_min=0.001'


# ---- schedulers --------------------------------------------------------------------------------

# What is a rate, and what a count, by the name that each class gives it.
SCHEDULERS = [
    (dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=80000), {'eta_min'}, {'end'}),
    (dict(type='OneCycleLR', eta_max=0.1, total_steps=4000), {'eta_max'}, {'total_steps'}),
    (
        dict(type='CosineAnnealingLR', eta_min=1e-5, T_max=150, end=150),
        {'eta_min'},
        {'T_max', 'end'},
    ),
    (dict(type='CosineAnnealingLR', eta_min_ratio=0.1, T_max=150), set(), {'T_max'}),
    (
        dict(type='CosineRestartLR', periods=[100, 200], restart_weights=[1, 0.5], eta_min=1e-5),
        {'eta_min'},
        {'periods'},
    ),
    (dict(type='LinearLR', start_factor=0.001, end=500), set(), {'end'}),
    (dict(type='ConstantLR', factor=0.1, end=100), set(), {'end'}),
    (dict(type='MultiStepLR', milestones=[80000, 110000], gamma=0.1), set(), {'milestones'}),
    (dict(type='StepLR', step_size=100, gamma=0.1), set(), {'step_size'}),
    (dict(type='mmdet.QuadraticWarmupLR', begin=0, end=500), set(), {'end'}),
    (dict(type='CosineAnnealingMomentum', eta_min=0.85, T_max=100), set(), {'T_max'}),
]


@pytest.mark.parametrize(
    'scheduler, rates, counts', SCHEDULERS, ids=[kind['type'] for kind, *_ in SCHEDULERS]
)
def test_rates_and_counts_are_told_apart(scheduler, rates, counts):
    cfg, scheduler = config(), dict(scheduler, by_epoch=False)
    assert set(schedulers.rates_of(cfg, scheduler, 0.01)) == rates
    longer = schedulers.over_other_iterations(cfg, scheduler, 8.0)
    assert {key for key in longer if longer[key] != scheduler[key]} == counts


@pytest.mark.parametrize('kind', ['LinearLR', 'ConstantLR', 'mmdet.QuadraticWarmupLR'])
@pytest.mark.parametrize('factor', [1 / 16, 1 / 1000])
def test_a_warm_up_of_few_steps_still_ends(kind, factor):
    """One that ended after the first step would leave the rate there: the hosts set it no more."""
    warm_up = dict(type=kind, begin=0, end=16, by_epoch=False)
    short = schedulers.over_other_iterations(config(), warm_up, factor)
    assert short['end'] == 2
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    built = schedulers.scheduler_class(config(), short)(optimizer, begin=0, end=short['end'])
    rates = [optimizer.param_groups[0]['lr']]
    for _ in range(4):
        optimizer.step()
        built.step()
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates[0] < 0.1 and rates[-1] == pytest.approx(0.1)
    assert schedulers.WarmUp((), 0.0, 500, 6).better == 2


def test_a_scheduler_of_the_host_by_its_name_alone():
    """As ByteTrack's and StrongSORT's configs name it: the host looks in its own registry first."""
    named = [dict(type=f'{scope}QuadraticWarmupLR', end=500) for scope in ('', 'mmdet.')]
    assert len({schedulers.scheduler_class(config(), scheduler) for scheduler in named}) == 1


def test_a_scheduler_that_waits_for_a_metric():
    scheduler = dict(type='ReduceOnPlateauLR', monitor='loss', patience=2, min_value=1e-5)
    assert schedulers.rates_of(config(), scheduler, 0.01) == ('min_value',)


def test_what_cannot_be_told_is_a_warning():
    """A factor per iteration is no count; a class that is not here tells nothing."""
    slow = dict(type='ExponentialLR', gamma=0.999, by_epoch=False)
    unknown = dict(type='SomebodysLR', floor=1e-3, by_epoch=False)
    loop = dict(type='IterBasedTrainLoop', max_iters=1000)
    cfg = config(train_cfg=loop, param_scheduler=[slow, unknown], **BASE_16)
    found, warnings = changes(cfg, images=1)
    assert 'param_scheduler' not in found
    assert any('ExponentialLR was not scaled' in text for text in warnings)
    assert any('SomebodysLR was not scaled: no scheduler of the name' in text for text in warnings)


def test_a_scheduler_of_somebody_else():
    """Its settings have names that nobody here knows."""
    from mmengine.optim import PolyLR
    from mmengine.registry import PARAM_SCHEDULERS

    class FloorLR(PolyLR):
        def __init__(self, optimizer, *args, lowest, **kwargs):
            super().__init__(optimizer, *args, eta_min=lowest, **kwargs)

    PARAM_SCHEDULERS.register_module(module=FloorLR)
    try:
        scheduler = dict(type='FloorLR', lowest=1e-3, power=1.0, end=100, by_epoch=False)
        assert schedulers.rates_of(config(), scheduler, 0.01) == ('lowest',)
    finally:
        PARAM_SCHEDULERS.module_dict.pop('FloorLR')
