"""Files that are complete or not there: written under another name, flushed, then renamed."""

import io
import os
from pathlib import Path

import torch


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
