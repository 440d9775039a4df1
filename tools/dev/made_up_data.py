"""What a data loader would give a model: random inputs, annotations of every kind.

Boxes, masks, classes of pixels, edges, labels, views of an image, skeletons, sound: a model takes
those that it knows.
"""

import copy
import importlib
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from wsbcn_mm.openmmlab.config import dicts_in, find_scope, type_name
from wsbcn_mm.openmmlab.deploy import clips

JOINTS = {'nturgb+d': 25, 'coco': 17, 'openpose': 18}  # of MMAction2's skeletons


def batch(cfg: Config, images: int, size: int) -> dict[str, Any]:
    """A batch of random images, clips or the like.

    Args:
        cfg: The config.
        images: How many.
        size: Pixels of their sides; people that are to be known again are half as wide as high.
    """
    scope = find_scope(cfg)
    channels = (cfg.model.get('backbone') or {}).get('in_channels', 3)
    shape = (channels, size, size // 2 if is_of_people(cfg) else size)
    generator = torch.Generator().manual_seed(0)
    inputs: Any = [
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in range(images)
    ]
    if scope == 'mmaction':
        inputs = [_clip(cfg, image) for image in inputs]
        samples = [_action(cfg, size) for _ in range(images)]
    elif scope == 'mmpretrain':
        inputs = _views(cfg, inputs)
        samples = [_label(scope) for _ in range(images)]
    elif is_of_people(cfg):
        inputs = torch.stack(inputs)
        samples = [_label('mmdet', i % 2) for i in range(images)]  # a loss wants two people
    elif scope == 'mmdet':
        stride, masks = _stride_of_classes(cfg), _has_masks(cfg)
        samples = [_detection(size, stride, masks) for _ in range(images)]
        for sample in samples if 'rpn_head' in cfg.model else []:
            del sample.proposals  # it makes its own, which may hold more
        if _is_tracker(cfg):  # two frames of each video, which are the same
            inputs = [torch.stack([image, image]) for image in inputs]
            samples = [_video(sample) for sample in samples]
    else:
        samples = [_segmentation(size) for _ in range(images)]
    return dict(inputs=inputs, data_samples=samples)


def training_batch(cfg: Config, images: int, size: int) -> dict[str, Any]:
    """As `batch`, for a step: a model that learns from unlabelled images as well gets both."""
    data = batch(cfg, images, size)
    preprocessor = cfg.model.get('data_preprocessor') or {}
    if type_name(preprocessor) != 'MultiBranchDataPreprocessor':
        return data
    branches = ('sup', 'unsup_teacher', 'unsup_student')
    return {key: {branch: copy.deepcopy(data[key]) for branch in branches} for key in data}


# ---- inputs ------------------------------------------------------------------------------------


def _clip(cfg: Config, image: Tensor) -> Tensor:
    """What MMAction2 makes of frames, of joints, of sound."""
    kind = type_name(cfg.model)
    if kind == 'RecognizerGCN':  # (clips, persons, frames, joints, coordinates)
        layout = cfg.model.backbone.graph_cfg.layout
        return torch.rand(1, 2, 16, JOINTS[layout], image.shape[0])
    if kind == 'RecognizerAudio':  # (clips, channels, time, frequencies)
        return torch.rand(1, 1, image.shape[-1], 80)
    if kind == 'Recognizer3D' and clips.is_2d(cfg):  # of heatmaps, whose format the model lacks
        return image[None, :, None].repeat(1, 1, clips.DEFAULT_FRAMES, 1, 1)
    clip = clips.inputs_of(cfg, image.permute(1, 2, 0).numpy())
    return clip[0] if _boxes_of_actions(cfg) else clip  # its detectors take one clip alone


def _views(cfg: Config, images: list[Tensor]) -> Any:
    """What MMPretrain's collate function makes of images: one batch, or one for each view."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if type_name(preprocessor) != 'SelfSupDataPreprocessor':
        return images
    views = [step['num_views'] for step in _pipeline(cfg) if type_name(step) == 'MultiView']
    if not views:
        return torch.stack(images)
    count = sum(views[0]) if isinstance(views[0], (list, tuple)) else views[0]
    return [torch.stack([image.roll(shift, -1) for image in images]) for shift in range(count)]


# ---- annotations -------------------------------------------------------------------------------


def _meta(size: int) -> dict[str, Any]:
    shape = (size, size)
    return dict(
        img_id=0,
        img_path='',
        img_shape=shape,
        ori_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
        flip=False,
        flip_direction=None,
        border=[0, size, 0, size],  # of CornerNet's kin
        homography_matrix=np.eye(3, dtype=np.float32),  # of a student's image and its teacher's
    )


def _pixels(size: int) -> Tensor:
    """Two classes: one above, one below."""
    classes = torch.zeros(1, size, size, dtype=torch.long)
    classes[:, size // 2 :] = 1
    return classes


def _stride_of_classes(cfg: Config) -> int:
    """Pixels of the image per pixel of the map of classes, where a detector learns one."""
    scales = [s['scale_factor'] for s in _pipeline(cfg) if type_name(s) == 'SegRescale']
    return round(1 / scales[0]) if scales else 1


def _has_masks(cfg: Config) -> bool:
    """Whether the training data have masks: some losses change where they are there."""
    return any(s.get('with_mask') or 'Panoptic' in type_name(s) for s in _pipeline(cfg))


def _pipeline(cfg: Config) -> list[dict[str, Any]]:
    return list(dicts_in((cfg.get('train_dataloader') or {}).get('dataset') or {}))


def _boxes(size: int) -> Tensor:
    return torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.5, 0.9, 0.9]]) * size


def _detection(size: int, stride: int, with_masks: bool) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = _boxes(size)
    masks = np.zeros((2, size, size), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    sample = DetDataSample(metainfo=_meta(size))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(2, dtype=torch.long))
    if with_masks:
        sample.gt_instances.masks = BitmapMasks(masks, size, size)
    sample.ignored_instances = InstanceData(bboxes=boxes[:0])
    sample.proposals = InstanceData(bboxes=boxes)
    sample.gt_sem_seg = PixelData(sem_seg=_pixels(size)[:, ::stride, ::stride].byte())
    return sample


def _is_tracker(cfg: Config) -> bool:
    """Whether a detector takes frames of videos."""
    preprocessor = cfg.model.get('data_preprocessor') or {}
    frames = type_name(preprocessor) == 'TrackDataPreprocessor'
    return frames and not preprocessor.get('use_det_processor')


def _video(sample: Any) -> Any:
    """A key frame and a reference, of the same objects."""
    from mmdet.structures import TrackDataSample

    frames = [copy.deepcopy(sample) for _ in range(2)]
    for number, frame in enumerate(frames):
        frame.gt_instances.instances_ids = torch.arange(len(frame.gt_instances))
        frame.set_metainfo(dict(frame_id=number, ori_video_length=2, video_length=2))
    video = TrackDataSample(metainfo=dict(key_frames_inds=[0], ref_frames_inds=[1]))
    video.video_data_samples = frames
    return video


def is_of_people(cfg: Config) -> bool:
    """Whether a model tells people apart (MMDetection's trackers): images twice as high as wide."""
    return type_name(cfg.model) == 'BaseReID'


def _boxes_of_actions(cfg: Config) -> bool:
    """Whether a model of MMAction2 says who does what: a detector for given boxes."""
    return 'roi_head' in cfg.model


def _action(cfg: Config, size: int) -> Any:
    sample = _label('mmaction')
    if _boxes_of_actions(cfg):
        boxes, classes = _boxes(size), cfg.model.roi_head.bbox_head.num_classes
        labels = torch.zeros(2, classes)
        labels[:, 1] = 1
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        sample.proposals = InstanceData(bboxes=boxes)
        sample.set_metainfo(dict(img_shape=(size, size), img_key='0,0000'))
    return sample


def _label(scope: str, label: int = 1) -> Any:
    kinds = dict(mmaction='ActionDataSample', mmdet='ReIDDataSample', mmpretrain='DataSample')
    kind = kinds[scope]
    return getattr(importlib.import_module(f'{scope}.structures'), kind)().set_gt_label(label)


def _segmentation(size: int) -> Any:
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_meta(size))
    sample.gt_sem_seg = PixelData(data=_pixels(size))
    sample.gt_edge_map = PixelData(data=_pixels(size).byte())
    sample.gt_depth_map = PixelData(data=_pixels(size).float() + 1)
    return sample
