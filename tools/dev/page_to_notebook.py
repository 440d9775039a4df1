"""Makes a notebook of a page: its blocks are the cells, and what the page says stands between them.

A ``python`` block that begins with ``# file: NAME`` writes that file; ``bash`` blocks are commands.
"""

import argparse
import json
import re
from pathlib import Path

BLOCK = re.compile(r'^```(python|bash)\n(.*?)^```\n', re.MULTILINE | re.DOTALL)
SET_UP = """\
# Everything runs from the folder of the repository.
import os

if os.path.basename(os.getcwd()) == 'demo':
    os.chdir('..')
os.makedirs('work_dirs/mine', exist_ok=True)
"""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('page', type=Path, help='Markdown')
    parser.add_argument('notebook', type=Path, help='the .ipynb file to write')
    return parser.parse_args()


def cell(kind: str, text: str, number: int) -> dict:
    """One cell in the format of nbformat 4.5."""
    made = dict(
        cell_type=kind, id=f'cell-{number}', metadata={}, source=text.splitlines(keepends=True)
    )
    return made if kind == 'markdown' else dict(made, execution_count=None, outputs=[])


def code(language: str, text: str) -> str:
    """A block as the text of a cell."""
    if language == 'bash':
        return ''.join(f'!{line}\n' for line in text.splitlines())
    first, _, rest = text.partition('\n')
    return f'%%writefile {first.removeprefix("# file: ")}\n{rest}' if '# file:' in first else text


def notebook_of(page: str) -> dict:
    """The notebook of a page; links to pages beside it lead to ``docs``."""
    cells, end = [], 0
    for found in [*BLOCK.finditer(page), None]:
        between = page[end : found.start() if found else len(page)].strip()
        if between:
            text = re.sub(r'\]\((?!\.\.|http)([^)]+)\)', r'](../docs/\1)', between)
            cells.append(('markdown', text + '\n'))
        if len(cells) == 1:
            cells.append(('code', SET_UP))
        if found:
            cells.append(('code', code(found[1], found[2])))
            end = found.end()
    kernel = dict(display_name='Python 3', language='python', name='python3')
    return dict(
        cells=[cell(kind, text, i) for i, (kind, text) in enumerate(cells)],
        metadata=dict(kernelspec=kernel),
        nbformat=4,
        nbformat_minor=5,
    )


def main() -> None:
    """Writes the notebook."""
    args = parse_args()
    notebook = notebook_of(args.page.read_text())
    args.notebook.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    main()
