"""Moving shapes and pictures of one shape: what tells the class, and the files."""

import json

import numpy as np
import pytest
from PIL import Image

from wsbcn_mm import shapes
from wsbcn_mm.shapes import clips, draw, pictures
from wsbcn_mm.shapes.__main__ import main


def path_of(label, seed=0):
    """Centres, sizes and angles of a shape in the frames of a clip."""
    outline = draw.unit_outline('rectangle', np.random.default_rng(7))
    corners = np.stack(clips.path_of(outline, label, 64, 64, np.random.default_rng(seed)))
    centre = corners.mean(1)
    arm = corners[:, 0] - centre
    return centre, np.linalg.norm(arm, axis=1), np.unwrap(np.arctan2(arm[:, 1], arm[:, 0]))


# What changes from the first frame to the last, and in which direction (y points down).
MOVES = {
    'left': ('x', -1),
    'right': ('x', 1),
    'up': ('y', -1),
    'down': ('y', 1),
    'clockwise': ('angle', 1),
    'counter-clockwise': ('angle', -1),
    'growing': ('size', 1),
    'shrinking': ('size', -1),
}


@pytest.mark.parametrize('label', range(len(clips.MOTIONS)))
def test_what_moves_how_is_the_class(label):
    centre, size, angle = path_of(label)
    changes = dict(
        x=np.ptp(centre[:, 0]), y=np.ptp(centre[:, 1]), size=np.ptp(size), angle=np.ptp(angle)
    )
    values = dict(x=centre[:, 0], y=centre[:, 1], size=size, angle=angle)
    what, direction = MOVES[clips.MOTIONS[label]]
    assert (np.sign(np.diff(values[what])) == direction).all()
    least = dict(x=30, y=30, size=5, angle=1.5)
    assert changes.pop(what) > least[what]
    assert all(change < 1e-9 for change in changes.values())


def test_a_single_frame_tells_nothing():
    """Place, size and angle of a frame are distributed alike in all classes."""
    by_class = []
    for label in range(8):
        drawn = [path_of(label, seed) for seed in range(400)]
        frames = np.random.default_rng(1).integers(clips.FRAMES, size=400)
        by_class.append(
            [
                (*np.abs(c[t] - 32), s[t], np.cos(a[t]))
                for (c, s, a), t in zip(drawn, frames, strict=True)
            ]
        )
    found = np.array(by_class)  # (8, 400, 4)
    spread = found.reshape(-1, 4).std(0)
    means = np.abs(found.mean(1) - found.reshape(-1, 4).mean(0)) / spread
    assert (means < 0.2).all(), means


def test_clips_as_files(tmp_path):
    cv2 = pytest.importorskip('cv2')
    root = clips.draw_clips(tmp_path / 'clips', 3, 1)
    lines = (root / 'train_videos.txt').read_text().splitlines()
    assert lines == [f'train/{i:06d}.mp4 {i}' for i in range(3)]
    assert (root / 'val_frames.txt').read_text() == 'val/000000 16 0\n'
    expected, label = clips.draw_clip('train', 1)
    assert label == 1 and expected.shape == (16, 64, 64, 3)
    video, read = cv2.VideoCapture(str(root / 'videos/train/000001.mp4')), []
    while (frame := video.read())[0]:
        read.append(frame[1][..., ::-1])
    frames = [Image.open(f) for f in sorted((root / 'frames/train/000001').iterdir())]
    for found in (read, frames):
        error = np.abs(np.stack([np.asarray(f, float) for f in found]) - expected)
        assert len(found) == 16 and error.mean() < 8
    assert json.loads((root / clips.STAMP).read_text())['num_train'] == 3
    assert clips.draw_clips(root, 3, 1) == root  # is there
    with pytest.raises(ValueError, match='must hold the shapes data set'):
        clips.draw_clips(root, 4, 1)
    with pytest.raises(ValueError, match='width of 64 or more'):
        clips.draw_clips(tmp_path / 'odd', 3, 1, (48, 64))


def test_pictures_in_a_folder_for_each_class(tmp_path, capsys):
    root = tmp_path / 'pictures'
    main(['--pictures', str(root), '--num-train', '10', '--num-val', '5'])
    assert 'drew 15 pictures' in capsys.readouterr().out
    for split, count in (('train', 2), ('val', 1)):
        folders = {f.name: len(list(f.iterdir())) for f in (root / split).iterdir()}
        assert folders == dict.fromkeys(shapes.CLASSES, count)
    assert Image.open(root / 'train/star/000003.jpg').size == (64, 64)
    picture, label = pictures.draw_picture('val', 3)
    assert picture.shape == (64, 64, 3) and label == shapes.CLASSES.index('star')


def test_same_arguments_same_clip():
    first, second = (clips.draw_clip('val', 3, seed=5)[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, clips.draw_clip('train', 3, seed=5)[0])


@pytest.mark.parametrize('draws', [clips.draw_clip, pictures.draw_picture])
@pytest.mark.parametrize(
    'arguments, message',
    [(('test', 0), 'split must be'), (('val', -1), 'index must'), (('val', 0, (20, 64)), 'width')],
)
def test_arguments_out_of_range(draws, arguments, message):
    with pytest.raises(ValueError, match=message):
        draws(*arguments)
