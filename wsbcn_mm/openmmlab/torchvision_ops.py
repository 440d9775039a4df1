"""mmcv's compiled operators out of torchvision: NMS and RoIAlign, without which no detector goes.

Compiling mmcv's own takes ten minutes and, for a GPU, the CUDA compiler. With
``WSBCN_MMCV_OPS=torchvision`` in the environment this module stands where mmcv looks for them. Any
other operator (deformable convolution, soft NMS, rotated boxes ...) is refused by name when it is
used.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

VARIABLE = 'WSBCN_MMCV_OPS'
CHOICES = ('mmcv', 'torchvision')


def apply() -> None:
    """Puts the operators in place where the environment asks for them.

    Raises:
        ValueError: it asks for something else.
        ImportError: torchvision cannot be used, or mmcv has loaded its own operators already.
    """
    choice = os.environ.get(VARIABLE) or 'mmcv'
    if choice not in CHOICES:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(CHOICES)}\n  got {choice!r}')
    if choice == 'mmcv' or in_use():
        return
    if 'mmcv.ops' in sys.modules:
        raise ImportError(
            f'{VARIABLE}=torchvision: mmcv.ops was imported before wsbcn_mm\n'
            '  import wsbcn_mm first'
        )
    try:
        importlib.import_module('torchvision')
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: built for another torch
        raise ImportError(
            f'{VARIABLE}=torchvision: torchvision cannot be imported: {error}\n  pip install the '
            f'torchvision that belongs to torch {torch.__version__}, from the same index'
        ) from error
    import mmcv

    operators = Operators('mmcv._ext')
    operators.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)  # find_spec asks for it
    sys.modules['mmcv._ext'] = operators
    mmcv._ext = operators


def in_use() -> bool:
    """Whether mmcv's operators are torchvision's."""
    return isinstance(sys.modules.get('mmcv._ext'), Operators)


class Operators(ModuleType):
    """What mmcv loads as its extension."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*_args: Any, **_kwargs: Any) -> None:
            raise RuntimeError(
                f'{name} is an operator of mmcv that torchvision has not\n'
                f'  build mmcv with its operators, and unset {VARIABLE}'
            )

        return missing

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        """Indices of the boxes that are kept, by descending score.

        Args:
            boxes: (N, 4), x1, y1, x2, y2.
            scores: (N,).
            iou_threshold: Boxes that overlap a better one by more than this are left out.
            offset: 0; 1, of mmdet 1.x, has sides one pixel longer.

        Raises:
            ValueError: an offset of 1.
        """
        if offset != 0:
            raise ValueError(
                f'nms(offset={offset}): torchvision has boxes without an offset only\n'
                f'  use offset=0, or build mmcv with its operators and unset {VARIABLE}'
            )
        kept: Tensor = torch.ops.torchvision.nms(boxes, scores, iou_threshold)
        return kept

    @staticmethod
    def roi_align_forward(
        input: Tensor, rois: Tensor, output: Tensor, *_argmax: Tensor, **settings: Any
    ) -> None:
        """RoIAlign into ``output``, (number of rois, C, aligned_height, aligned_width).

        bfloat16 is computed in float32: torchvision has no backward pass in it.

        Raises:
            ValueError: maximum pooling.
        """
        size, samples = _arguments(settings)
        input = _computable(input)
        rois = rois.to(input.dtype)
        output.copy_(torch.ops.torchvision.roi_align(input, rois, *size, *samples))

    @staticmethod
    def roi_align_backward(
        grad: Tensor, rois: Tensor, _y: Tensor, _x: Tensor, grad_input: Tensor, **settings: Any
    ) -> None:
        """The gradient of `roi_align_forward` for its input, into ``grad_input``."""
        size, samples = _arguments(settings)
        grad = _computable(grad).contiguous()
        rois = rois.to(grad.dtype)
        shape = grad_input.shape
        backward = torch.ops.torchvision._roi_align_backward
        grad_input.copy_(backward(grad, rois, *size, *shape, *samples))


def _computable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _arguments(settings: dict[str, Any]) -> tuple[tuple[float, int, int], tuple[int, bool]]:
    """What torchvision takes, out of what mmcv gives: scale and size, samples and alignment."""
    if settings['pool_mode'] != 1:
        raise ValueError(
            "roi_align(pool_mode='max'): torchvision has 'avg' only\n"
            f'  build mmcv with its operators, and unset {VARIABLE}'
        )
    size = settings['spatial_scale'], settings['aligned_height'], settings['aligned_width']
    return size, (settings['sampling_ratio'] or -1, settings['aligned'])  # -1: one per pixel
