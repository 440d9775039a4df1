"""Training under torch.compile with images of many sizes: the results of eager code, few graphs?

The two quick configs, Mask R-CNN and DeepLabV3, forward and backward pass with all losses, one
image of another size each step. Both models start each step from the same state, and draw the same
random numbers. Printed: how far losses, gradients and running statistics lie apart, and how many
graphs each step compiled: the first few sizes make them, the others must not.
"""

import argparse
import copy
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from wsbcn_mm import standardize_once_per_forward
from wsbcn_mm.openmmlab.config import use_scope

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'quick'
CONFIGS = {
    'mmdet': 'quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py',
    'mmseg': 'quick_deeplabv3_r18_ws-bcn_1xb1_shapes.py',
}


def instances(height: int, width: int, rng: np.random.Generator) -> DetDataSample:
    """Up to four objects: the number of RoIs changes too."""
    count = int(rng.integers(0, 5))
    corner = rng.uniform(0, 0.5, (count, 2)) * (width, height)
    size = rng.uniform(0.2, 0.5, (count, 2)) * (width, height)
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    masks = np.zeros((count, height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
    sample.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(rng.integers(0, 5, count)),
        masks=BitmapMasks(masks, height, width),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    return sample


def classes(height: int, width: int, rng: np.random.Generator) -> SegDataSample:
    """A class for each pixel, in blocks."""
    blocks = torch.from_numpy(rng.integers(0, 6, (1, height // 8 + 1, width // 8 + 1)))
    pixels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width]
    sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
    sample.gt_sem_seg = PixelData(data=pixels)
    return sample


def build(scope: str) -> nn.Module:
    """The model of a quick config, as it begins."""
    cfg = Config.fromfile(CONFIG_FOLDER / CONFIGS[scope])
    use_scope(cfg)
    if scope == 'mmseg':  # images of all sizes
        cfg.model.data_preprocessor.update(size=None, size_divisor=8)
    torch.manual_seed(0)
    model: nn.Module = MODELS.build(cfg.model)
    model.init_weights()  # type: ignore[operator]
    return model.train()


def step(model: Any, run: Any, data: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Losses, gradients and running statistics after one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    inputs = model.data_preprocessor(copy.deepcopy(data), True)
    loss, losses = model.parse_losses(run(**inputs, mode='loss'))
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**losses, **gradients, **dict(model.named_buffers())}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, in units of the largest number of its tensor."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        if value.is_floating_point():
            scale = value.abs().max().clamp_min(1e-3)
            worst = max(worst, ((found[name] - value).abs().max() / scale).item())
        else:
            assert torch.equal(found[name], value), name
    return worst


def compare(scope: str, sizes: int, backend: str, scopes: bool) -> bool:
    """Trains; prints a line per step. Whether all was equal and the graphs stayed few."""
    eager, other = build(scope), build(scope)
    if scopes:
        standardize_once_per_forward(eager)
        standardize_once_per_forward(other)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(other.forward, backend=backend)
    rng = np.random.default_rng(0)
    worst, graphs = 0.0, [0]
    for i in range(sizes):
        height, width = (int(n) for n in rng.integers(64, 160, 2))
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        make = instances if scope == 'mmdet' else classes
        data = dict(inputs=[image], data_samples=[make(height, width, rng)])
        other.load_state_dict(eager.state_dict())
        expected = step(eager, eager, data, i)
        worst = max(worst, difference := apart(step(other, compiled, data, i), expected))
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
        print(
            f'{scope} {height:>3}x{width:<3} apart {difference:.1e}, graphs {graphs[-1]:>3} '
            f'(+{graphs[-1] - graphs[-2]})',
            flush=True,
        )
        with torch.no_grad():
            for parameter in eager.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.002)
    late = graphs[-1] - graphs[len(graphs) // 2]
    print(f'{scope}: apart {worst:.1e}; {graphs[-1]} graphs, {late} of them in the second half')
    return worst < 1e-3 and late <= graphs[-1] // 10


def main() -> int:
    """0 if both models train the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--sizes', type=int, default=24)
    parser.add_argument('--backend', default='aot_eager', help='of torch.compile')
    parser.add_argument('--models', nargs='+', choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument('--scopes', action='store_true', help='standardize once per forward pass')
    args = parser.parse_args()
    logging.disable(logging.INFO)
    done = [compare(scope, args.sizes, args.backend, args.scopes) for scope in args.models]
    return 0 if all(done) else 1


if __name__ == '__main__':
    sys.exit(main())
