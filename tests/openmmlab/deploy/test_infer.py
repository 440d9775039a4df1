"""tools/infer.py: predictions in files."""

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import json
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image
from torch import nn

from tests.openmmlab.deploy.models import EACH, QUICK
from tests.tool import tool
from wsbcn_mm import shapes
from wsbcn_mm.openmmlab import config, loaders
from wsbcn_mm.openmmlab.deploy import classes, inference, inputs, predict, writers

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures


@EACH
def test_infer_writes_predictions_and_pictures(folder, name):
    (folder / 'images/broken.jpg').write_text('no picture')
    (folder / 'images/empty.png').write_bytes(b'')
    (folder / 'images/notes.txt').write_text('no image file')
    out = folder / f'found_{name}'
    done = tool('infer.py', QUICK[name], folder / f'{name}.pth', folder / 'images', '-o', out)
    assert done.returncode == 1 and 'Traceback' not in done.stderr  # two cannot be read
    assert 'broken.jpg' in done.stderr and 'empty.png' in done.stderr, done.stderr[-2000:]
    assert 'norms folded' in done.stdout
    pictures = sorted(f.relative_to(out).as_posix() for f in out.glob('pictures/**/*.jpg'))
    assert pictures == ['pictures/a.jpg', 'pictures/b.jpg', 'pictures/inner/a.jpg']
    cfg = config.load_config(str(QUICK[name]))
    predictor = predict.Predictor(cfg, inference.load_model(cfg, str(folder / f'{name}.pth')))
    _, sample = predictor(folder / 'images/inner/a.png')
    if name == 'deeplabv3':
        mask = Image.open(out / 'masks/inner/a.png')
        assert mask.mode == 'P'
        assert (np.asarray(mask) == sample.pred_sem_seg.data[0].numpy()).mean() > 0.999
        return
    from pycocotools.coco import COCO

    coco = COCO(out / 'predictions.json')
    assert [i['file_name'] for i in coco.dataset['images']] == ['a.png', 'b.jpg', 'inner/a.png']
    assert [c['name'] for c in coco.dataset['categories']] == list(shapes.CLASSES)
    found = coco.loadAnns(coco.getAnnIds(imgIds=[3]))
    own = sample.pred_instances
    assert len(found) == len(own) > 0
    for entry, box, mask in zip(found, own.bboxes.tolist(), own.masks.numpy()):
        x1, y1, x2, y2 = box
        np.testing.assert_allclose(entry['bbox'], [x1, y1, x2 - x1, y2 - y1], atol=0.1)
        assert abs(int(coco.annToMask(entry).sum()) - int(mask.sum())) <= 5


def test_infer_takes_ids_from_an_annotation_file(folder):
    given = dict(
        images=[dict(id=77, file_name='b.jpg')],
        annotations=[],
        categories=[dict(id=10 * i, name=n) for i, n in enumerate(reversed(shapes.CLASSES), 1)],
    )
    (folder / 'given.json').write_text(json.dumps(given))
    out = folder / 'found_one'
    arguments = [QUICK['mask_rcnn'], folder / 'mask_rcnn.pth']
    done = tool(
        'infer.py',
        *arguments,
        folder / 'images/b.jpg',
        '-o',
        out,
        '--no-fold',
        '--no-pictures',
        '--annotations',
        folder / 'given.json',
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / 'predictions.json').read_text())
    assert [i['id'] for i in found['images']] == [77]
    assert {a['image_id'] for a in found['annotations']} == {77}
    assert {a['category_id'] for a in found['annotations']} <= {10, 20, 30, 40, 50}
    assert [f.name for f in out.iterdir()] == ['predictions.json']
    given = ('images', '-o', out, '--annotations', 'a.json')
    done = tool('infer.py', QUICK['deeplabv3'], 'none.pth', *given)
    assert done.returncode == 1 and 'numbers the objects of detectors' in done.stderr
    done = tool('infer.py', *arguments, folder / 'nowhere', '-o', out)
    assert done.returncode == 1 and 'no image file or folder' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'scope, kind, first',
    [('mmdet', 'CocoDataset', 'person'), ('mmseg', 'CityscapesDataset', 'road')],
)
def test_classes_of_a_hosts_dataset_where_the_checkpoint_names_none(scope, kind, first):
    loader = dict(dataset=dict(type='RepeatDataset', dataset=dict(type=kind)))
    cfg = Config(dict(default_scope=scope, test_dataloader=loader))
    model = nn.Identity()
    assert classes.classes_of(cfg, model)['classes'][0] == first
    model.dataset_meta = dict(classes=('a', 'b'))
    assert classes.classes_of(cfg, model)['classes'] == ['a', 'b']
    cfg.test_dataloader.dataset.dataset.type = 'BaseSegDataset' if scope == 'mmseg' else 'Unknown'
    del model.dataset_meta
    with pytest.raises(ValueError, match='knows the names of the classes'):
        classes.classes_of(cfg, model)


def test_colours_are_those_of_the_classes():
    kind = 'CityscapesDataset'
    dataset = dict(type=kind, metainfo=dict(classes=('car', 'road')))
    cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dataset)))
    official = loaders.dataset_class(cfg, dataset).METAINFO
    colours = dict(zip(official['classes'], official['palette']))
    found = classes.classes_of(cfg, nn.Identity())
    assert found['palette'] == [colours['car'], colours['road']]
    dataset['metainfo']['classes'] = ('car', 'of my own')
    cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dataset)))
    assert classes.classes_of(cfg, nn.Identity())['palette'] is None


def test_classes_in_a_file(tmp_path):
    file = tmp_path / 'classes.txt'
    file.write_text('road\ncar\n')
    meta = dict(classes=str(file))
    dataset = dict(type='BaseSegDataset', metainfo=meta)
    cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dataset)))
    assert classes.classes_of(cfg, nn.Identity())['classes'] == ['road', 'car']
    file.unlink()
    with pytest.raises(ValueError, match=r'metainfo.classes is one text, and no file'):
        classes.classes_of(cfg, nn.Identity())


def test_files_with_one_result_are_named(tmp_path):
    for name in ('a.png', 'a.jpg'):
        (tmp_path / name).write_bytes(b'x')
    with pytest.raises(ValueError, match='would write the same results'):
        inputs.find_images(tmp_path, tmp_path / 'out')
    (tmp_path / 'a.jpg').unlink()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/b.png').write_bytes(b'x')  # a result of ours
    (tmp_path / '.ipynb_checkpoints').mkdir()
    for name in ('.ipynb_checkpoints/a-checkpoint.png', '._a.png'):  # what others leave behind
        (tmp_path / name).write_bytes(b'x')
    assert inputs.find_images(tmp_path, tmp_path / 'out') == [(tmp_path / 'a.png', Path('a.png'))]
    with pytest.raises(FileNotFoundError, match='no image in'):
        inputs.find_images(tmp_path / 'out', tmp_path / 'out')
    (tmp_path / 'b.NPY').write_bytes(b'x')  # what a loader of one's own reads
    dataset = dict(type='BaseSegDataset', img_suffix='.npy', pipeline=[])
    suffixes = inputs.suffixes_of(Config(dict(test_dataloader=dict(dataset=dataset))))
    assert len(inputs.find_images(tmp_path, tmp_path / 'out', suffixes)) == 2


def test_an_interrupted_run_leaves_no_half_file(tmp_path):
    writer = writers.CocoWriter(tmp_path / 'predictions.json', ['a'])
    assert not (tmp_path / 'predictions.json').exists()
    writer.close(complete=False)
    assert list(tmp_path.iterdir()) == []
