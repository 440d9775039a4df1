"""wsbcn_mm.openmmlab.files and saving: a checkpoint is complete or not there."""

import pytest

pytest.importorskip('mmengine', reason="the hook is mmengine's")

import errno
import os
import resource

import numpy as np
import torch
from torch import nn

from tests.openmmlab.tiny import make_runner
from wsbcn_mm.openmmlab import files
from wsbcn_mm.openmmlab.checkpoints import CheckpointRefused
from wsbcn_mm.openmmlab.files import damage, latest_complete, write_atomically

ATOMIC = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_and_replace(tmp_path):
    path = tmp_path / 'new' / 'a.bin'
    write_atomically(path, b'one')
    write_atomically(path, b'two')
    assert path.read_bytes() == b'two'
    assert names(path.parent) == ['a.bin']


@pytest.mark.parametrize('folder', [False, True])
@pytest.mark.parametrize('place', ['file', 'file/below', 'new/a', 'closed/a', ''])
def test_a_place_that_cannot_be_written_is_said_before(place, folder, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    (tmp_path / 'closed').mkdir()
    # As for another user than root, who may do everything.
    monkeypatch.setattr(os, 'access', lambda path, mode: path.name != 'closed')
    why = {'file/below': 'is a file', 'closed/a': 'this user may not write to .*closed'}
    why |= {'file': 'is a file'} if folder else {}
    if place in why:
        with pytest.raises(OSError, match=f'{place} cannot be written: .*{why[place]}'):
            files.check_place(tmp_path / place, folder)
    else:
        files.check_place(tmp_path / place, folder)
    assert names(tmp_path) == ['closed', 'file']


@pytest.mark.parametrize('step', ['open', 'fsync', 'replace'])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / 'a.pth'
    write_atomically(path, b'good')

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == 'open':
        monkeypatch.setattr('builtins.open', full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match='No space left on device: writing 0.0 MB failed') as error:
        write_atomically(path, b'newer')
    assert error.value.errno == errno.ENOSPC
    assert str(path) in str(error.value)
    monkeypatch.undo()
    assert path.read_bytes() == b'good'
    assert names(tmp_path) == ['a.pth']


def test_a_write_that_the_system_cuts_off(tmp_path):
    """For real: the system takes 1,000 bytes and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match='File too large: writing 0.0 MB failed'):
            write_atomically(tmp_path / 'a.pth', bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def checkpoint(path, value=1.0, time=None):
    torch.save(dict(state_dict=dict(w=torch.full((1000,), value))), path)
    if time is not None:
        os.utime(path, (time, time))
    return path


def test_damage_is_seen(tmp_path):
    path = checkpoint(tmp_path / 'a.pth')
    content = path.read_bytes()
    assert damage(path) is None
    for size in (1, 10, len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:size])
        assert damage(path) in (
            'is incomplete (a copy or a download that broke off?)',
            'is not a checkpoint',
        )
    path.write_bytes(b'')
    assert damage(path) == 'is empty'
    flipped = bytearray(content)
    flipped[content.index(torch.full((10,), 1.0).numpy().tobytes()) + 20] ^= 1
    path.write_bytes(flipped)
    assert damage(path).startswith('is damaged (wrong checksum of ')
    path.write_bytes(b'404')
    assert damage(path) == 'is not a checkpoint'
    for content, words in (
        (b'version https://git-lfs.github.com/spec/v1\noid', 'git lfs pull'),
        (b'<!DOCTYPE html><html>', 'a web page'),
        (b'\x10\0\0\0\0\0\0\0{"conv.weight":', 'safetensors.torch.load_file'),
        (b'\x08\x08\x12\x07pytorch\x1a', 'an ONNX file'),
        (b'\x89HDF\r\n', 'HDF5'),
    ):
        path.write_bytes(content)
        assert words in damage(path)
    assert damage(tmp_path / 'b.pth') == 'does not exist'
    np.savez(path.with_suffix('.npz'), a=np.ones(2))
    assert 'NumPy' in damage(path.with_suffix('.npz'))
    torch.jit.script(nn.ReLU()).save(path)
    assert 'TorchScript' in damage(path)
    torch.save(dict(a=torch.ones(2)), path, _use_new_zipfile_serialization=False)
    assert damage(path) is None


def test_the_latest_complete_one_is_found(tmp_path):
    assert latest_complete(tmp_path) == (None, [])
    first, second = (checkpoint(tmp_path / f'epoch_{i}.pth', time=1000 + i) for i in (1, 2))
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text(str(second))
    assert latest_complete(tmp_path) == (second, [])
    third = checkpoint(tmp_path / 'epoch_3.pth', time=1003)  # killed before the pointer was written
    assert latest_complete(tmp_path) == (third, [])
    third.write_bytes(third.read_bytes()[:-500])
    os.utime(third, (1003, 1003))
    found, passed_over = latest_complete(tmp_path)
    assert found == second
    assert passed_over == [f'{third} is incomplete (a copy or a download that broke off?)']
    third.unlink()
    # A run that was started anew in the same folder: its first is not the old run's second.
    os.utime(first, (2000, 2000))
    pointer.write_text(str(first))
    assert latest_complete(tmp_path)[0] == first
    pointer.write_text('')
    assert latest_complete(tmp_path)[0] == first
    pointer.write_text('/moved/away/epoch_2.pth')
    assert latest_complete(tmp_path)[0] == second


def test_the_runner_saves_and_resumes(tmp_path):
    runner = make_runner(tmp_path, epochs=2, default_hooks=ATOMIC)
    runner.train()
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_2.pth')
    assert damage(tmp_path / 'epoch_2.pth') is None
    second = make_runner(tmp_path, epochs=3, default_hooks=ATOMIC, resume=True)
    second.train()
    assert second.iter == 6
    assert not list(tmp_path.glob('*.tmp-*'))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize('moment', ['write', 'fsync', 'replace'])
def test_killed_while_a_checkpoint_is_written(tmp_path, monkeypatch, moment):
    """With ``max_keep_ckpts=1`` mmengine removes the only checkpoint before it writes the next."""
    hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=1))
    make_runner(tmp_path, epochs=1, default_hooks=hooks).train()
    good = (tmp_path / 'epoch_1.pth').read_bytes()

    def killed(*args, **kwargs):
        raise Killed

    runner = make_runner(tmp_path, epochs=2, default_hooks=hooks, resume=True)
    if moment == 'write':
        monkeypatch.setattr('wsbcn_mm.openmmlab.hooks.saving.write_atomically', killed)
    else:
        monkeypatch.setattr(os, moment, killed)
    with pytest.raises(Killed):
        runner.train()
    monkeypatch.undo()
    assert (tmp_path / 'epoch_1.pth').read_bytes() == good
    assert latest_complete(tmp_path) == (tmp_path / 'epoch_1.pth', [])

    (tmp_path / 'epoch_2.pth.tmp-123').write_bytes(b'half')  # as a kill leaves it
    runner = make_runner(tmp_path, epochs=2, default_hooks=hooks, resume=True)
    runner.train()
    assert runner.iter == 4
    assert [n for n in names(tmp_path) if 'epoch' in n] == ['epoch_2.pth']


def test_killed_before_the_outdated_one_is_removed(tmp_path, monkeypatch):
    """It does not stay for ever."""
    hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=2))
    runner = make_runner(tmp_path, epochs=4, default_hooks=hooks)

    def killed(self, path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr('mmengine.fileio.LocalBackend.remove', killed)
        with pytest.raises(Killed):
            runner.train()
    assert [n for n in names(tmp_path) if 'epoch' in n] == [f'epoch_{i}.pth' for i in (1, 2, 3)]
    make_runner(tmp_path, epochs=4, default_hooks=hooks, resume=True).train()
    assert [n for n in names(tmp_path) if 'epoch' in n] == ['epoch_3.pth', 'epoch_4.pth']


def test_mmengines_own_hook_loses_it(tmp_path, monkeypatch):
    """The trap that the hook is for; when this fails, mmengine has been repaired."""
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1))
    make_runner(tmp_path, epochs=1, default_hooks=hooks).train()

    def killed(*args, **kwargs):
        raise Killed

    runner = make_runner(tmp_path, epochs=2, default_hooks=hooks, resume=True)
    monkeypatch.setattr('mmengine.runner.runner.save_checkpoint', killed)
    with pytest.raises(Killed):
        runner.train()
    assert not list(tmp_path.glob('*.pth'))


def test_the_best_checkpoint_stays_until_the_better_one_is_there(tmp_path, monkeypatch):
    hooks = dict(
        checkpoint=dict(type='AtomicCheckpointHook', interval=1, save_best='acc', rule='greater')
    )
    runner = make_runner(tmp_path, epochs=1, default_hooks=hooks)
    runner.train()
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'AtomicCheckpointHook')
    hook._save_best_checkpoint(runner, dict(acc=0.1))
    assert [n for n in names(tmp_path) if 'best' in n] == ['best_acc_epoch_1.pth']
    hook._save_best_checkpoint(runner, dict(acc=0.2))  # the same name: must not remove itself
    assert [n for n in names(tmp_path) if 'best' in n] == ['best_acc_epoch_1.pth']
    runner.train_loop._epoch = 5
    with monkeypatch.context() as patch:
        patch.setattr('wsbcn_mm.openmmlab.hooks.saving.write_atomically', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hook._save_best_checkpoint(runner, dict(acc=0.3))
    assert 'best_acc_epoch_1.pth' in names(tmp_path)
    runner.message_hub.update_info('best_score', 0.2)
    hook.best_ckpt_path = str(tmp_path / 'best_acc_epoch_1.pth')
    hook._save_best_checkpoint(runner, dict(acc=0.4))
    assert [n for n in names(tmp_path) if 'best' in n] == ['best_acc_epoch_5.pth']


def test_a_truncated_checkpoint_is_refused_with_its_name(tmp_path):
    path = checkpoint(tmp_path / 'epoch_7.pth')
    path.write_bytes(path.read_bytes()[:-300])
    runner = make_runner(tmp_path / 'run', load_from=str(path), resume=True)
    with pytest.raises(CheckpointRefused, match='epoch_7.pth is incomplete'):
        runner.load_or_resume()
    assert files.latest_complete(tmp_path)[0] is None
