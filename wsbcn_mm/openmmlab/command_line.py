"""What the command lines of several tools share: OpenMMLab's arguments, set-up, errors."""

import argparse
import os
import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from wsbcn_mm.openmmlab import config, explain, loaders, optimizers, options
from wsbcn_mm.openmmlab.checkpoints import (
    CheckpointMismatch,
    CheckpointNotHad,
    CheckpointRefused,
    check_checkpoint,
    is_address,
)
from wsbcn_mm.openmmlab.data import annotations
from wsbcn_mm.openmmlab.data.reading import DataError
from wsbcn_mm.openmmlab.explain import ConfigError
from wsbcn_mm.openmmlab.files import check_place, latest_complete
from wsbcn_mm.openmmlab.places import dotted, walk
from wsbcn_mm.openmmlab.registry import ATOMIC_CHECKPOINT_HOOK, ESTIMATES_HOOK, NORM_NAMED

WRITE_MASKS = ('IoUMetric', 'CityscapesMetric', 'DepthMetric')  # with `output_dir`
# What each launcher sets for its processes, and who starts these.
STARTED = {
    'pytorch': ('RANK', 'torchrun, as in tools/dist_train.sh'),
    'slurm': ('SLURM_PROCID', 'srun, as in tools/slurm_train.sh'),
    'mpi': ('OMPI_COMM_WORLD_LOCAL_RANK', 'mpirun'),
}
# What a mistake of the user raises; anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, ImportError, OSError, DataError)


def parser_of(
    description: str | None, checkpoint: str | None = 'checkpoint file', launcher: bool = False
) -> argparse.ArgumentParser:
    """What the tools have in common: config, checkpoint, ``--cfg-options``, ``--launcher``.

    Args:
        description: What the tool does.
        checkpoint: Help on that argument; None: the tool takes none.
        launcher: The tool runs in several processes, too; see `parse`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    if checkpoint is not None:
        parser.add_argument('checkpoint', help=checkpoint)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=options.OptionsAction,
        help='override settings of the config: a.b.c=value, key="[a,b]", key="[(a,b),(c,d)]"',
    )
    if launcher:
        parser.add_argument(
            '--launcher',
            choices=['none', 'pytorch', 'slurm', 'mpi'],
            default='none',
            help='how the processes were started',
        )
        # The second name is what torch.distributed.launch passes.
        parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses a command line with a launcher; mmengine reads the rank from the environment."""
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program with ``error: ...`` and exit code 1 where the user made a mistake."""
    try:
        yield
    except USER_ERRORS as error:
        sys.exit(f'error: {error}')


@contextmanager
def errors_of_a_run(cfg: Config, *loaders: str) -> Iterator[None]:
    """Ends the program with one sentence where a run stops at what its user can mend.

    Anything else keeps its traceback. Where an annotation file of the loaders is damaged as well,
    that is said with it.

    Args:
        cfg: What is run.
        *loaders: Those whose annotations the run reads.
    """
    try:
        with annotations.looked_at():
            yield
    except CheckpointMismatch as error:
        where = f'{cfg.load_from}: ' if cfg.get('load_from') else ''
        sys.exit(f'error: {where}{error}')
    except CheckpointNotHad as error:
        named = [p for p, value in walk(cfg._cfg_dict, ()) if value == error.source]
        sys.exit(f'error: {", ".join(map(dotted, named[:1]))}: {error}')
    except (CheckpointRefused, NothingToTrain, DataError, ConfigError) as error:
        sys.exit(f'error: {error}')
    except Exception as error:
        mistake = explain.explain(cfg, error)
        if mistake is not None:
            sys.exit(f'error: {mistake}')
        if isinstance(error, OSError):
            sys.exit(f'error: {_said(cfg, error)}')
        damaged = '\n'.join(annotations.damaged_annotations(cfg, *loaders))
        if not damaged:
            raise
        raise DataError(f'{type(error).__name__}: {error}\nand besides {damaged}') from error


def _said(cfg: Config, error: OSError) -> str:
    """What the system refused; where it is the work dir, how to name another."""
    if error.filename is None or error.strerror is None:
        return str(error)
    text = f'{error.filename}: {error.strerror}'
    inside = str(error.filename).startswith(str(cfg.get('work_dir') or '').rstrip('/') or '\0')
    return f'{text}\n  another folder for what a run writes: --work-dir' if inside else text


# ---- set-up --------------------------------------------------------------------------------------


def read_run(args: argparse.Namespace) -> Config:
    """The config of a run, with its work dir and the launcher of its command line."""
    cfg = config.load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'./work_dirs/{Path(args.config).stem}'
    if not is_address(cfg.work_dir):
        check_place(cfg.work_dir, folder=True)
    return cfg


def build_runner(cfg: Config) -> Runner:
    """The runner that a config asks for; with `StandardizationHook`, its optimizer in short."""
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    optimizers.log_in_short(runner)
    runner.register_hook(dict(type='StandardizationHook'))
    return runner


class NothingToTrain(ValueError):
    """Not one step was done."""


class _FirstStep(Hook):
    """Keeps with which iteration a training began."""

    iteration = 0

    def before_train(self, runner: Runner) -> None:
        self.iteration = runner.iter
        loader = runner.train_dataloader
        # A loop by iterations would end in a StopIteration.
        if isinstance(getattr(loader, 'dataset', None), Sized) and len(loader) == 0:
            raise NothingToTrain(no_batch(loader))


def train(cfg: Config, may_be_done: bool = False) -> None:
    """Trains what a config says.

    Args:
        cfg: The config.
        may_be_done: A training that is at its end already is no error: a script that starts it
            again and again until it is.

    Raises:
        NothingToTrain: a ValueError; not one step was done.
    """
    runner, first = build_runner(cfg), _FirstStep()
    runner.register_hook(first)
    runner.train()
    if runner.iter > first.iteration:
        return
    loop = cfg.get('train_cfg') or {}
    length = ', '.join(f'train_cfg.{k}={v}' for k, v in loop.items() if k.startswith('max_'))
    text = f'nothing was left to train: {length}'
    if cfg.get('resume'):
        text += f', and {cfg.load_from} is at epoch {runner.epoch}, iteration {runner.iter}'
    if not may_be_done:
        raise NothingToTrain(text)
    print(text, file=sys.stderr)


def no_batch(loader: DataLoader) -> str:
    """What is wrong where a loader of training has data and makes no batch."""
    items: Any = loader.dataset
    return (
        f'train_dataloader makes no batch of its {len(items)} items: drop_last leaves out '
        'one that is not full\n  a smaller batch_size, or drop_last=False'
    )


def prepare_distributed(cfg: Config, launcher: str) -> None:
    """Lets ``--launcher pytorch`` work on the CPU; does nothing elsewhere.

    mmengine asks CUDA for its device as soon as it initialises a process group itself, and wraps
    the model for one device per process. On a machine without CUDA the group (gloo) is therefore
    started here, and the wrapper is told that there is no device.

    Args:
        cfg: Changed in place: ``model_wrapper_cfg``.
        launcher: The value of ``--launcher``.

    Raises:
        ValueError: nobody has started the processes, or the launcher needs a GPU.
    """
    if launcher in STARTED:
        variable, starter = STARTED[launcher]
        if variable not in os.environ:
            raise ValueError(
                f'--launcher {launcher}: {variable} is not set in the environment: the processes '
                f'are started by {starter}\n  one process alone needs no --launcher'
            )
        if launcher != 'pytorch' and get_device() == 'cpu':
            raise ValueError(
                f'--launcher {launcher} gives each process a GPU, and this machine has none\n  on '
                f'CPUs: {STARTED["pytorch"][1]} (--launcher pytorch)'
            )
    if launcher != 'pytorch' or torch.cuda.is_available():
        return
    torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False)
    wrapper['find_unused_parameters'] = cfg.get('find_unused_parameters', False)
    wrapper = cfg.get('model_wrapper_cfg') or wrapper
    if config.type_name(wrapper).endswith('DistributedDataParallel') or 'type' not in wrapper:
        cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)


def processes(launcher: str) -> tuple[int, int]:
    """The rank of this process and the number of all, before they have been joined."""
    if launcher == 'none':
        return 0, 1
    for rank, world in (
        ('RANK', 'WORLD_SIZE'),
        ('SLURM_PROCID', 'SLURM_NTASKS'),
        ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'),
    ):
        if world in os.environ:
            return int(os.environ.get(rank, '0')), int(os.environ[world])
    return 0, 1


def harden(cfg: Config) -> None:
    """Adds what training with BCN needs and the config does not have.

    `EstimatesHook` where the model has BCN, and the atomic checkpoint hook in the place of
    mmengine's own; hooks of other types are left alone.

    Args:
        cfg: Changed in place.
    """
    present = any(
        config.type_name(hook) == ESTIMATES_HOOK for hook in cfg.get('custom_hooks') or []
    )
    if not present and _has_bcn(cfg.get('model')):
        config.add_hook(cfg, dict(type=ESTIMATES_HOOK))
    hooks = dict(cfg.get('default_hooks') or {})
    hook = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))  # mmengine's default
    if isinstance(hook, dict) and config.type_name(hook) == 'CheckpointHook':
        hooks['checkpoint'] = {**hook, 'type': ATOMIC_CHECKPOINT_HOOK}
        cfg.default_hooks = hooks


def _has_bcn(part: object) -> bool:
    """Whether a part of a model's config names one of our norms."""
    if isinstance(part, dict):
        return config.type_name(part) in NORM_NAMED or any(
            _has_bcn(value) for value in part.values()
        )
    return isinstance(part, (list, tuple)) and any(_has_bcn(value) for value in part)


def resume_from(cfg: Config, checkpoint: str) -> list[str]:
    """Sets what to resume from.

    Args:
        cfg: Changed in place; with ``work_dir``.
        checkpoint: A file, or ``'auto'``: the latest complete one of the work dir; where there is
            none, training starts anew.

    Returns:
        A line for each checkpoint that was passed over because it is not complete.

    Raises:
        ValueError: the file is not complete.
        FileNotFoundError: there is no such file.
    """
    passed_over: list[str] = []
    if checkpoint == 'auto':
        found, passed_over = latest_complete(cfg.work_dir)
        cfg.load_from = None if found is None else str(found)
    else:
        check_checkpoint(checkpoint)
        cfg.load_from = checkpoint
    cfg.resume = cfg.load_from is not None
    return passed_over


def draw_pictures(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Turns on the visualization hook of the config.

    Raises:
        ValueError: the config has no such hook, or one that cannot draw.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise ValueError(
            '--show and --show-dir need default_hooks.visualization in the config, such as '
            "dict(type='DetVisualizationHook') or dict(type='SegVisualizationHook')"
        )
    if config.type_name(hook) == 'VisualizationHook':
        if config.scope_of(cfg) == 'mmaction':
            raise ValueError(
                "--show and --show-dir: MMAction2's hook draws the inputs of 3d networks alone\n"
                '  tools/infer.py draws frames with the predicted classes'
            )
        hook.update(enable=True, interval=1, show=show)  # of MMPretrain
        if show:
            hook['wait_time'] = wait_time
        if show_dir:
            hook['out_dir'] = str(Path(cfg.work_dir) / show_dir)
        return
    hook['draw'] = True
    if 'Seg' in hook['type']:  # every image; MMSegmentation would draw every fiftieth
        hook.setdefault('interval', 1)
    if show:
        hook['show'], hook['wait_time'] = True, wait_time
    if show_dir:
        if 'Det' in config.type_name(hook):
            hook['test_out_dir'] = show_dir
        else:
            cfg.visualizer['save_dir'] = str(Path(cfg.work_dir) / show_dir)


def augment_test(cfg: Config) -> None:
    """Replaces model and test pipeline by those of test-time augmentation (--tta).

    Raises:
        ValueError: the config lacks ``tta_model`` or ``tta_pipeline``.
    """
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ValueError(
            '--tta needs tta_model and tta_pipeline in the config; those of '
            "'mmdet::_base_/... _tta.py' and mmseg's dataset bases are examples"
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for _, dataset in loaders.datasets_of(cfg, 'test_dataloader'):
        dataset['pipeline'] = cfg.tta_pipeline


def keep_predictions(cfg: Config, out: str) -> None:
    """Makes the evaluator keep what the model predicts (--out).

    Args:
        cfg: Changed in place.
        out: Segmentation: a folder of masks. Otherwise: a .pkl file of all predictions.

    Raises:
        ValueError: not a .pkl file where one is expected.
    """
    scope = config.scope_of(cfg)
    evaluators = cfg.get('test_evaluator') or []
    evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    if scope == 'mmseg':
        writers = [e for e in evaluators if config.type_name(e) in WRITE_MASKS] or evaluators
        if not writers:
            raise ValueError(
                '--out: masks are written by an evaluator such as IoUMetric\n  got none'
            )
        writers[0]['output_dir'], writers[0]['keep_results'] = out, True
        return
    if not out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must name a .pkl file, except for segmentation\n  got {out}')
    # The config may have no default scope (in pure Python), or one of its own.
    kind = 'mmdet.DumpDetResults' if scope == 'mmdet' else 'mmengine.DumpResults'
    cfg.test_evaluator = [*evaluators, dict(type=kind, out_file_path=out)]
