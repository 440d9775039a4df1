"""Checkpoints in training, saved so that the last good one always stays."""

import os
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from wsbcn_mm.openmmlab import checkpoints
from wsbcn_mm.openmmlab.files import remove_leftovers, write_atomically

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
