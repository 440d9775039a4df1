"""Checkpoints in training: saved so that the last good one always stays, loaded with a report.

OpenMMLab loads with ``strict=False`` and only logs. `CheckpointReportHook` speaks for what the
Runner loads, `ReportedPretrainedInit` for ``init_cfg=dict(type='Pretrained', ...)``, whose place in
the registry it takes.
"""

import logging
import os
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmengine.registry import HOOKS, WEIGHT_INITIALIZERS
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm.openmmlab import checkpoints, filling
from wsbcn_mm.openmmlab.checkpoints import CheckpointMismatch
from wsbcn_mm.openmmlab.compat import unwrapped
from wsbcn_mm.openmmlab.files import remove_leftovers, write_atomically
from wsbcn_mm.openmmlab.hooks import resuming

BACKEND = 'wsbcn_atomic'


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, whose files appear under their name when complete."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes; see `wsbcn_mm.openmmlab.files.write_atomically`."""
        write_atomically(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Writes text; see `put`."""
        write_atomically(filepath, obj.encode(encoding))


register_backend(BACKEND, AtomicLocalBackend, force=True)


class _Deferring:
    """A backend whose removals wait, and then spare what was written anew under the same name."""

    def __init__(self, backend) -> None:
        self._backend = backend
        self._waiting: list[tuple[str, int | None]] = []

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._waiting.append((path, _identity(path)))

    def finish(self) -> None:
        for path, identity in self._waiting:
            if identity is None or _identity(path) == identity:
                self._backend.remove(path)


def _identity(path: str) -> int | None:
    """Of a local file: a renamed one has another."""
    return os.stat(path).st_ino if os.path.exists(path) else None


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe against a kill or a full disk at any moment.

    Takes its arguments. Differences, for local files:

    - a checkpoint, and ``last_checkpoint``, is written under another name, flushed to the disk and
      then renamed: no reader ever sees a part of one;
    - with ``max_keep_ckpts`` and ``save_best`` the old one is removed after the new one is there,
      not before;
    - what a killed run left half-written is removed when training starts.

    Remote folders (``s3://...``), whose stores write whole objects, and a ``backend_args`` of
    yours stay as they are.
    """

    file_backend: Any
    backend_args: dict[str, Any] | None

    def before_train(self, runner: Runner) -> None:
        """Prepares the folder."""
        super().before_train(runner)
        local = not checkpoints.is_address(self.out_dir)
        if local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend=BACKEND)
            self._clean()

    @master_only
    def _clean(self) -> None:
        if Path(self.out_dir).is_dir():
            remove_leftovers(self.out_dir)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            # Saved with the outdated one: killed before that is removed, a resumed run removes it.
            kept = [*self.keep_ckpt_ids, step]
            runner.message_hub.update_info('keep_ckpt_ids', kept)
            if len(kept) > self.max_keep_ckpts:
                outdated = self.filename_tmpl.format(kept[0])
            self.keep_ckpt_ids.append(step)  # forgets the first by itself
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        write_atomically(Path(runner.work_dir) / 'last_checkpoint', self.last_ckpt.encode())
        if outdated is not None and outdated != name:
            path = self.file_backend.join_path(self.out_dir, outdated)
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        backend = self.file_backend
        self.file_backend = _Deferring(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
            self.file_backend.finish()
        finally:
            self.file_backend = backend


@HOOKS.register_module()
class CheckpointReportHook(Hook):
    """Reports what a loaded checkpoint leaves unfilled of the model's parameters and buffers.

    Acts whenever the Runner loads a checkpoint: ``load_from``, ``resume`` and testing. What fills
    nothing, and what is resumed from without the state of a training, is `CheckpointMismatch`, a
    ValueError, always. The Runner finds the tensors where the tools find them: under
    ``state_dict`` or ``model``, or bare.

    Args:
        strict: Raise it instead of warning: testing a half-loaded model measures nothing.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares before the Runner copies the tensors; see the class."""
        resumes = runner.cfg.get('resume')
        if resumes:
            wrong = resuming.cannot_go_on(runner, checkpoint)
            if wrong is not None:
                raise CheckpointMismatch(
                    f'the checkpoint {wrong}\n  start from its weights: load_from without resume'
                )
            for line in resuming.goes_on_otherwise(runner, checkpoint):
                print_log(f'the checkpoint {line}', runner.logger, logging.WARNING)
        state = checkpoints.state_dict_of(checkpoint)
        holder = checkpoints.holder_of_tensors(checkpoint)
        if any(str(key).startswith('module.module.') for key in holder):
            holder = state  # the Runner takes one wrapper off
        if holder is not checkpoint:
            checkpoint['state_dict'] = holder  # what the Runner takes
        found = filling.compare(unwrapped(runner.model), state, checkpoint)
        if found.complete:
            return
        if self.strict or not found.filled or (resumes and found.other_shape):
            raise CheckpointMismatch(f'the checkpoint {found}')
        print_log(
            f'the checkpoint {found}\n  what is not filled starts from its initial values',
            runner.logger,
            logging.WARNING,
        )


@WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True)
class ReportedPretrainedInit(PretrainedInit):
    """mmengine's ``init_cfg=dict(type='Pretrained')``, which also says what was not loaded.

    One line where the file fills every parameter and buffer; a warning where it does not, or where
    the WS formula of the file is not that of the layers.

    Its arguments are mmengine's: ``checkpoint``, a file or an address; ``prefix`` of the part of
    the checkpoint's model to load, such as ``'backbone.'``; ``map_location``.
    """

    def __call__(self, module: nn.Module) -> None:
        """Loads into ``module`` and reports."""
        checkpoint = checkpoints.read_checkpoint(self.checkpoint)
        state = checkpoints.state_dict_of(checkpoint, self.checkpoint)
        if self.prefix is not None:
            prefix = self.prefix.rstrip('.') + '.'
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if not state:
                raise ValueError(f'{self.checkpoint} has no key that starts with {prefix!r}')
        found = filling.load(module, state, checkpoint, strict=False)
        level = logging.INFO if found.complete else logging.WARNING
        print_log(f'{self.checkpoint} -> {type(module).__name__}: {found}', 'current', level)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())
