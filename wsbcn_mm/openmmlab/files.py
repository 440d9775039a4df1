"""Files that are complete or not there: written under another name, flushed, then renamed."""

import io
import os
import re
import zipfile
import zlib
from pathlib import Path

import torch


def check_place(path: str | Path, folder: bool = False) -> None:
    """Looks whether something can be written there, before hours are spent on what it is.

    Args:
        path: What is to be written; nothing is made here.
        folder: It is one, and may be there already.

    Raises:
        OSError: it is, or something above it is, a file; or this user may not write there.
    """
    path = Path(path)
    places = [path.absolute(), *path.absolute().parents][0 if folder else 1 :]
    above = next(place for place in places if place.exists())
    if not above.is_dir():
        raise NotADirectoryError(f'{path} cannot be written: {above} is a file')
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f'{path} cannot be written: this user may not write to {above}')


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file that nobody ever sees half-written, whatever kills this process or the machine.

    The content goes to ``<path>.tmp-<process>`` in the same folder, to the disk, and only then
    gets its name; a file of that name stays as it is until then. On an error the temporary file is
    removed.

    Args:
        path: The file; its folder is made where it is missing.
        content: What it shall hold.

    Raises:
        OSError: disk full, no permission; the message names the file.
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp-{os.getpid()}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f'{error.strerror}: writing {len(content) / 1e6:.1f} MB failed; what was there before '
            'is untouched, make room or choose another folder',
            str(path),
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself durable; file systems that cannot do that are left alone."""
    if os.name != 'posix':
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # not supported on some network file systems; the content was flushed
        pass
    finally:
        os.close(descriptor)


def save_atomically(value: object, path: str | Path) -> None:
    """``torch.save`` through `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


# What people give for a checkpoint, by what is in its first bytes.
TAKEN_FOR_ONE = {
    rb'git-lfs': ': it is the pointer to one that Git LFS has (git lfs pull)',
    rb'<!DOCTYPE|<html': ': it is a web page',
    rb'\{"': ": it is of safetensors: torch.save(safetensors.torch.load_file(FILE), 'new.pth')",
    rb'\A\x08.\x12': ': it is an ONNX file: name the checkpoint that it was made of',
    rb'\A\x89HDF': ': it is an HDF5 file (Keras, MATLAB)',
}
# The same by what is in an archive: others than torch.save write them, too.
ARCHIVES = {
    'constants.pkl': ': it is a TorchScript file: name the checkpoint that it was made of',
    '.npy': ': it is a file of NumPy',
}


def damage(path: str | Path) -> str | None:
    """Why a file cannot be a complete checkpoint, or None.

    Reads it once: what ``torch.save`` writes is a zip archive, with its table of contents at the
    end and a checksum of every part. Of the format that torch wrote before 1.6 nothing can be said.

    Args:
        path: The file.
    """
    path = Path(path)
    if not path.is_file():
        return 'does not exist'
    if path.stat().st_size == 0:
        return 'is empty'
    with open(path, 'rb') as file:
        start = file.read(64)
    if start.startswith(b'\x80'):  # a pickle: torch < 1.6
        return None
    if not start.startswith(b'PK'):
        kinds = (k for mark, k in TAKEN_FOR_ONE.items() if re.search(mark, start, re.DOTALL))
        return 'is not a checkpoint' + next(kinds, '')
    try:
        with zipfile.ZipFile(path) as archive:
            part, names = archive.testzip(), archive.namelist()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error):
        return 'is incomplete (a copy or a download that broke off?)'
    if part is not None:
        return f'is damaged (wrong checksum of {part})'
    ends = [kind for end, kind in ARCHIVES.items() if any(name.endswith(end) for name in names)]
    return f'is not a checkpoint{ends[0]}' if ends else None


def latest_complete(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from: the latest one of a work dir that is complete.

    Args:
        folder: A work dir with ``last_checkpoint``, ``epoch_*.pth``, ``iter_*.pth``.

    Returns:
        The checkpoint, None if there is none, and a line for each one passed over.
    """
    folder = Path(folder)
    found = [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')]
    found.sort(key=_time, reverse=True)
    named = _named(folder / 'last_checkpoint')
    if named is not None:
        # One that was written after it, but not yet named there, goes further.
        later = [path for path in found if _number(path) > _number(named) and _newer(path, named)]
        rest = [path for path in found if path not in later and not path.samefile(named)]
        found = [*later, named, *rest]
    passed_over: list[str] = []
    for path in found:
        reason = damage(path)
        if reason is None:
            return path, passed_over
        passed_over.append(f'{path} {reason}')
    return None, passed_over


def _named(pointer: Path) -> Path | None:
    """The file that ``last_checkpoint`` names; in its own folder, if the work dir was moved."""
    text = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    places = [Path(text), pointer.parent / Path(text).name] if text else []
    return next((place for place in places if place.is_file()), None)


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _newer(path: Path, other: Path) -> bool:
    """Written later, in the same kind of steps."""
    return _time(path) > _time(other) and path.name.split('_')[0] == other.name.split('_')[0]


def _number(path: Path) -> int:
    digits = path.stem.rpartition('_')[2]
    return int(digits) if digits.isdigit() else 0


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Removes what `write_atomically` left in a folder when its process was killed.

    Args:
        folder: The folder; no other process may be writing to it.

    Returns:
        What was removed.
    """
    found = sorted(Path(folder).glob('*.tmp-*'))
    for path in found:
        path.unlink(missing_ok=True)
    return found
