"""A data set as a folder that is there as a whole or not at all; a stamp says what it is."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content) + '\n', encoding='utf-8')


def is_there(root: Path, stamp_name: str, parameters: dict[str, Any]) -> bool:
    """Returns whether the very data set is at `root`; raises if something else is."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise ValueError(f'root must be a folder, but {root} is a file; name another root')
    stamp = root / stamp_name
    if not stamp.exists():
        if any(root.iterdir()):
            raise ValueError(
                f'root must be absent, empty or a shapes data set, but {root} has files and no '
                f'{stamp_name}; nothing was touched. Name another root, or move these files away'
            )
        return False
    try:
        found = json.loads(stamp.read_text(encoding='utf-8'))
    except ValueError:
        found = 'something that is not JSON'
    if found != parameters:
        raise ValueError(
            f'root must hold the shapes data set with {parameters}, but {stamp} says {found}; '
            'nothing was touched. Name another root, ask for the parameters that are there, or '
            f'delete {root} to have it drawn anew'
        )
    return True


def draw_once(
    root: str | os.PathLike[str],
    stamp: str,
    parameters: dict[str, Any],
    write: Callable[[Path], None],
) -> Path:
    """Writes a data set, unless it is there already.

    Several processes may call this at once, such as the ranks of a distributed run: each writes
    into a temporary folder beside `root` and renames it, the first to finish wins, and the others
    drop theirs. An interrupted call leaves no `root`. If it was killed outright, a folder
    `.NAME.drawing-*` may stay beside `root`; nothing reads it, and it may be deleted.

    Args:
        root: The folder.
        stamp: Name of the file that holds the parameters.
        parameters: What makes the data set; JSON.
        write: Fills a new folder.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: `root` holds a data set with other parameters, or files that are none.
        OSError: The folder cannot be written.
    """
    root = Path(root)
    if is_there(root, stamp, parameters):
        return root
    target = root.resolve()  # a link to an empty folder: the rename must meet the folder itself
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f'.{target.name}.drawing-', dir=target.parent
    ) as temporary:
        # One level deeper, as the temporary folder itself is readable by its owner only.
        fresh = Path(temporary) / 'dataset'
        write(fresh)
        write_json(fresh / stamp, parameters)
        try:
            os.rename(fresh, target)
        except OSError:
            # Most likely another process was first. Then its data set must be the right one.
            if not is_there(root, stamp, parameters):
                raise
    return root
