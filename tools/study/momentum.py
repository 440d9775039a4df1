"""Compares schedules of the estimates' rate: small segmenters from scratch, several seeds."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.estimates import layers_of, rate_of_step
from wsbcn_mm.openmmlab.files import write_atomically
from wsbcn_mm.recalibration import recalibrate

SIZE = 96
# name: rate of one image, warm-up, tied to the learning rate, images per step, scaled with them
POLICIES = {
    'constant 0.1': (0.1, False, False, 1, True),
    'constant 0.03': (0.03, False, False, 1, True),
    'constant 0.01': (0.01, False, False, 1, True),
    'constant 0.003': (0.003, False, False, 1, True),
    'warm-up 0.03': (0.03, True, False, 1, True),
    'warm-up 0.01': (0.01, True, False, 1, True),
    'warm-up 0.003': (0.003, True, False, 1, True),
    'warm-up, lr 0.1': (0.1, True, True, 1, True),
    'warm-up, lr 0.03': (0.03, True, True, 1, True),
    'warm-up, lr 0.01': (0.01, True, True, 1, True),
    '4 images, 0.01 per step': (0.01, True, False, 4, False),
    '4 images, 0.01 per image': (0.01, True, False, 4, True),
}


def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """WS convolution, BCN, ReLU."""
    return nn.Sequential(
        WSConv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False),
        BatchChannelNorm2d(outputs, 8),
        nn.ReLU(inplace=True),
    )


class Segmenter(nn.Module):
    """Ten blocks, stride 4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 16, 2), block(16, 32, 2))
        self.body = nn.ModuleList(
            nn.Sequential(block(32, 32, 1, d), block(32, 32, 1, d)) for d in (1, 2, 4, 2)
        )
        self.head = nn.Conv2d(32, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes, H, W)."""
        size, x = x.shape[-2:], self.stem(x)
        for part in self.body:
            x = x + part(x)
        return F.interpolate(self.head(x), size=size, mode='bilinear', align_corners=False)


def drawn(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images and class maps of the embedded dataset."""
    from wsbcn_mm import shapes

    images, labels = [], []
    for i in range(count):
        image, instances = shapes.draw_image(split, i, (SIZE, SIZE))
        label = np.zeros((SIZE, SIZE), np.int64)
        for class_id, mask in instances:
            label[mask.astype(bool)] = class_id + 1
        images.append(image)
        labels.append(label)
    return pack(images, labels)


def coco(root: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images and foreground maps of a folder with COCO annotations, resized."""
    import cv2
    from pycocotools.coco import COCO

    data = COCO(root / f'{split}.json')
    images, labels = [], []
    for i in sorted(data.imgs)[:count]:
        info = data.imgs[i]
        bgr = cv2.imread(str(root / 'images' / Path(info['file_name']).name))
        assert bgr is not None, info['file_name']
        image = bgr[..., ::-1]
        label = np.zeros(image.shape[:2], np.uint8)
        for annotation in data.imgToAnns[i]:
            label |= data.annToMask(annotation)
        images.append(cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
        labels.append(cv2.resize(label, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST))
    return pack(images, labels)


def pack(images: list, labels: list) -> tuple[Tensor, Tensor]:
    """As tensors; images in about [-2, 2]."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return (x - 115) / 60, torch.from_numpy(np.stack(labels)).long()


def mean_iou(model: nn.Module, data: tuple[Tensor, Tensor], classes: int) -> float:
    """In evaluation mode, over the classes."""
    model.eval()
    matrix = torch.zeros(classes, classes)
    with torch.no_grad():
        for x, label in zip(*data):
            predicted = model(x[None]).argmax(1)[0]
            pairs = torch.bincount((label * classes + predicted).flatten(), minlength=classes**2)
            matrix += pairs.view(classes, classes)
    hits = matrix.diag()
    union = matrix.sum(0) + matrix.sum(1) - hits
    model.train()
    return float((hits / union.clamp_min(1)).mean())


def run(policy: str, seed: int, train: tuple, val: tuple, images: int) -> dict:
    """Trains one model over so many images; its scores in percent."""
    rate, warmup, tied, per_step, scaled = POLICIES[policy]
    classes = int(train[1].max()) + 1
    torch.manual_seed(seed)
    model, g = Segmenter(classes), torch.Generator().manual_seed(seed)
    lr = 0.02 * per_step**0.5
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    layers, steps, losses = list(layers_of(model).values()), images // per_step, []
    for step in range(steps):
        ratio = (1 - step / steps) ** 0.9
        for group in optimizer.param_groups:
            group['lr'] = lr * ratio * min(1.0, (step + 1) / 50)
        r = rate_of_step(
            rate, per_step if scaled else 1, step if warmup else None, ratio if tied else 1.0
        )
        for layer in layers:
            layer.momentum = r
        pick = torch.randint(len(train[0]), (per_step,), generator=g)
        x, label = train[0][pick], train[1][pick]
        if torch.rand((), generator=g) < 0.5:
            x, label = x.flip(3), label.flip(2)
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        losses.append(loss.item())
    score = mean_iou(model, val, classes)
    recalibrate(model, train[0][:100].split(1), passes=2)
    anew = mean_iou(model, val, classes)
    return dict(
        policy=policy,
        seed=seed,
        miou=100 * score,
        recalibrated=100 * anew,
        loss=statistics.mean(losses[-len(losses) // 5 :]),
    )


def table(results: list[dict], title: str) -> str:
    """Markdown: a line per policy, mean and standard deviation over the seeds."""
    lines = [
        f'| {title} | val mIoU % | by seed | with statistics measured anew | training loss |',
        '|---|---|---|---|---|',
    ]
    for policy in POLICIES:
        rows = [r for r in results if r['policy'] == policy]
        if not rows:
            continue
        scores = [r['miou'] for r in rows]
        spread = f' ± {statistics.stdev(scores):.1f}' if len(rows) > 1 else ''
        lines.append(
            f'| {policy} | {statistics.mean(scores):.1f}{spread} | '
            + ', '.join(f'{s:.1f}' for s in scores)
            + f' | {statistics.mean(r["recalibrated"] for r in rows):.1f} | '
            f'{statistics.mean(r["loss"] for r in rows):.3f} |'
        )
    return '\n'.join(lines)


def main() -> None:
    """Runs what is missing, so that it can be interrupted; prints tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='JSON file; what stands in it is not run again')
    parser.add_argument('--coco', type=Path, help='a folder with images/, train.json and val.json')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--images', type=int, default=800, help='images seen per run')
    parser.add_argument('--policies', nargs='+', choices=POLICIES, default=list(POLICIES))
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after this')
    args = parser.parse_args()
    name = args.coco.name if args.coco else 'drawn'
    load = (lambda s, n: coco(args.coco, s, n)) if args.coco else drawn
    train, val = load('train', 300), load('val', 60)
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    results = found.setdefault(f'{name}, {args.images} images', [])
    start = time.monotonic()
    for seed in range(args.seeds):
        for policy in args.policies:
            if any((r['policy'], r['seed']) == (policy, seed) for r in results):
                continue
            if time.monotonic() - start > args.seconds:
                print('stopped; run again to go on')
                return
            results.append(run(policy, seed, train, val, args.images))
            write_atomically(args.out, json.dumps(found, indent=1).encode())
            print(json.dumps(results[-1]), flush=True)
    print(table(results, name))


if __name__ == '__main__':
    main()
