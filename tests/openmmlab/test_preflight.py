"""wsbcn_mm.openmmlab.preflight: what is missing is said before anything is started."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmcv', reason='a config is not read without mmcv')

import copy
import re

import torch
from mmengine.config import Config

from wsbcn_mm.openmmlab import loaders, preflight


def coco(root):
    return dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
    )


def voc(root):
    return dict(
        type='PascalVOCDataset',
        data_root=str(root),
        ann_file='ImageSets/Segmentation/train.txt',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    )


PARTS = {
    coco: ['annotations/instances_train2017.json', 'train2017'],
    voc: ['ImageSets/Segmentation/train.txt', 'JPEGImages', 'SegmentationClass'],
}
LAYOUT = {coco: 'instances_{train,val}2017.json', voc: 'VOC2012/ImageSets/Segmentation'}
WRAPPERS = {
    'plain': lambda d: d,
    'repeat': lambda d: dict(type='RepeatDataset', times=2, dataset=d),
    'concat': lambda d: dict(type='ConcatDataset', datasets=[dict(type='A'), d]),
    'nested': lambda d: dict(
        type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[d, d])
    ),
}


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if path.suffix else path.mkdir()


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('dataset', [coco, voc])
def test_check_data_names_each_missing_path_until_all_are_there(dataset, wrapper, tmp_path):
    inner = dataset(tmp_path)
    cfg = Config(dict(train_dataloader=dict(dataset=WRAPPERS[wrapper](inner))))
    for part in PARTS[dataset]:
        with pytest.raises(FileNotFoundError) as error:
            preflight.check_data(cfg, 'train_dataloader')
        message = str(error.value)
        first = f'train_dataloader: {inner["type"]} needs {tmp_path / part}, which does not exist'
        assert message.splitlines()[0] == first
        assert LAYOUT[dataset] in message
        key = re.search(r'--cfg-options (\S+)=', message)[1]
        other = copy.deepcopy(cfg)
        other.merge_from_dict({key: 'other'})
        found = [d for _, d in loaders.datasets_of(other, 'train_dataloader')]
        assert 'other' in [d.get('data_root') for d in found]
        make(tmp_path / part)
    preflight.check_data(cfg, 'train_dataloader')


def test_check_data_looks_at_the_loaders_it_is_told(tmp_path):
    cfg = Config(dict(val_dataloader=dict(dataset=coco(tmp_path)), test_dataloader=None))
    preflight.check_data(cfg, 'train_dataloader', 'test_dataloader')
    with pytest.raises(FileNotFoundError, match='val_dataloader'):
        preflight.check_data(cfg, 'train_dataloader', 'val_dataloader')


def test_a_list_in_the_place_of_a_data_set(tmp_path):
    cfg = Config(dict(train_dataloader=dict(dataset=[coco(tmp_path), coco(tmp_path)])))
    with pytest.raises(ValueError, match=r'train_dataloader.dataset is a list.*\n.*ConcatDataset'):
        preflight.check_data(cfg, 'train_dataloader')
    preflight.check_data(Config(dict(train_dataloader=dict(dataset=[dict(inputs=1)]))))
    cfg = Config(dict(test_dataloader=[dict(dataset=coco(tmp_path))] * 2))
    with pytest.raises(ValueError, match='(?s)test_dataloader is a list, .*MultiDatasetsEvaluator'):
        preflight.check_data(cfg, 'test_dataloader')


def test_check_data_lets_the_embedded_dataset_draw_itself(tmp_path):
    pytest.importorskip('mmdet', reason='registered there')
    import wsbcn_mm.openmmlab.datasets.shapes_coco  # noqa: F401  as the config's custom_imports

    dataset = dict(coco(tmp_path / 'absent'), type='ShapesCocoDataset')
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset)))
    preflight.check_data(cfg, 'train_dataloader')
    assert not (tmp_path / 'absent').exists()


def test_check_data_leaves_alone_what_the_host_reads_otherwise(tmp_path):
    """Storage with a prefix or a backend, test data without masks."""
    for change in (
        dict(data_root='s3://bucket/coco/'),
        dict(ann_file='store://bucket/a.json', data_prefix=dict(img='store://bucket/images')),
        dict(backend_args=dict(backend='petrel', path_mapping={'data/': 's3://'})),
    ):
        cfg = Config(dict(train_dataloader=dict(dataset={**coco(tmp_path), **change})))
        preflight.check_data(cfg, 'train_dataloader')
    dataset = dict(voc(tmp_path), ann_file='', pipeline=[dict(type='LoadImageFromFile')])
    (tmp_path / 'JPEGImages').mkdir()
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    preflight.check_data(cfg, 'test_dataloader')
    dataset['pipeline'].append(dict(type='LoadAnnotations'))
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    with pytest.raises(FileNotFoundError, match='SegmentationClass'):
        preflight.check_data(cfg, 'test_dataloader')


def test_a_home_folder_is_found_where_the_host_finds_it(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(dict(weight=torch.zeros(1)), tmp_path / 'a.pth')
    init = dict(type='Pretrained', checkpoint='~/a.pth')
    preflight.check_pretrained(Config(dict(model=dict(backbone=dict(init_cfg=init)))))
    init['checkpoint'] = '~/b.pth'
    with pytest.raises(FileNotFoundError, match=r'model\.backbone starts from ~/b\.pth'):
        preflight.check_pretrained(Config(dict(model=dict(backbone=dict(init_cfg=init)))))


def test_a_config_that_trains_nothing_is_one_sentence():
    """As those of trackers; where one of the three is there, the runner says what is missing."""
    cfg = Config(dict(model=dict(type='StrongSORT'), train_cfg=None, optim_wrapper=None))
    with pytest.raises(ValueError, match='no train_dataloader, train_cfg, optim_wrapper: nothing'):
        preflight.check_train(cfg)
    cfg.optim_wrapper = dict(optimizer=dict(type='SGD', lr=1))
    preflight.check_train(cfg)


def test_mixed_precision_without_a_gpu_is_one_sentence(monkeypatch):
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper')))
    monkeypatch.setattr(preflight, 'get_device', lambda: 'cpu')
    with pytest.raises(ValueError, match='needs a GPU'):
        preflight.check_amp(cfg)
    preflight.check_amp(Config(dict(optim_wrapper=dict(type='OptimWrapper'))))
    monkeypatch.setattr(preflight, 'get_device', lambda: 'cuda')
    preflight.check_amp(cfg)


@pytest.mark.parametrize(
    'model, steps, fits',
    [
        ('EncoderDecoder', ['Load', 'Pack'], True),
        ('EncoderDecoder', ['Load', 'TestTimeAug'], False),
        ('SegTTAModel', ['Load', 'TestTimeAug'], True),
    ],
)
def test_several_versions_of_an_image_are_for_a_model_of_theirs(model, steps, fits):
    dataset = dict(type='A', pipeline=[dict(type=step) for step in steps])
    cfg = Config(dict(model=dict(type=model), test_dataloader=dict(dataset=dataset)))
    if fits:
        preflight.check_versions(cfg)
        return
    for check in (preflight.check_versions, loaders.datasets_of_test):
        with pytest.raises(ValueError, match='makes several versions of each image'):
            check(cfg)
