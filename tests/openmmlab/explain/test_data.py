"""wsbcn_mm.openmmlab.explain.data: a failure that came from a file of the data names it."""

import re

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")

from types import FunctionType

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import nn

from wsbcn_mm.openmmlab.explain import data


class VideoDataset(BaseDataset):
    """Named as MMAction2's, and reads a list as it does."""

    def load_data_list(self):
        for line in self.lines:
            _, label = line.split()
            int(label)
        return [{}]


def said_of(action):
    with pytest.raises(Exception) as error:  # whatever the host raises
        action()
    return data.explain(Config({}), error.value)


@pytest.mark.parametrize('line', ['a.mp4 jump', 'a.mp4,1', '', 'a b.mp4 1', 'file label'])
def test_a_line_that_is_none_is_shown(line):
    class Videos(VideoDataset):
        lines = ('a.mp4 0', line)

    text = said_of(lambda: Videos(ann_file='list.txt'))
    assert text.startswith(f'Videos cannot read the line {line!r} of list.txt\n  ValueError: ')
    assert 'every line must be "FILE LABEL"' in text


def test_a_name_in_a_list_whose_file_is_missing_is_shown():
    class XMLDataset(BaseDataset):
        """Named as MMDetection's."""

        def load_data_list(self):
            for img_id in ('a', 'b.jpg'):
                if '.' in img_id:
                    raise FileNotFoundError(2, 'No such file or directory', f'{img_id}.xml')

    text = said_of(lambda: XMLDataset(ann_file='list.txt'))
    assert text.startswith("XMLDataset cannot read the line 'b.jpg' of list.txt\n")
    assert 'every line must be the name of an image without its suffix' in text


def test_a_storage_that_knows_no_folders():
    text = said_of(lambda: BaseDataset(ann_file='a.json', data_root='http://127.0.0.1:9/data'))
    assert text.startswith('HTTPBackend has no join_path, which the data set asks for')


@pytest.mark.parametrize('text', ['nan', None])
def test_an_xml_file_that_cannot_be_read_is_named(text):
    class XMLDataset(BaseDataset):
        """Named as MMDetection's."""

        def load_data_list(self):
            for img_id in ('a', 'b'):
                self.parse_data_info(dict(img_id=img_id, xml_path=f'{img_id}.xml'))

        def parse_data_info(self, img_info):
            int(float(text.strip()))

    said = said_of(lambda: XMLDataset(ann_file='list.txt'))
    assert said.startswith('a.xml cannot be read\n') and 'bndbox with xmin' in said


def test_a_folder_of_an_editor_that_is_one_class_too_many():
    class CustomDataset(BaseDataset):
        """Named as MMPretrain's."""

        img_prefix = 'train'

        def load_data_list(self):
            return self._find_samples()

        def _find_samples(self):
            classes = ['.ipynb_checkpoints', 'cat']
            assert len(classes) == 1, "doesn't match the number of specified classes"

    text = said_of(CustomDataset)
    assert text.startswith('CustomDataset: train/.ipynb_checkpoints is taken for a class')


def test_the_step_that_takes_out_every_image_is_named():
    class Images(BaseDataset):
        def load_data_list(self):
            return [dict(width=9)]

    class Small:
        def __init__(self):
            self.least = 10

        def __call__(self, data):
            return data if data['width'] >= self.least else None

    data = Images(pipeline=[lambda data: data, Small()], ann_file='a.json', max_refetch=2)
    text = said_of(lambda: data[0])
    assert text.startswith('Images (a.json): Small of its pipeline takes out every image')
    assert 'it has least=10\n' in text


class DataSample(BaseDataElement):
    """As the hosts call theirs."""


def segmented(mask, **info):
    sample = DataSample(metainfo=dict(seg_map_path='a.png', ori_shape=(4, 6), **info))
    sample.gt_sem_seg = PixelData(data=mask)
    return sample


def labelled(label):
    sample = DataSample(metainfo=dict(img_path='a.jpg'))
    sample.set_field(torch.tensor([label]), 'gt_label')
    return sample


def test_a_weight_of_ignored_pixels_is_named():
    def cross_entropy(label, class_weight, ignore_index=255):
        return torch.stack([class_weight[cls] for cls in label])

    text = said_of(lambda: cross_entropy(torch.tensor([[0, 255]]), torch.ones(2)))
    assert text.startswith('a loss with class_weight stops at masks that hold 255 ("ignore"')
    assert said_of(lambda: cross_entropy(torch.tensor([[0, 7]]), torch.ones(2))) is None


def test_boxes_without_masks_are_counted():
    def pack(results):
        return [results['gt_masks'][i] for i, _ in enumerate(results['gt_bboxes'])]

    text = said_of(lambda: pack(dict(gt_bboxes=[1, 2, 3], gt_masks=[1])))
    assert text.startswith('the pipeline gives 3 boxes and 1 masks: a step that mixes images')
    assert said_of(lambda: pack(dict(gt_bboxes=[1], gt_masks={}))) is None  # a KeyError


def test_what_the_pipeline_does_not_give_is_named():

    of_host = FunctionType((lambda s: s.masks).__code__, {'__name__': 'mmdet.models'})
    text = said_of(lambda: of_host(InstanceData()))
    assert text.startswith('the samples have no masks, which the model learns\n')
    of_host = FunctionType((lambda s: s.gt_label).__code__, {'__name__': 'mmpretrain.models'})
    assert said_of(lambda: of_host(InstanceData())).endswith('or gt_label in a JSON file')
    of_host = FunctionType((lambda data: data['inputs']).__code__, {'__name__': 'mmdet.models'})
    text = said_of(lambda: of_host(dict(img=[], gt_bboxes=[])))
    assert re.match(r"the samples have no 'inputs'\n  they have img, gt_bboxes\n.*PackDetInp", text)
    of_host = FunctionType((lambda meta: meta['img_id']).__code__, {'__name__': 'mmdet.evaluation'})
    assert 'name it in meta_keys' in said_of(lambda: of_host(dict(img_path='a', ori_shape=(1, 1))))
    assert said_of(lambda: of_host(dict(scores=[]))) is None
    of_host = FunctionType(
        (lambda s: s['gt_label']).__code__, {'__name__': 'mmpretrain.evaluation'}
    )
    assert 'tools/infer.py needs none' in said_of(lambda: of_host(dict(img_path='a')))
    pytest.importorskip('mmdet', reason='its transform')
    from mmdet.datasets.transforms import Mosaic

    text = said_of(lambda: Mosaic(prob=1).transform(dict(mix_results=[{}] * 3)))
    assert text.startswith("Mosaic needs 'img', which no step of the pipeline before it gives")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Identity()
        self.head.num_classes = 3

    def forward(self, data_samples):
        raise IndexError('Target is out of bounds.')


@pytest.mark.parametrize(
    'sample, words',
    [
        (segmented(torch.zeros(1, 2, 3)), 'the mask a.png is 3 x 2, and its image 6 x 4'),
        (segmented(torch.full((1, 4, 6), 7)), 'a.png holds the label 7, and the config has 3'),
        (labelled(3), 'the label of a.jpg is 3, and the model has 3 classes'),
        (labelled(-1), 'the label of a.jpg is -1'),
        (segmented(torch.full((1, 4, 6), 255)), None),
        (segmented(torch.zeros(1, 8, 8), img_shape=(8, 8)), None),
        (labelled(2), None),
    ],
)
def test_a_sample_that_does_not_fit_is_named(sample, words):
    text = said_of(lambda: Model()([labelled(0), sample]))
    assert (text is None) if words is None else text.startswith(words)
    assert words is None or text.endswith('it ended in IndexError: Target is out of bounds.')
