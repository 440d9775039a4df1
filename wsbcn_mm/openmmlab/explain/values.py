"""Values of another kind than the arguments that they are given to."""

import inspect
import re
from typing import Any

from wsbcn_mm.openmmlab.explain.wording import comma

NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?', re.IGNORECASE)
HOLDS_NUMBER = re.compile(r'\b(int|float|Number)\b')
HOLDS_TEXT = re.compile(r"(<class 'str'>|typing\.Optional\[str\]|str( \| None)?)")
HOLDS_DICT = re.compile(r"(<class 'dict'>|typing\.Optional\[dict\]|dict( \| None)?)")
HOLDS_MANY = re.compile(r'(?i)\b(tuple|list|sequence|iterable)\b')


def says_number(value: Any) -> bool:
    """Whether a value is a text that says a number."""
    return isinstance(value, str) and NUMBER.fullmatch(value.strip()) is not None


def misfit(value: Any, parameter: inspect.Parameter) -> str | None:
    """What belongs in the place of a value; None where it may be right."""
    default = parameter.default
    annotation = '' if parameter.annotation is parameter.empty else str(parameter.annotation)
    if isinstance(value, list) and HOLDS_TEXT.fullmatch(annotation):
        return 'a text'  # a path, of which there is one
    if isinstance(value, str) and HOLDS_DICT.fullmatch(annotation):
        return 'a dict' + (f' such as {default!r}' if default else '')
    takes_number = isinstance(default, (int, float)) and not isinstance(default, bool)
    takes_number = takes_number or bool(HOLDS_NUMBER.search(annotation))
    takes_many = bool(HOLDS_MANY.search(annotation)) or isinstance(default, (tuple, list))
    if says_number(value):
        may_be_text = isinstance(default, str) or 'str' in annotation
        may_be_text = may_be_text or (default is None and not takes_number)  # a year, a prefix
        return None if may_be_text else 'a number'
    if isinstance(value, tuple) and len(value) == 1 and takes_number and not takes_many:
        return 'a number'
    if isinstance(value, (int, float)) and not isinstance(value, bool) and takes_many:
        only_many = not HOLDS_NUMBER.search(re.sub(r'\[[^][]*\]', '', annotation))
        example = f' such as {default!r}' if isinstance(default, (tuple, list)) and default else ''
        return f'a list{example}' if only_many else None
    return None


def mend(value: Any) -> str:
    """What to write instead; '' where that is not known."""
    if isinstance(value, list):
        return ': files of several data sets are those of a ConcatDataset, each with its own'
    if says_number(value):
        number = float(value)
        text = str(int(number)) if number.is_integer() else str(number)
        yaml = ' (YAML takes it for a text)' if 'e' in value.lower() else ' without quotes'
        return f': a text; write {text}{yaml}'
    return comma(value)
