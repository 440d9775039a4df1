"""`wsbcn_mm.recalibration` for models of OpenMMLab: which images, and how they reach the model."""

import copy
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_dist_info
from mmengine.registry import DATASETS
from mmengine.utils import ProgressBar
from torch import nn
from torch.utils.data import DataLoader, Subset

from wsbcn_mm.layers import BatchChannelNorm
from wsbcn_mm.openmmlab import loaders
from wsbcn_mm.openmmlab.checkpoints import holder_of_tensors
from wsbcn_mm.openmmlab.compat import unwrapped
from wsbcn_mm.openmmlab.config import type_name
from wsbcn_mm.recalibration import Recalibration, recalibrate


def training_images_as_tested(cfg: Config) -> dict:
    """The training dataset, with the pipeline of testing: what the statistics shall be those of.

    Args:
        cfg: A config with ``train_dataloader`` and ``test_dataloader`` or ``val_dataloader``.

    Returns:
        The config of a dataset. Wrappers that repeat or mix images are left out.

    Raises:
        ValueError: one of the loaders is missing.
    """
    if not cfg.get('train_dataloader'):
        raise ValueError(
            'the statistics are those of training images as they look in testing\n'
            '  the config has no train_dataloader'
        )
    pipeline = loaders.datasets_of_test(cfg)[0]['pipeline']
    dataset = loaders.single_pass(copy.deepcopy(cfg.train_dataloader['dataset']))
    for part in loaders.inner_datasets(dataset):
        part['pipeline'] = _from_own_storage(copy.deepcopy(pipeline), part.get('pipeline') or [])
    return dataset


def _from_own_storage(pipeline: list, own: list) -> list:
    """A pipeline whose steps read files from where those of another one do: each has its place."""
    places = {type_name(s): s.get('backend_args') for s in own if isinstance(s, dict)}
    for step in pipeline:
        place = places.get(type_name(step), step)
        if isinstance(step, dict) and place is not step and place != step.get('backend_args'):
            step['backend_args'] = copy.deepcopy(place)
    return pipeline


def loader(dataset: dict, num_images: int, batch_size: int = 1) -> DataLoader:
    """This rank's share of images drawn from a dataset, the same ones each time.

    Args:
        dataset: Its config.
        num_images: How many, over all ranks; all where there are fewer.
        batch_size: Images per forward call.

    Returns:
        A loader that repeats the same batches in the same order.
    """
    built: Any = DATASETS.build(dataset)
    rank, world = get_dist_info()
    order = np.random.default_rng(0).permutation(len(built))[:num_images]
    return DataLoader(
        Subset(built, order[rank::world].tolist()),
        batch_size,
        collate_fn=pseudo_collate,
    )


def recalibrate_model(
    model: nn.Module,
    batches: DataLoader,
    passes: int = 4,
    progress: bool = False,
    keep_function: bool = False,
    backbone: bool = False,
) -> Recalibration:
    """`wsbcn_mm.recalibration.recalibrate` with the forward pass of testing.

    Args:
        model: The model, wrapped for several processes or not.
        batches: See `loader`.
        passes: The most passes over the images.
        progress: Show a bar.
        keep_function: See there.
        backbone: Run and treat the backbone alone, whatever the heads are.
    """
    host: Any = unwrapped(model)
    bar = ProgressBar(passes * len(batches)) if progress and get_dist_info()[0] == 0 else None

    def forward(batch: dict) -> None:
        if backbone:
            host.backbone(host.data_preprocessor(batch, False)['inputs'])
        else:
            host.test_step(batch)
        if bar is not None:
            bar.update()

    try:
        return recalibrate(
            host.backbone if backbone else host,
            batches,
            forward,
            passes,
            keep_function=keep_function,
        )
    finally:
        if bar is not None:
            bar.file.write('\n')


def write_statistics(model: nn.Module, checkpoint: dict, keep_function: bool = False) -> list[str]:
    """Puts the running statistics of a model into a checkpoint; nothing else of it changes.

    Args:
        model: The model.
        checkpoint: As mmengine saves it, or a bare state dict; changed in place.
        keep_function: With ``batch_weight``, ``batch_bias`` and the counters, which followed.

    Returns:
        The keys that were written.

    Raises:
        ValueError: the checkpoint lacks one; nothing was written.
    """
    state = holder_of_tensors(checkpoint)
    prefix = 'module.' if all(key.startswith('module.') for key in state) else ''
    kinds = ['bn.running_mean', 'bn.running_var']
    if keep_function:
        kinds += ['batch_weight', 'batch_bias', 'bn.num_batches_tracked']
    new = {
        f'{prefix}{name}.{kind}': module.state_dict()[kind]
        for name, module in model.named_modules()
        if isinstance(module, BatchChannelNorm)
        for kind in kinds
    }
    missing = [key for key in new if key not in state]
    if missing:
        raise ValueError(f'the checkpoint has no {missing[0]}: it is not one of this model')
    for key, value in new.items():
        state[key] = value.detach().to('cpu', state[key].dtype, copy=True)
    return list(new)


def device() -> torch.device:
    """That of this process: its GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device('cuda', torch.cuda.current_device())
    return torch.device('cpu')
