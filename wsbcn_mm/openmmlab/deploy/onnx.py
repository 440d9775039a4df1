"""ONNX files of a model's tensor parts, checked before they are trusted.

A graph is accepted when it has standard operators only, when the weight of every convolution is a
constant (a computed one is refused by TensorRT) and when onnxruntime gives what torch gives.
"""

import copy
import json
import logging
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from wsbcn_mm.openmmlab import config
from wsbcn_mm.openmmlab.deploy.classes import classes_of
from wsbcn_mm.openmmlab.deploy.parts import Part
from wsbcn_mm.openmmlab.errors import first_line

CONVS = ('Conv', 'ConvTranspose')
GROUP_NORM_OPSET = 21  # the first with GroupNormalization as torch defines it


class NotExportable(ValueError):
    """A graph that does not hold what it must."""


class _GroupNormInMeans(nn.Module):
    """GroupNorm of a (N, C, H, W) or (N, C, D, H, W) map with a mean per axis.

    One mean over a long row in float32, which is what onnxruntime's InstanceNormalization takes,
    loses a digit on large maps.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm, shape = self.norm, x.shape
        x = x.unflatten(1, (norm.num_groups, -1))
        x = x - self._mean(x)
        x = x * (self._mean(x * x) + norm.eps).rsqrt()
        x = x.reshape(shape)
        if norm.weight is None:
            return x
        ones = [1] * (len(shape) - 2)
        return x * norm.weight.view(-1, *ones) + norm.bias.view(-1, *ones)

    def _mean(self, x: Tensor) -> Tensor:
        for axis in range(x.ndim - 1, 1, -1):
            x = x.mean(axis, keepdim=True)
        return x


def _exportable(module: nn.Module, opset: int) -> nn.Module:
    """A copy for the exporter."""
    module = copy.deepcopy(module)
    if opset < GROUP_NORM_OPSET:
        for holder in list(module.modules()):
            for name, child in list(holder.named_children()):
                if type(child) is nn.GroupNorm:
                    setattr(holder, name, _GroupNormInMeans(child))
    module.eval()
    return module


def export_part(
    part: Part,
    path: str | Path,
    opset: int = 18,
    dynamic: bool = False,
    metadata: dict | None = None,
) -> None:
    """Writes one part as ONNX, with the exporter of torch (`torch.onnx.export`, dynamo).

    Args:
        part: From `wsbcn_mm.openmmlab.deploy.parts.tensor_parts`, of a folded model.
        path: The file.
        opset: Below 21 a GroupNorm is written out in means, which every runtime has, and which
            onnxruntime computes as exactly as torch; from 21 on it is one GroupNormalization,
            ten times less exact there.
        dynamic: Leave batch size, height and width open (not the frames of a clip). The number of
            RoIs always is.
        metadata: Written into the file, values as JSON; how to prepare an image, names of classes.

    Raises:
        NotExportable: torch's exporter cannot; the message names the layer.
    """
    import onnx

    auto, static, x = torch.export.Dim.AUTO, torch.export.Dim.STATIC, part.input
    shapes: tuple[Any, ...] | None
    if part.input_name == 'roi_features':
        shapes = ((auto, static, static, static),)
    else:
        shapes = ((auto, *[static] * (x.ndim - 3), auto, auto),) if dynamic else None
    if shapes and x.shape[0] == 1:
        x = torch.cat([x, x])  # torch takes a size of 1 for a constant
    # Torch's remarks about itself: deprecations, and torchvision, which is not used, is missing.
    logging.getLogger('torch.onnx._internal.exporter._registration').setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        try:
            program = torch.onnx.export(
                _exportable(part.module, opset),
                (x,),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=[part.input_name],
                output_names=part.outputs,
                dynamic_shapes=shapes,
            )
        except torch.onnx.OnnxExporterError as error:
            raise NotExportable(_why_not(part, error)) from error
    assert program is not None  # what the exporter of the dynamo kind returns
    onnx.save(with_metadata(program.model_proto, metadata or {}), str(path))


def _why_not(part: Part, error: Exception) -> str:
    """The layer at which torch's exporter stopped, and its reason."""
    cause = error.__cause__ or error
    layers = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(cause.__traceback__)]
    kinds = [type(layer) for layer in layers if isinstance(layer, nn.Module)]
    ours = [kind.__name__ for kind in kinds if not kind.__module__.startswith('torch.')]
    reason = first_line(cause)
    return (
        f"{part.name}: torch's exporter stops in {ours[-1] if ours else 'the network'}\n"
        f'  {type(cause).__name__}: {reason}\n'
        '  fold.py makes what the host runs without this package'
    )


def with_metadata(proto: Any, metadata: dict) -> Any:
    """The model with properties, values as JSON."""
    import onnx

    onnx.helper.set_model_props(proto, {k: json.dumps(v) for k, v in metadata.items()})
    return proto


def check_graph(path: str | Path) -> dict[str, int]:
    """Checks the operators and the convolutions of a file.

    Returns:
        The number of every operator.

    Raises:
        NotExportable: an operator that is not standard ONNX, or a weight that is computed.
    """
    import onnx

    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {o for n in model.graph.node if n.op_type == 'Constant' for o in n.output}
    counts: dict[str, int] = {}
    for node in [*model.graph.node, *(n for f in model.functions for n in f.node)]:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        if node.domain not in ('', 'ai.onnx'):
            raise NotExportable(f'{path}: operator {node.domain}::{node.op_type} is not standard')
        if node.op_type in CONVS and any(name not in constants for name in node.input[1:]):
            raise NotExportable(
                f'{path}: the weight of {node.name or node.output[0]} is computed\n'
                '  a WS convolution is left: fold the model first'
            )
    return counts


def onnxruntime_session(path: str | Path):
    """A session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Else its threads wait for the next call in busy loops, and take a core from what runs then.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


@torch.no_grad()
def check_results(part: Part, path: str | Path, tolerance: float = 1e-4) -> float:
    """Runs a file with onnxruntime on the part's input.

    Returns:
        The largest error relative to the largest value of each output.

    Raises:
        NotExportable: it is larger than ``tolerance``.
    """
    session = onnxruntime_session(path)
    found = session.run(None, {part.input_name: part.input.numpy()})
    names = [output.name for output in session.get_outputs()]
    if names != part.outputs:
        raise NotExportable(f'{path}: outputs {names}\n  expected {part.outputs}')
    worst = 0.0
    for got, want in zip(found, part.module(part.input)):
        want = want.float().numpy()
        scale = max(float(np.abs(want).max()), float(np.finfo(np.float32).tiny))
        worst = max(worst, float(np.abs(got.astype(np.float32) - want).max()) / scale)
    if not worst <= tolerance:
        raise NotExportable(
            f'{path}: onnxruntime differs from torch by {worst:.2g}, more than {tolerance:.2g}'
        )
    return worst


def metadata_of(cfg: Config, model: nn.Module) -> dict:
    """How to prepare an image for ``image.onnx``, and the classes in the order of the labels."""
    settings = config.model_of(cfg).get('data_preprocessor') or {}
    # MMAction2's frames are RGB when they reach the preprocessor, everybody else's images BGR.
    turned = bool(settings.get('bgr_to_rgb') or settings.get('to_rgb'))
    return dict(
        mean=list(settings.get('mean') or ()),
        std=list(settings.get('std') or ()),
        channel_order='BGR' if turned == (config.scope_of(cfg) == 'mmaction') else 'RGB',
        pad_size_divisor=settings.get('pad_size_divisor', 1),
        classes=classes_of(cfg, model, required=False)['classes'] or [],
    )
