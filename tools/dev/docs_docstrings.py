"""Docstrings as the site needs them (an extension of griffe, which reads code unexecuted).

``__doc__ = TEMPLATE.format(shape='(N, C, H, W)')``, which classes of one kind share, is filled in,
and tables become Markdown's.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

RULE = re.compile(r'=+(?: +=+)+')


def with_markdown_tables(text: str) -> str:
    """The text with its tables between rules of ``=`` as Markdown has them."""
    lines, done = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        if not RULE.fullmatch(line.strip()):
            done.append(line)
            continue
        starts = [match.start() for match in re.finditer('=+', line)]
        rules = 1
        rows: list[list[str]] = []
        while rules < 3:
            row = lines.pop(0)
            if RULE.fullmatch(row.strip()):
                rules += 1
                continue
            ends = [*starts[1:], None]
            cells = [row[a:b].strip() for a, b in zip(starts, ends)]
            if rows and not cells[0]:  # the row before goes on
                cells = [f'{old} {new}'.strip() for old, new in zip(rows.pop(), cells)]
            rows.append(cells)
        table = [f'| {" | ".join(cells)} |' for cells in rows]
        table.insert(1, '|---' * len(starts) + '|')
        done += ['', *table, '']
    return '\n'.join(done)


class SharedDocstrings(griffe.Extension):
    """See the module."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites tables."""
        if obj.docstring is not None and RULE.search(obj.docstring.value):
            obj.docstring.value = with_markdown_tables(obj.docstring.value)

    def on_class_instance(
        self, *, node: ast.AST | griffe.ObjectNode, cls: griffe.Class, **_: Any
    ) -> None:
        """Fills in the docstring of a class that has none of its own."""
        if cls.docstring is not None or not isinstance(node, ast.ClassDef):
            return
        for line in node.body:
            match line:
                case ast.Assign(
                    targets=[ast.Name(id='__doc__')],
                    value=ast.Call(
                        func=ast.Attribute(value=ast.Name(id=template), attr='format'),
                        keywords=given,
                    ),
                ):
                    text = ast.literal_eval(str(cls.module.members[template].value))
                    values = {key.arg: ast.literal_eval(key.value) for key in given if key.arg}
                    cls.docstring = griffe.Docstring(
                        text.format(**values), lineno=line.lineno, parent=cls
                    )
