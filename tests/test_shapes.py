"""Tests of the drawn data set: its contents, its files, and what happens when things go wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.ranks import in_two_ranks
from wsbcn_mm import shapes
from wsbcn_mm.shapes import draw, files
from wsbcn_mm.shapes.__main__ import main

# pycocotools decodes masks in a way that numpy 2 warns about; nothing of ours.
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')

SIZE = (96, 80)
NUM_TRAIN, NUM_VAL = 60, 5


def file_bytes(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
    return shapes.draw_dataset(tmp_path_factory.mktemp('data') / 'shapes', NUM_TRAIN, NUM_VAL, SIZE)


@pytest.fixture(scope='module')
def coco(dataset) -> dict[str, COCO]:
    return {
        split: COCO(dataset / f'coco/annotations/instances_{split}2017.json')
        for split in shapes.SPLITS
    }


# ----------------------------------------------------------------------------------------------
# One image
# ----------------------------------------------------------------------------------------------
def test_draw_image_returns_what_it_says():
    image, instances = shapes.draw_image('train', 0)
    assert image.shape == (160, 192, 3) and image.dtype == np.uint8
    assert 1 <= len(instances) <= 6
    for class_id, mask in instances:
        assert 0 <= class_id < len(shapes.CLASSES)
        assert mask.shape == (160, 192) and mask.dtype == bool


def test_same_arguments_same_image():
    first, first_instances = shapes.draw_image('val', 3, SIZE, seed=5)
    shapes.draw_image('train', 9)
    second, second_instances = shapes.draw_image('val', 3, SIZE, seed=5)
    np.testing.assert_array_equal(first, second)
    assert len(first_instances) == len(second_instances)
    for (class_a, mask_a), (class_b, mask_b) in zip(first_instances, second_instances, strict=True):
        assert class_a == class_b
        np.testing.assert_array_equal(mask_a, mask_b)


@pytest.mark.parametrize(
    'other', [('val', 0, SIZE, 0), ('train', 2, SIZE, 0), ('train', 0, SIZE, 1)]
)
def test_split_index_and_seed_each_change_the_image(other):
    assert not np.array_equal(
        shapes.draw_image('train', 0, SIZE, 0)[0], shapes.draw_image(*other)[0]
    )


def test_every_painted_object_stays_annotated_and_visible(monkeypatch):
    """Replays what was painted and compares it with what the annotations claim."""
    rasterise, paint = draw.rasterise, draw.paint_object
    painted, last_whole = [], []

    def recording_rasterise(corners):
        result = rasterise(corners)
        last_whole[:] = [result[2]]
        return result

    def recording_paint(canvas, window, coverage, class_id, rng):
        painted.append((window, coverage > 0.5, int((last_whole[0] > 0.5).sum())))
        paint(canvas, window, coverage, class_id, rng)

    monkeypatch.setattr(draw, 'rasterise', recording_rasterise)
    monkeypatch.setattr(draw, 'paint_object', recording_paint)
    covered_once = 0
    for index in range(40):
        painted.clear()
        instances = shapes.draw_image('train', index)[1]
        assert len(painted) == len(instances)
        owner = np.full((160, 192), -1)
        for number, (window, covers, _) in enumerate(painted):
            owner[window][covers] = number
        for number, ((_, mask), (_, covers, full)) in enumerate(
            zip(instances, painted, strict=True)
        ):
            np.testing.assert_array_equal(mask, owner == number)
            assert mask.sum() >= shapes.MIN_VISIBLE_PIXELS
            assert mask.sum() >= shapes.MIN_VISIBLE_SHARE * full
            covered_once += mask.sum() < covers.sum()
    assert covered_once > 5  # there is occlusion, so the test tested something


def test_masks_are_where_the_objects_are():
    """Most objects differ in colour from what is around them."""
    differences = []
    for index in range(30):
        image, instances = shapes.draw_image('train', index)
        occupied = np.any([mask for _, mask in instances], axis=0) if instances else None
        for _, mask in instances:
            ys, xs = np.nonzero(mask)
            near = np.zeros_like(mask)
            near[max(ys.min() - 4, 0) : ys.max() + 5, max(xs.min() - 4, 0) : xs.max() + 5] = True
            near &= ~occupied
            if near.any():
                differences.append(np.abs(image[mask].mean(0) - image[near].mean(0)).max())
    assert np.mean(np.array(differences) > 8) > 0.9


def test_images_differ_strongly_in_brightness():
    images = [shapes.draw_image('train', index)[0] / 255 for index in range(60)]
    means = [image.mean() for image in images]
    contrasts = [image.std(axis=(0, 1)).mean() for image in images]
    assert np.std(means) > 0.12
    assert np.std(means) > np.mean(contrasts)  # one image tells little about the others
    assert np.std(contrasts) > 0.025
    assert min(contrasts) > 0.01  # and yet no image is a single colour


def test_about_two_percent_of_the_images_are_empty():
    empty = [index for index in range(400) if index % draw.EMPTY_EVERY == draw.EMPTY_OFFSET]
    assert 4 <= len(empty) <= 12 and sum(index < 80 for index in empty) >= 2
    for index in empty[:2]:
        assert shapes.draw_image('train', index, SIZE)[1] == []
        assert shapes.draw_image('val', index, SIZE)[1] == []


@pytest.mark.parametrize('name', shapes.CLASSES)
def test_outlines_fill_the_area_they_should(name):
    """The even-odd raster agrees with the shoelace formula."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        corners = draw.random_outline(shapes.CLASSES.index(name), 192, 160, rng)
        x, y = corners.T
        area = abs(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2
        left, top, coverage = draw.rasterise(corners)
        assert coverage.sum() == pytest.approx(area, rel=0.04, abs=2)
        assert left <= x.min() and top <= y.min()


@pytest.mark.parametrize(
    'arguments, words',
    [
        (('test', 0), ["split must be 'train' or 'val'", "'test'"]),
        (('train2017', 0), ["split must be 'train' or 'val'"]),
        (('train', -1), ['index', 'at least 0', '-1']),
        (('train', 1.5), ['index', '1.5']),
        (('train', 0, 192), ['size', '(width, height)', '192']),
        (('train', 0, (192, 8)), ['size (height)', 'at least 48', '8']),
        (('train', 0, SIZE, -3), ['seed', '-3']),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        shapes.draw_image(*arguments)
    for word in words:
        assert word in str(error.value)


# ----------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------
def test_layout(dataset):
    files = file_bytes(dataset)
    voc = 'VOCdevkit/VOC2012'
    train = [f'{1 + i:012d}' for i in range(NUM_TRAIN)]
    val = [f'{1_000_001 + i:012d}' for i in range(NUM_VAL)]
    expected = {
        'shapes.json',
        'coco/annotations/instances_train2017.json',
        'coco/annotations/instances_val2017.json',
    }
    expected |= {
        f'{voc}/ImageSets/Segmentation/{name}.txt' for name in ('train', 'val', 'trainval')
    }
    expected |= {f'coco/train2017/{name}.jpg' for name in train}
    expected |= {f'coco/val2017/{name}.jpg' for name in val}
    expected |= {f'{voc}/JPEGImages/{name}.jpg' for name in train + val}
    expected |= {f'{voc}/SegmentationClass/{name}.png' for name in train + val}
    assert set(files) == expected
    lists = {
        name: files[f'{voc}/ImageSets/Segmentation/{name}.txt'].decode().split()
        for name in ('train', 'val', 'trainval')
    }
    assert lists == {'train': train, 'val': val, 'trainval': train + val}
    for name in train:
        assert files[f'coco/train2017/{name}.jpg'] == files[f'{voc}/JPEGImages/{name}.jpg']


def test_coco_box_area_mask_and_semantic_png_agree(dataset, coco):
    for split, index in coco.items():
        annotation_ids = index.getAnnIds()
        assert len(set(annotation_ids)) == len(annotation_ids) == len(index.dataset['annotations'])
        for record in index.loadImgs(index.getImgIds()):
            stem = Path(record['file_name']).stem
            with Image.open(dataset / f'coco/{split}2017/{record["file_name"]}') as photo:
                assert photo.size == SIZE == (record['width'], record['height'])
            with Image.open(dataset / f'VOCdevkit/VOC2012/SegmentationClass/{stem}.png') as picture:
                assert picture.mode == 'P'
                colours = picture.getpalette()[: 3 * len(shapes.PALETTE)]
                assert colours == [value for colour in shapes.PALETTE for value in colour]
                semantic = np.array(picture)
            rebuilt = np.zeros_like(semantic)
            annotations = index.loadAnns(index.getAnnIds(imgIds=record['id']))
            drawn = shapes.draw_image(split, record['id'] - files.FIRST_ID[split], SIZE)[1]
            for annotation, (class_id, visible) in zip(annotations, drawn, strict=True):
                assert isinstance(annotation['segmentation']['counts'], str)
                mask = index.annToMask(annotation).astype(bool)
                np.testing.assert_array_equal(mask, visible)
                ys, xs = np.nonzero(mask)
                assert annotation['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert annotation['area'] == mask.sum()
                assert annotation['iscrowd'] == 0
                assert annotation['category_id'] == class_id + 1
                assert not rebuilt[mask].any()  # visible parts do not overlap
                rebuilt[mask] = annotation['category_id']
            np.testing.assert_array_equal(semantic, rebuilt)


def test_categories_and_all_classes_appear(coco):
    categories = coco['train'].loadCats(coco['train'].getCatIds())
    assert [category['name'] for category in categories] == list(shapes.CLASSES)
    assert [category['id'] for category in categories] == [1, 2, 3, 4, 5]
    assert all(category['supercategory'] for category in categories)
    used = {annotation['category_id'] for annotation in coco['train'].dataset['annotations']}
    assert used == {1, 2, 3, 4, 5}


def test_some_images_have_no_annotation(coco):
    for index in coco.values():
        assert any(not index.getAnnIds(imgIds=image_id) for image_id in index.getImgIds())


def test_coco_evaluation_of_the_truth_is_perfect(coco):
    index = coco['val']
    results = [
        {
            'image_id': annotation['image_id'],
            'category_id': annotation['category_id'],
            'bbox': annotation['bbox'],
            'score': 1.0,
        }
        for annotation in index.dataset['annotations']
    ]
    overlaps = coco_mask.iou(
        [r['bbox'] for r in results], [r['bbox'] for r in results], [0] * len(results)
    )
    np.testing.assert_allclose(np.diag(overlaps), 1)
    assert len(index.loadRes(results).getAnnIds()) == len(results)


def test_two_runs_give_identical_bytes(dataset, tmp_path):
    again = shapes.draw_dataset(tmp_path / 'again', NUM_TRAIN, NUM_VAL, SIZE)
    assert file_bytes(again) == file_bytes(dataset)


def test_images_do_not_depend_on_the_number_of_images(dataset, tmp_path):
    small = file_bytes(shapes.draw_dataset(tmp_path / 'small', 3, 2, SIZE))
    large = file_bytes(dataset)
    pictures = [name for name in small if name.endswith(('.jpg', '.png'))]
    assert len(pictures) == 15
    for name in pictures:
        assert small[name] == large[name]


def test_splits_share_no_image(dataset):
    train = {path.read_bytes() for path in (dataset / 'coco/train2017').iterdir()}
    val = {path.read_bytes() for path in (dataset / 'coco/val2017').iterdir()}
    assert len(train) == NUM_TRAIN and len(val) == NUM_VAL and not train & val


# ----------------------------------------------------------------------------------------------
# What is at the root already
# ----------------------------------------------------------------------------------------------
def test_second_call_writes_nothing(tmp_path, monkeypatch):
    root = shapes.draw_dataset(str(tmp_path / 'a' / 'shapes'), 2, 1, SIZE)
    assert isinstance(root, Path)
    times = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    monkeypatch.setattr(files, 'draw_image', None)  # drawing would fail
    assert shapes.draw_dataset(root, 2, 1, list(SIZE)) == root
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert [path.name for path in root.parent.iterdir()] == ['shapes']


@pytest.mark.parametrize(
    'change', [{'num_train': 3}, {'num_val': 2}, {'size': (64, 80)}, {'seed': 1}]
)
def test_other_parameters_at_the_root_are_an_error(tmp_path, change):
    parameters = {'num_train': 2, 'num_val': 1, 'size': SIZE, 'seed': 0}
    root = shapes.draw_dataset(tmp_path / 'shapes', **parameters)
    before = file_bytes(root)
    with pytest.raises(ValueError, match='(?s)root.*shapes.json.*Name another root'):
        shapes.draw_dataset(root, **(parameters | change))
    assert file_bytes(root) == before


@pytest.mark.parametrize('content', ['{"version": 0}', 'not JSON', ''])
def test_foreign_stamp_is_an_error(tmp_path, content):
    (tmp_path / 'shapes.json').write_text(content)
    with pytest.raises(ValueError, match='shapes.json'):
        shapes.draw_dataset(tmp_path, 2, 1, SIZE)
    assert (tmp_path / 'shapes.json').read_text() == content


def test_foreign_files_are_never_touched(tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='nothing was touched'):
        shapes.draw_dataset(tmp_path, 2, 1, SIZE)
    with pytest.raises(ValueError, match='is a file'):
        shapes.draw_dataset(tmp_path / 'thesis.txt', 2, 1, SIZE)
    assert file_bytes(tmp_path) == {'thesis.txt': b'years of work'}


def test_empty_folder_and_link_to_one_are_used(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'disk')
    root = shapes.draw_dataset(tmp_path / 'link', 2, 1, SIZE)
    assert root == tmp_path / 'link' and root.is_symlink()
    assert (tmp_path / 'disk' / 'shapes.json').exists()


@pytest.mark.parametrize(
    'arguments, word',
    [
        ({'num_train': 0}, 'num_train'),
        ({'num_val': 0}, 'num_val'),
        ({'num_val': '80'}, 'num_val'),
        ({'size': (160,)}, 'size'),
        ({'seed': -1}, 'seed'),
    ],
)
def test_wrong_dataset_arguments_are_named(tmp_path, arguments, word):
    with pytest.raises(ValueError, match=f'^{word}'):
        shapes.draw_dataset(tmp_path / 'shapes', **arguments)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# Crashes and races
# ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_interrupted_drawing_leaves_nothing(tmp_path, error):
    def crash(done, total):
        assert total == 5
        if done == 3:
            raise error('pulled the plug')

    with pytest.raises(error):
        shapes.draw_dataset(tmp_path / 'shapes', 3, 2, SIZE, progress=crash)
    assert list(tmp_path.iterdir()) == []
    assert shapes.draw_dataset(tmp_path / 'shapes', 3, 2, SIZE).is_dir()


def test_leftover_of_a_killed_process_is_ignored(tmp_path):
    stale = tmp_path / '.shapes.drawing-x' / 'dataset' / 'coco'
    stale.mkdir(parents=True)
    root = shapes.draw_dataset(tmp_path / 'shapes', 2, 1, SIZE)
    assert (root / 'shapes.json').exists() and stale.exists()


def test_loser_of_a_race_uses_the_winners_files(tmp_path):
    root = tmp_path / 'shapes'
    winner = {}

    def overtake(done, total):
        if done == total:
            shapes.draw_dataset(root, 2, 1, SIZE)
            winner.update((path, path.stat().st_ino) for path in root.rglob('*'))

    assert shapes.draw_dataset(root, 2, 1, SIZE, progress=overtake) == root
    assert winner and winner == {path: path.stat().st_ino for path in root.rglob('*')}
    assert [path.name for path in tmp_path.iterdir()] == ['shapes']


def test_winner_with_other_parameters_is_an_error(tmp_path):
    root = tmp_path / 'shapes'
    with pytest.raises(ValueError, match='Name another root'):
        shapes.draw_dataset(
            root,
            2,
            1,
            SIZE,
            progress=lambda done, total: (
                done == total and shapes.draw_dataset(root, 2, 1, SIZE, seed=7)
            ),
        )
    assert json.loads((root / 'shapes.json').read_text())['seed'] == 7
    assert [path.name for path in tmp_path.iterdir()] == ['shapes']


def drawn(rank, root):
    return str(shapes.draw_dataset(root, NUM_TRAIN, NUM_VAL, SIZE))


def test_two_processes_at_once(dataset, tmp_path):
    root = tmp_path / 'shapes'
    assert in_two_ranks(drawn, root) == [str(root)] * 2
    assert file_bytes(root) == file_bytes(dataset)
    assert [path.name for path in tmp_path.iterdir()] == ['shapes']


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------
def test_command_line(tmp_path, capsys):
    arguments = [
        str(tmp_path / 'shapes'),
        '--num-train',
        '3',
        '--num-val',
        '1',
        '--size',
        '64',
        '48',
        '--seed',
        '2',
        '--preview',
        str(tmp_path / 'sheet.png'),
    ]
    main(arguments)
    output = capsys.readouterr()
    assert output.out.count('\n') == 1 and 'drew 4 images' in output.out
    assert 'drawing 4/4' in output.err
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.width > 128 and sheet.height > 96
    main(arguments)
    assert 'the data set is there' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*arguments, '--seed', '3'])
    assert stop.value.code == 2
    assert 'Name another root' in capsys.readouterr().err
