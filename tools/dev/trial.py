"""What a training does with a network: build it, initialise it, one step, one evaluation.

With random images and made-up annotations, see `made_up_data`.
"""

import copy
import functools
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from made_up_data import batch, is_of_people, training_batch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from wsbcn_mm.layers import WeightStandardized
from wsbcn_mm.networks.watching import trace
from wsbcn_mm.openmmlab.config import dicts_in, find_scope, model_of
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.deploy.settings import drop_pretrained
from wsbcn_mm.openmmlab.errors import first_line

STAGES = ('built', 'initialised', 'trained', 'evaluated')
OK, NOT_REACHED = 'ok', 'not reached'
SIZES = (64, 256, 512)  # pixels of an image: the next where one is too small
SIZES_IN = dict(mmaction=(64, 112, 224), mmpretrain=(64, 224))


@dataclass
class Trial:
    """What became of a network.

    Attributes:
        built, initialised, trained, evaluated: `OK`, why it failed, or `NOT_REACHED`.
        size: Pixels of the images of the step.
        without_norm: Names of WS convolutions whose output something else than a norm read.
    """

    built: str = NOT_REACHED
    initialised: str = NOT_REACHED
    trained: str = NOT_REACHED
    evaluated: str = NOT_REACHED
    size: int | None = None
    without_norm: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def try_network(cfg: Config, images: int) -> Trial:
    """Goes through the four stages with a config's model; nothing is downloaded.

    Args:
        cfg: The config; not changed.
        images: In the batch of the step and of the evaluation.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model = model_of(cfg)
    _in_small(cfg)
    trial = Trial()
    probe.register_hosts(cfg)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        drop_pretrained(cfg.model)
        model = _stage(trial, 'built', lambda: revert_sync_batchnorm(MODELS.build(cfg.model)))
        if model is None:
            return trial
        _stage(trial, 'initialised', model.init_weights)
        if trial.initialised != OK:
            return trial
        for size in _sizes(cfg):
            trial.size = size
            data = functools.partial(training_batch, cfg, images, size)
            step = functools.partial(_train_step, model, data)
            trial.without_norm = _stage(trial, 'trained', step) or []
            if trial.trained == OK:
                one = batch(cfg, 1, size)  # models with several views per sample take that alone
                _stage(trial, 'evaluated', functools.partial(_evaluate, model, one))
            if trial.evaluated == OK:
                break
    return trial


def _stage(trial: Trial, name: str, run: Callable[[], Any]) -> Any:
    """Runs a stage and records what comes of it; its result, None where it failed."""
    try:
        result = run()
    except Exception as error:  # noqa: BLE001  whatever a model raises is what is recorded
        setattr(trial, name, reason_of(error))
        return None
    setattr(trial, name, OK)
    return result


def reason_of(error: BaseException) -> str:
    """Class and first line of an error, without the places of this machine."""
    line = ' '.join(f'{type(error).__name__}: {first_line(error)}'.split())
    line = re.sub(r'/\S*/site-packages/', '', line)
    return re.sub(r'(?<![\w./:])/(?:[^\s/]+/)+', '', line)[:200]


def _in_small(cfg: Config) -> None:
    """Few proposals, images at their own size, no synchronisation between processes."""
    for part in dicts_in(cfg.model):
        if part.get('type') in probe.SAME_LAYER:
            part['type'] = probe.SAME_LAYER[part['type']]
        for key in ('rpn', 'rpn_proposal'):
            if isinstance(part.get(key), dict) and 'max_per_img' in part[key]:
                part[key]['max_per_img'] = part[key]['nms_pre'] = 8
    preprocessor = cfg.model.get('data_preprocessor')
    if preprocessor is not None:
        preprocessor.pop('batch_augments', None)
        if preprocessor.pop('size', None) is not None:
            preprocessor['size_divisor'] = 32


def _sizes(cfg: Config) -> list[int]:
    """Those to try; a vision transformer may know positions of one size alone."""
    if is_of_people(cfg):
        return [256]  # what their pooling is for
    own = (cfg.model.get('backbone') or {}).get('img_size')
    own = own[0] if isinstance(own, (list, tuple)) else own
    sizes = SIZES_IN.get(str(find_scope(cfg)), SIZES)
    return [sizes[0], own] if own else list(sizes)


# ---- step and evaluation -----------------------------------------------------------------------


def _train_step(model: Any, data: Callable[[], dict[str, Any]]) -> list[str]:
    """A step of SGD; returns the WS convolutions whose output something else than a norm read."""
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    model.train()
    MessageHub.get_current_instance().update_info('epoch', 0)  # as a runner does; heads ask for it
    batch = model.data_preprocessor(data(), True)
    losses: dict[str, Any] = {}
    seen = trace(model, lambda: losses.update(model(**batch, mode='loss')))
    loss, _ = model.parse_losses(losses)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the loss is {loss.item()}')
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return [
        names[key]
        for key, (norms, others) in seen.items()
        if isinstance(modules[names[key]], WeightStandardized) and (others or not norms)
    ]


@torch.no_grad()
def _evaluate(model: Any, data: dict[str, Any]) -> None:
    model.eval()
    images = len(data['data_samples'])
    if not hasattr(model, 'predict'):  # trained without labels: its features are what it is for
        views = model.data_preprocessor(data, False)['inputs']
        model(views[0] if isinstance(views, list) else views, mode='tensor')
        return
    samples = model.test_step(data)
    if len(samples) != images:
        raise RuntimeError(f'{len(samples)} results for {images} images')
