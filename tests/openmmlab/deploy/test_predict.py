"""wsbcn_mm.openmmlab.deploy: infer.py reads and writes what test.py does, bit for bit."""

import pytest

pytest.importorskip('mmdet', reason='reads images as its data sets do')
pytest.importorskip('mmseg', reason='reads images as its data sets do')

import json

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import DATASETS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules as register_mmseg
from PIL import Image
from torch import nn

from wsbcn_mm.openmmlab.data.reading import DataError
from wsbcn_mm.openmmlab.deploy import classes, inference, inputs, predict, writers

SHAPE = (24, 40)


def pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    Image.fromarray(pixels(*SHAPE, 3)).save(path, exif=exif)


def palette(path):
    image = Image.fromarray(pixels(*SHAPE) // 64)
    image.putpalette(pixels(12).tolist())
    image.save(path)


# How a file of that kind is written, its suffix, and how configs read it.
KINDS = {
    'colour': (lambda p: cv2.imwrite(p, pixels(*SHAPE, 3)), 'jpg', {}),
    'grey file': (lambda p: cv2.imwrite(p, pixels(*SHAPE)), 'png', {}),
    'grey model': (
        lambda p: cv2.imwrite(p, pixels(*SHAPE, 3)),
        'png',
        dict(color_type='grayscale'),
    ),
    '16 bit': (
        lambda p: cv2.imwrite(p, pixels(*SHAPE, 3, dtype=np.uint16)),
        'png',
        dict(color_type='unchanged', to_float32=True),
    ),
    'RGBA': (lambda p: cv2.imwrite(p, pixels(*SHAPE, 4)), 'png', {}),
    'RGBA as it is': (
        lambda p: cv2.imwrite(p, pixels(*SHAPE, 4)),
        'png',
        dict(color_type='unchanged'),
    ),
    'palette': (palette, 'png', {}),
    'TIFF': (
        lambda p: cv2.imwrite(p, pixels(*SHAPE, 4, dtype=np.uint16)),
        'tif',
        dict(color_type='unchanged', to_float32=True),
    ),
    'EXIF': (turned, 'jpg', {}),
    'EXIF ignored': (turned, 'jpg', dict(color_type='color_ignore_orientation')),
    'pillow': (lambda p: cv2.imwrite(p, pixels(*SHAPE, 3)), 'jpg', dict(imdecode_backend='pillow')),
}


def detection(root, name, loading):
    """A config with one image in COCO's layout."""
    height, width = cv2.imread(str(root / name), cv2.IMREAD_UNCHANGED).shape[:2]
    (root / 'a.json').write_text(
        json.dumps(
            dict(
                images=[dict(id=7, file_name=name, height=height, width=width)],
                annotations=[],
                categories=[dict(id=3, name='square'), dict(id=9, name='disc')],
            )
        )
    )
    keys = ('img_path', 'ori_shape', 'img_shape', 'scale_factor')
    return dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='a.json',
        data_prefix=dict(img=''),
        test_mode=True,
        metainfo=dict(classes=('disc', 'square')),
        pipeline=[
            dict(type='LoadImageFromFile', **loading),
            dict(type='Resize', scale=(64, 48), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs', meta_keys=keys),
        ],
    )


def segmentation(root, name, loading):
    """A config with one image; its class reduces the label zero without being told."""
    Image.fromarray(pixels(*SHAPE) % 3).save(root / 'a.mask.png')
    return dict(
        type='ADE20KDataset',
        data_root=str(root),
        data_prefix=dict(img_path='', seg_map_path=''),
        img_suffix=f'a.{name.split(".")[1]}',
        seg_map_suffix='a.mask.png',
        pipeline=[
            dict(type='LoadImageFromFile', **loading),
            dict(type='Resize', scale=(64, 48), keep_ratio=True),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    )


@pytest.fixture(params=['mmdet', 'mmseg'])
def scope(request):
    register = dict(mmdet=register_mmdet, mmseg=register_mmseg)[request.param]
    register(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(request.param):
        yield request.param


@pytest.fixture
def mmdet():
    register_mmdet(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.mark.parametrize('kind', KINDS)
def test_an_image_is_read_as_its_data_set_reads_it(kind, scope, tmp_path):
    write, suffix, loading = KINDS[kind]
    write(str(tmp_path / f'a.{suffix}'))
    dataset = dict(mmdet=detection, mmseg=segmentation)[scope](tmp_path, f'a.{suffix}', loading)
    wanted = pseudo_collate([DATASETS.build(dataset)[0]])
    cfg = Config(
        dict(
            default_scope=scope, model={}, test_dataloader=dict(dataset=dataset), val_dataloader={}
        )
    )
    image, found = inputs.Reader(cfg)(tmp_path / f'a.{suffix}')
    assert found['inputs'][0].dtype == wanted['inputs'][0].dtype
    assert torch.equal(found['inputs'][0], wanted['inputs'][0])
    meta = found['data_samples'][0].metainfo
    for key, value in wanted['data_samples'][0].metainfo.items():
        if key != 'seg_map_path':
            assert meta[key] == value, key
    shown = predict.displayable(image)
    assert shown.shape == (*image.shape[:2], 3) and shown.dtype == np.uint8 and shown.any()


@pytest.mark.usefixtures('mmdet')
def test_what_is_no_image_is_told_from_a_pipeline_that_does_not_take_it(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), pixels(*SHAPE, 3))
    dataset = detection(tmp_path, 'a.png', {})
    dataset['pipeline'].insert(1, dict(type='Normalize', mean=[0] * 5, std=[1] * 5))
    cfg = Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=dataset)))
    read = inputs.Reader(cfg)
    (tmp_path / 'b.png').write_text('no image')
    with pytest.raises(DataError, match=r'b\.png'):
        read(tmp_path / 'b.png')
    with pytest.raises(ValueError, match=r'the test pipeline fails on .*a\.png, an image'):
        read(tmp_path / 'a.png')


@pytest.mark.usefixtures('mmdet')
def test_parts_of_the_test_data_that_are_read_differently_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), pixels(*SHAPE, 3))
    one = detection(tmp_path, 'a.png', {})
    other = detection(tmp_path, 'a.png', dict(color_type='grayscale'))
    both = dict(type='ConcatDataset', datasets=[one, one])
    cfg = Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=both)))
    inputs.Reader(cfg)
    arrays = detection(tmp_path, 'a.png', {})
    arrays['pipeline'][0]['type'] = 'LoadImageFromNDArray'
    in_memory = Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=arrays)))
    with pytest.raises(ValueError, match='begin with LoadImageFromFile\n  got LoadImageFromND'):
        inputs.Reader(in_memory)
    cfg.test_dataloader.dataset.datasets[1] = other
    with pytest.raises(ValueError, match='read in different ways'):
        inputs.Reader(cfg)


class Kept(LocalBackend):
    """A storage of somebody's own."""

    def get_text(self, filepath, encoding='utf-8'):
        return super().get_text(filepath.removeprefix('kept://'), encoding)


register_backend('kept', Kept, prefixes='kept', force=True)


@pytest.mark.usefixtures('mmdet')
def test_labels_are_named_in_the_order_of_the_annotation_file(tmp_path):
    """mmdet numbers labels as the file's categories stand, whatever order the config has."""
    cv2.imwrite(str(tmp_path / 'a.png'), pixels(*SHAPE, 3))
    dataset = detection(tmp_path, 'a.png', {})
    assert DATASETS.build(dataset).cat2label == {3: 0, 9: 1}
    cfg = Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=dataset)))
    model = nn.Identity()
    model.dataset_meta = dict(classes=('disc', 'square'))
    names = classes.classes_of(cfg, model)['classes']
    assert names == ['square', 'disc']
    for place, found in (('', names), ('none/', ['disc', 'square'])):
        stored = Config(cfg.to_dict())
        stored.test_dataloader.dataset.data_root = f'kept://{tmp_path}/{place}'
        assert classes.classes_of(stored, model)['classes'] == found
    stored.test_dataloader.dataset.update(data_root=str(tmp_path), ann_file='')
    assert classes.classes_of(stored, model)['classes'] == ['disc', 'square']
    meta = dict(dataset_meta=dict(classes=('disc', 'square'), palette=['red', 'green']))
    model.dataset_meta = inference.by_label(meta)  # a checkpoint of others
    assert classes.classes_of(cfg, model)['classes'] == names
    for by_label, palette in ((['disc', 'square'], 'red'), (['square', 'disc'], 'green')):
        model.dataset_meta = inference.by_label(dict(meta, classes_by_label=by_label))
        found = classes.classes_of(cfg, model)
        assert (found['classes'], found['palette'][0]) == (by_label, palette)

    writer = writers.CocoWriter(tmp_path / 'p.json', names, tmp_path / 'a.json')
    found = DetDataSample()
    found.pred_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]]),
        scores=torch.ones(2),
        labels=torch.tensor([0, 1]),
    )
    writer.add('a.png', found, SHAPE)
    found.pred_instances.labels[0] = 2
    with pytest.raises(ValueError, match='class number 2, and 2 names'):
        writer.add('a.png', found, SHAPE)
    writer.close()
    written = json.loads((tmp_path / 'p.json').read_text())['annotations']
    assert [entry['category_id'] for entry in written] == [3, 9]


@pytest.mark.parametrize('text', [None, 'a = 1', '[]', '{"images": []}'])
def test_an_annotation_file_that_is_none_is_named(text, tmp_path):
    if text is not None:
        (tmp_path / 'a.json').write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=r'--annotations: .*a\.json'):
        writers.CocoWriter(tmp_path / 'p.json', ['b'], tmp_path / 'a.json')


@pytest.mark.parametrize(
    'named, found',
    [
        ([dict(file_name='a.png')], True),
        ([dict(file_name='val/a.png'), dict(file_name='val/ba.png')], True),  # below data_prefix
        ([dict(file_name='COCO_val2017_a.png')], True),  # LVIS 0.5
        ([dict(coco_url='http://images.cocodataset.org/val2017/a.png')], True),  # LVIS 1
        ([dict(file_name='x_a.png')], 'not among'),
        ([dict(file_name='train/a.png'), dict(file_name='val/a.png')], 'several'),
    ],
)
def test_images_get_the_ids_that_their_file_gives_them(named, found, tmp_path):
    images = [dict(image, id=7 + i) for i, image in enumerate(named)]
    content = dict(images=images, categories=[dict(id=3, name='b')], annotations=[])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    writer = writers.CocoWriter(tmp_path / 'p.json', ['b'], tmp_path / 'a.json')
    sample = DetDataSample(pred_instances=InstanceData(bboxes=torch.zeros(0, 4)))
    if found is not True:
        with pytest.raises(ValueError, match=f'a.png is {found}'):
            writer.add('a.png', sample, SHAPE)
    else:
        sample.pred_instances.scores = sample.pred_instances.labels = torch.zeros(0)
        writer.add('a.png', sample, SHAPE)
    writer.close()
    written = json.loads((tmp_path / 'p.json').read_text())['images']
    assert [image['id'] for image in written] == [7] * (found is True)


@pytest.mark.usefixtures('mmdet')
def test_what_cannot_be_written_is_one_sentence(tmp_path):
    """A panoptic model predicts no boxes."""
    cv2.imwrite(str(tmp_path / 'a.png'), pixels(*SHAPE, 3))
    dataset = detection(tmp_path, 'a.png', {})
    model = nn.Identity()
    found = DetDataSample(pred_panoptic_seg=PixelData(sem_seg=torch.zeros(1, *SHAPE)))
    model.test_step = lambda batch: [found]
    cfg = Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=dataset)))
    predictor = predict.Predictor(cfg, model)
    with pytest.raises(ValueError, match=r'predicts pred_panoptic_seg.*\n.*outfile_prefix'):
        predictor(tmp_path / 'a.png')
    found.gt_instances = InstanceData()  # what a model was given is none of its predictions
    with pytest.raises(ValueError, match='predicts pred_panoptic_seg, and'):
        predictor(tmp_path / 'a.png')
    # CrowdDet's labels are no integers, of which numbers of categories and colours are made.
    found.pred_instances = InstanceData(labels=torch.zeros(1), bboxes=torch.ones(1, 4))
    _, sample = predictor(tmp_path / 'a.png')
    assert sample.pred_instances.labels.dtype == torch.long


@pytest.mark.parametrize('reduced', [False, True])
def test_masks_hold_what_test_py_writes(reduced, tmp_path):
    sample = SegDataSample(metainfo=dict(img_path='a.jpg', reduce_zero_label=reduced))
    sample.pred_sem_seg = PixelData(data=torch.randint(0, 3, (1, 6, 7)))
    metric = IoUMetric(output_dir=str(tmp_path / 'test'), format_only=True)
    metric.dataset_meta = dict(classes=('a', 'b', 'c'))
    metric.process({}, [sample.to_dict() | dict(img_path='a.jpg', reduce_zero_label=reduced)])
    colours = [(10, 0, 0), (0, 20, 0), (0, 0, 30)]
    writers.write_mask(tmp_path / 'infer/a.png', sample, colours)
    written = Image.open(tmp_path / 'infer/a.png')
    assert np.array_equal(written, Image.open(tmp_path / 'test/a.png'))
    first = np.argwhere(sample.pred_sem_seg.data[0].numpy() == 0)[0]
    assert written.convert('RGB').getpixel((int(first[1]), int(first[0]))) == colours[0]
