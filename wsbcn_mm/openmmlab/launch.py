"""Several processes on machines without a GPU, which mmengine alone does not start."""

import torch
from mmengine.config import Config


def prepare_distributed(cfg: Config, launcher: str) -> None:
    """Lets ``--launcher pytorch`` work on the CPU; does nothing elsewhere.

    mmengine asks CUDA for its device as soon as it initialises a process group itself, and wraps
    the model for one device per process. On a machine without CUDA the group (gloo) is therefore
    started here, and the wrapper is told that there is no device.

    Args:
        cfg: Changed in place: ``model_wrapper_cfg`` where the config does not set it.
        launcher: The value of ``--launcher``.
    """
    if launcher != 'pytorch' or torch.cuda.is_available():
        return
    torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    wrapper['find_unused_parameters'] = cfg.get('find_unused_parameters', False)
    cfg.setdefault('model_wrapper_cfg', wrapper)
