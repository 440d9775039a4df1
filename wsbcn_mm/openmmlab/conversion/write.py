"""Writes a converted config: a child of its source where one can inherit, else the whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmengine.config import Config

from wsbcn_mm.openmmlab.conversion.changes import Conversion

# What mmengine raises where a config cannot inherit from another: one in pure Python, a key in two
# bases, a dict merged into something else.
MERGE_ERRORS = (RuntimeError, KeyError, TypeError)


def write_config(conversion: Conversion, path: str | Path) -> str:
    """Writes a converted config and reads it back.

    A child of the source with the differences alone, where the source has a name or a path that a
    config can inherit from; otherwise the complete config, and a warning says why.

    Args:
        conversion: From `convert_config`.
        path: The file to write, ``.py``.

    Returns:
        The text of the file.

    Raises:
        ValueError: ``path`` does not end in ``.py``, or is the source itself.
        RuntimeError: the file that was written does not give the converted config (a defect).
    """
    path = Path(path)
    if path.suffix != '.py' or path.is_dir():
        raise ValueError(f'a config is a .py file\n  got {path}')
    if conversion.source and path.resolve() == Path(conversion.source).resolve():
        raise ValueError(f'{path} is the source itself: name another file')
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.stem}_{os.getpid()}_part.py')
    wanted = _without_scopes(conversion.cfg.to_dict())
    try:
        text, why_no_child = _child(conversion, path.parent)
        if not why_no_child:
            why_no_child = _why_not_read_back(text, part, wanted)
        if why_no_child:
            warning = f'{path.name} is written as a complete config, not as a child: {why_no_child}'
            if warning not in conversion.warnings:
                conversion.warnings.append(warning)
            text = _header(conversion) + conversion.cfg.pretty_text
            part.write_text(text)
            if _without_scopes(Config.fromfile(str(part)).to_dict()) != wanted:
                raise RuntimeError(
                    f'the config written to {path} does not read back as it was converted'
                )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return text


def _why_not_read_back(text: str, file: Path, wanted: dict) -> str:
    """Writes a child config; why reading it does not give what is wanted, '' where it does."""
    file.write_text(text)
    try:
        same = _without_scopes(Config.fromfile(str(file)).to_dict()) == wanted
    except MERGE_ERRORS as error:
        return str(error).partition('. ')[0].partition('\n')[0]
    return '' if same else 'merging the source and the differences does not give it'


def _without_scopes(value: Any) -> Any:
    """For comparison: without what depends on the way a config was read."""
    if isinstance(value, dict):
        return {k: _without_scopes(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [_without_scopes(item) for item in value]
    return value


def _header(conversion: Conversion) -> str:
    name = conversion.base or (Path(conversion.source).name if conversion.source else 'a config')
    lines = [f'# {name} with WS + BCN, by tools/model_converters/convert_config.py.']
    lines += [f'# Left as it is: {text}' for text in conversion.left]
    lines += [f'# Warning: {text}' for text in conversion.warnings]
    return '\n'.join(line.replace('\n', ' ') for line in lines) + '\n'


def _child(conversion: Conversion, folder: Path) -> tuple[str, str]:
    """The text of a config that inherits from the source; or '' and why none can."""
    base = conversion.base
    if base is None:
        if not conversion.source:
            return '', 'it was given without a file'
        if 'site-packages' in Path(conversion.source).parts:
            return '', f'mmengine cannot inherit from {Path(conversion.source).name} by name'
        base = os.path.relpath(Path(conversion.source).resolve(), folder.resolve())
    overrides = _difference(conversion.original.to_dict(), conversion.cfg.to_dict())
    return f'{_header(conversion)}_base_ = {base!r}\n{Config(overrides).pretty_text}', ''


def _difference(old: dict, new: dict) -> dict:
    """What a child config says to get from ``old`` to ``new``; mmengine merges key by key."""
    result = {}
    for key, value in new.items():
        if key in old and old[key] == value:
            continue
        if not isinstance(value, dict) or key not in old:
            result[key] = value
        elif isinstance(old[key], dict) and old[key].keys() <= value.keys():
            result[key] = _difference(old[key], value)
        else:
            result[key] = dict(_delete_=True, **value)
    return result
