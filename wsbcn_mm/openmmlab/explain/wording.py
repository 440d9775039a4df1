"""What stands in a config and what an error says, in the words of a message."""

import traceback
from typing import Any


def short(value: Any) -> str:
    """A value, as far as it fits into a line."""
    return cut(repr(value), 60)


def cut(text: str, length: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= length else f'{text[: length - 3]}...'


def comma(value: Any) -> str:
    """What a comma at the end of a line makes of a value."""
    one = isinstance(value, tuple) and len(value) == 1
    return ': a comma at the end of its line makes it a tuple' if one else ''


def said(error: BaseException) -> str:
    """The kind of an error and the first lines of what it says."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if not text:  # an assertion without words: its own
        text = traceback.extract_tb(error.__traceback__)[-1].line or ''
    lines = [' '.join(line.split())[:300] for line in text.strip().splitlines()[:4]]
    return f'{type(error).__name__}: ' + '\n    '.join(lines)
