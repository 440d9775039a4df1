"""Small tasks that a CPU trains from scratch in seconds: digits and semantic segmentation.

A task holds its data in memory and gives batches of it; what is done to an image depends on the
seed, the epoch and the image alone, so that every row and column of the grid sees the same images.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.registry import MODELS
from PIL import Image
from torch import Tensor, nn

from experiments.other_norms import give_activations
from wsbcn_mm import shapes

VOID = 255


class Task:
    """What a task must offer.

    Attributes:
        metric: The name of what `evaluate` returns, in [0, 1], more is better.
        num_train: Images of an epoch.
        classes: Number of classes.
    """

    metric: str
    num_train: int
    classes: int

    def build(self, norm: dict, conv: dict | None, head: dict | None = None) -> nn.Module:
        """A model from scratch: images (N, C, H, W) to logits, with these norm and conv.

        Args:
            norm: Of all layers.
            conv: Of all layers.
            head: ``norm`` and ``conv`` of the head, where the backbone has others.
        """
        raise NotImplementedError

    def train_batch(self, indices: list[int], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images and targets."""
        raise NotImplementedError

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The training loss of a batch, the mean over its images."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, split: str) -> float:
        """The metric on ``'val'`` (which chooses) or ``'test'`` (which reports)."""
        raise NotImplementedError


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class Block(nn.Module):
    """The basic block of a ResNet for small images."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: dict, conv: dict | None):
        super().__init__()
        layers = dict(norm_cfg=norm, conv_cfg=conv)
        self.conv1 = ConvModule(inputs, outputs, 3, stride, 1, **layers)
        self.conv2 = ConvModule(outputs, outputs, 3, 1, 1, act_cfg=None, **layers)
        self.skip = nn.Identity()
        if inputs != outputs or stride != 1:
            self.skip = ConvModule(inputs, outputs, 1, stride, act_cfg=None, **layers)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.skip(x) + self.conv2(self.conv1(x)))


class Digits(Task):
    """scikit-learn's digits (8x8, 10 classes), enlarged to 16x16; a ResNet-20-like network.

    Args:
        blocks: Blocks per stage; 3 is the depth of ResNet-20.
        width: Channels of the first stage; 2 and 4 times as many in the others.
        num_train: Training images.
    """

    metric = 'accuracy'
    classes = 10

    def __init__(self, blocks: int = 3, width: int = 16, num_train: int = 800) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        images = F.interpolate(images, scale_factor=2, mode='bilinear')
        # Writers follow one another in the file: a fixed shuffle gives each split all of them.
        order = np.random.default_rng(0).permutation(len(images))
        ends = [num_train, num_train + 400, len(images)]
        if not 8 <= num_train <= len(images) - 600:
            raise ValueError(f'num_train must lie in [8, {len(images) - 600}]\n  got {num_train}')
        parts = [order[a:b] for a, b in zip([0, *ends], ends)]
        labels = torch.tensor(digits.target)
        self._data = {
            name: (images[part], labels[part])
            for name, part in zip(('train', 'val', 'test'), parts)
        }
        self.num_train, self._blocks, self._width = num_train, blocks, width

    def build(self, norm: dict, conv: dict | None, head: dict | None = None) -> nn.Module:
        assert head is None
        stages, inputs = [], self._width
        for stage in range(3):
            outputs = self._width * 2**stage
            for block in range(self._blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Block(inputs, outputs, stride, norm, conv))
                inputs = outputs
        stem = ConvModule(1, self._width, 3, 1, 1, norm_cfg=norm, conv_cfg=conv)
        last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, self.classes)]
        return give_activations(nn.Sequential(stem, *stages, *last))

    def train_batch(self, indices: list[int], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        images, labels = self._data['train']
        shifts = rng.integers(-2, 3, (len(indices), 2)).tolist()
        batch = [images[i].roll(s, (1, 2)) for i, s in zip(indices, shifts)]
        return torch.stack(batch), labels[indices]

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(images), targets)

    def evaluate(self, model: nn.Module, split: str) -> float:
        images, labels = self._data[split]
        with torch.no_grad():
            right = model(images.to(_device(model))).argmax(1).cpu() == labels
        return right.double().mean().item()


def backbone(norm: dict, conv: dict | None, width: int, depth: int = 18) -> Any:
    """ResNet of mmseg without its last stage, stride 8; 18: 4 x ``width`` channels, 50: 16 x."""
    return MODELS.build(
        dict(
            type='mmseg.ResNet',
            depth=depth,
            stem_channels=2 * width,
            base_channels=width,
            num_stages=3,
            strides=(1, 2, 1),
            dilations=(1, 1, 2),
            out_indices=(2,),
            norm_eval=False,
            init_cfg=None,
            norm_cfg=norm,
            conv_cfg=conv,
        )
    )


class DeepLabV3(nn.Module):
    """mmseg's ResNet and ASPP head, small; the loss is taken at the head's resolution times 8.

    BatchNorm and InstanceNorm cannot train behind ASPP's image pooling at one image (one value per
    channel): there, and at every number of images, that branch has a plain convolution and no norm.
    """

    def __init__(
        self,
        norm: dict,
        conv: dict | None,
        classes: int,
        width: int,
        head: int,
        of_head: dict | None = None,
        depth: int = 18,
    ) -> None:
        super().__init__()
        self.backbone = backbone(norm, conv, width, depth)
        inputs = 4 * width * (4 if depth >= 50 else 1)
        of_head = of_head or dict(norm=norm, conv=conv)
        self.head = MODELS.build(
            dict(
                type='mmseg.ASPPHead',
                in_channels=inputs,
                in_index=0,
                channels=head,
                dilations=(1, 3, 6, 9),
                num_classes=classes,
                dropout_ratio=0,
                align_corners=False,
                loss_decode=dict(type='mmseg.CrossEntropyLoss'),
                norm_cfg=of_head['norm'],
                conv_cfg=of_head['conv'],
            )
        )
        if of_head['norm']['type'] in ('BN', 'IN'):
            self.head.image_pool[1] = ConvModule(inputs, head, 1)
        self.backbone.init_weights()
        self.head.init_weights()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Segmentation(Task):
    """Semantic segmentation with a small DeepLabV3; mIoU over the classes that occur.

    Args:
        splits: Lists of (image, mask) files: train, val, test.
        classes: Number of classes; `VOID` is left out.
        size: (width, height) to which every image is shrunk.
        crop: Side of the square that a training step sees.
        width: Channels of the backbone's first stage.
        head: Channels of the head.
        depth: 18 or 50.
    """

    metric = 'mIoU'

    def __init__(
        self,
        splits: dict[str, list[tuple[Path, Path]]],
        classes: int,
        size: tuple[int, int],
        crop: int,
        width: int,
        head: int,
        depth: int = 18,
    ) -> None:
        self._data = {name: [_load(*pair, size) for pair in s] for name, s in splits.items()}
        every = np.stack([image.reshape(-1, 3) for image, _ in self._data['train'][::8]])
        self._mean = torch.tensor(every.mean((0, 1)), dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(every.std((0, 1)), dtype=torch.float32).view(3, 1, 1)
        self.num_train, self.classes = len(self._data['train']), classes
        self._crop, self._width, self._head, self._depth = crop, width, head, depth

    def build(self, norm: dict, conv: dict | None, head: dict | None = None) -> nn.Module:
        return DeepLabV3(
            norm, conv, self.classes, self._width, self._head, of_head=head, depth=self._depth
        )

    def _tensor(self, images: list[np.ndarray]) -> Tensor:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous()
        return (batch - self._mean) / self._std

    def train_batch(self, indices: list[int], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        images, masks = [], []
        for image, mask in (self._data['train'][i] for i in indices):
            height, width = mask.shape
            size = min(self._crop, height, width)
            top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
            step = -1 if rng.integers(2) else 1
            images.append(image[top : top + size, left : left + size][:, ::step])
            masks.append(mask[top : top + size, left : left + size][:, ::step])
        return self._tensor(images), torch.from_numpy(np.stack(masks)).long()

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        logits = F.interpolate(model(images), targets.shape[1:], mode='bilinear')
        return F.cross_entropy(logits, targets, ignore_index=VOID)

    def evaluate(self, model: nn.Module, split: str) -> float:
        confusion = torch.zeros(self.classes * self.classes, dtype=torch.long)
        for image, mask in self._data[split]:
            target = torch.from_numpy(mask).long()
            with torch.no_grad():
                logits = model(self._tensor([image]).to(_device(model))).cpu()
                logits = F.interpolate(logits, target.shape, mode='bilinear')
            known = target != VOID
            pairs = target[known] * self.classes + logits[0].argmax(0)[known]
            confusion += torch.bincount(pairs, minlength=len(confusion))
        table = confusion.view(self.classes, self.classes).double()
        right, union = table.diag(), table.sum(0) + table.sum(1) - table.diag()
        return (right / union)[table.sum(1) > 0].mean().item()


def _load(image: Path, mask: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    pixels = Image.open(image).convert('RGB').resize(size, Image.Resampling.BILINEAR)
    labels = Image.open(mask).resize(size, Image.Resampling.NEAREST)
    return np.asarray(pixels), np.asarray(labels)


def _voc_files(root: Path, split: str, every: int) -> list[tuple[Path, Path]]:
    names = (root / 'ImageSets' / 'Segmentation' / f'{split}.txt').read_text().split()[::every]
    return [(root / f'JPEGImages/{n}.jpg', root / f'SegmentationClass/{n}.png') for n in names]


class CamVid(Segmentation):
    """CamVid (11 classes, published split, VOC layout) at a third of 480x360.

    Frames of a drive follow one another: every third of val and every fourth of test is used.

    Args:
        root: The folder with ImageSets, JPEGImages and SegmentationClass.
        num_train: Training frames, evenly taken; None: all.
    """

    def __init__(
        self, root: str, size=(160, 120), crop=96, width=32, head=48, num_train=None, depth=18
    ):
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f'CamVid in VOC layout is expected at {folder}')
        splits = dict(
            train=_voc_files(folder, 'train', 1),
            val=_voc_files(folder, 'val', 3),
            test=_voc_files(folder, 'test', 4),
        )
        if num_train is not None:
            splits['train'] = splits['train'][:: len(splits['train']) // num_train][:num_train]
        super().__init__(splits, 11, tuple(size), crop, width, head, depth)


class Shapes(Segmentation):
    """The embedded drawn set as segmentation: five shapes and the background.

    There is no test split: the validation images are halved, the first half chooses.
    """

    def __init__(
        self,
        root='data/shapes',
        size=(96, 80),
        crop=80,
        width=32,
        head=48,
        num_train=360,
        depth=18,
    ):
        shapes.draw_dataset(root)
        root = Path(root) / 'VOCdevkit' / 'VOC2012'
        val = _voc_files(root, 'val', 1)
        splits = dict(
            train=_voc_files(root, 'train', 1)[:num_train],
            val=val[: len(val) // 2],
            test=val[len(val) // 2 :],
        )
        super().__init__(splits, 1 + len(shapes.CLASSES), tuple(size), crop, width, head, depth)


class Classifier(nn.Module):
    """The backbone of `DeepLabV3`, average pooling and a linear layer."""

    def __init__(self, norm: dict, conv: dict | None, classes: int, width: int) -> None:
        super().__init__()
        self.backbone = backbone(norm, conv, width)
        self.backbone.init_weights()
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[0].mean((2, 3)))


class Cifar(Task):
    """CIFAR-10 as folders of images, a folder for each class; crops of padded images, flips.

    Args:
        root: Has ``train``, ``val`` and ``test``.
        width: Channels of the backbone's first stage.
        num_train: Training images, the first of each class; None: all.
    """

    metric = 'accuracy'

    def __init__(self, root: str, width: int = 16, num_train: int | None = None) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f'CIFAR-10 as folders of images is expected at {folder}')
        names = sorted(path.name for path in (folder / 'train').iterdir())
        self._data = {}
        for split in ('train', 'val', 'test'):
            count = num_train // len(names) if num_train and split == 'train' else None
            files = [
                (file, label)
                for label, name in enumerate(names)
                for file in sorted((folder / split / name).iterdir())[:count]
            ]
            pixels = np.stack([np.asarray(Image.open(file).convert('RGB')) for file, _ in files])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
            self._data[split] = images, torch.tensor([label for _, label in files])
        every = self._data['train'][0][::8].float()
        self._mean, self._std = (f((0, 2, 3)).view(3, 1, 1) for f in (every.mean, every.std))
        self.num_train, self.classes = len(self._data['train'][0]), len(names)
        self._width = width

    def build(self, norm: dict, conv: dict | None, head: dict | None = None) -> nn.Module:
        assert head is None
        return Classifier(norm, conv, self.classes, self._width)

    def train_batch(self, indices: list[int], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        images, labels = self._data['train']
        side = images.shape[-1]
        batch = F.pad((images[indices].float() - self._mean) / self._std, (4, 4, 4, 4))
        crops = []
        for image in batch:
            top, left = rng.integers(0, 9, 2)
            crop = image[:, top : top + side, left : left + side]
            crops.append(crop.flip(2) if rng.integers(2) else crop)
        return torch.stack(crops), labels[indices]

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(images), targets)

    def evaluate(self, model: nn.Module, split: str) -> float:
        images, labels = self._data[split]
        right = 0
        with torch.no_grad():
            for start in range(0, len(images), 100):
                batch = (images[start : start + 100].float() - self._mean) / self._std
                found = model(batch.to(_device(model))).argmax(1).cpu()
                right += (found == labels[start : start + 100]).sum().item()
        return right / len(images)


TASKS = {'digits': Digits, 'camvid': CamVid, 'shapes': Shapes, 'cifar': Cifar}


@functools.lru_cache(maxsize=4)
def _make(name: str, arguments: tuple) -> Task:
    return TASKS[name](**dict(arguments))


def make(name: str, arguments: dict) -> Task:
    """A task by name, made once: its data stay in memory."""
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return _make(name, tuple(sorted(hashable.items())))
