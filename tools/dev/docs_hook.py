"""What the site takes in from outside of docs/, and where links to it lead (a hook of mkdocs).

A page lies where its readers look for it: README.md at the top, those of configs and tools beside
what they describe. On the site they are pages like the others; any other file that a page links to
is copied, and the name of a folder stays without a link.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r'(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)')
CODE = re.compile(r'^(```.*?^```$)', re.MULTILINE | re.DOTALL)

PAGES = {
    'README.md': 'index.md',
    'CHANGELOG.md': 'changelog.md',
    'CONTRIBUTING.md': 'contributing.md',
    'tools/README.md': 'tools.md',
    **{
        f'configs/{page.parent.name}/README.md': f'configs/{page.parent.name}.md'
        for page in (ROOT / 'configs').glob('*/README.md')
    },
}
SOURCES = {site: source for source, site in PAGES.items()}


def source_of(page: str) -> str:
    """Where a page of the site lies in the repository."""
    return SOURCES.get(page, f'docs/{page}')


def site_path(path: str) -> str | None:
    """Where a file of the repository is on the site; None for a folder without a page.

    Raises:
        FileNotFoundError: no such file.
    """
    if path in PAGES:
        return PAGES[path]
    if f'{path}/README.md' in PAGES:
        return PAGES[f'{path}/README.md']
    if (ROOT / path).is_dir():
        return None
    if not (ROOT / path).is_file():
        raise FileNotFoundError(f'a page links to {path}, which is not there')
    return path.removeprefix('docs/') if path.startswith('docs/') else f'files/{path}'


def rewritten(text: str, page: str) -> tuple[str, set[str]]:
    """A page with its links as they are on the site, and the files outside of docs/ among them.

    Args:
        text: Markdown.
        page: Where it is on the site.
    """
    needed: set[str] = set()

    def link(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        parts = urlsplit(target)
        if parts.scheme or not parts.path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), parts.path))
        site = site_path(path)
        if site is None:
            return label.strip('[]')
        if site.startswith('files/'):
            needed.add(path)
        new = posixpath.relpath(site, posixpath.dirname(page) or '.')
        return f'{label}({new}{"#" + parts.fragment if parts.fragment else ""})'

    pieces = CODE.split(text)
    pieces[::2] = [LINK.sub(link, piece) for piece in pieces[::2]]
    return ''.join(pieces), needed


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and what pages link to."""
    needed: set[str] = set()
    pages = [f.src_uri for f in files if f.is_documentation_page()] + list(SOURCES)
    for page in pages:
        needed |= rewritten((ROOT / source_of(page)).read_text(), page)[1]
    for site, source in SOURCES.items():
        files.append(File.generated(config, site, abs_src_path=os.fspath(ROOT / source)))
    for path in sorted(needed):
        files.append(File.generated(config, f'files/{path}', abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links lead to where things are on the site; what unfolds is Markdown inside, too."""
    text = rewritten(markdown, page.file.src_uri)[0]
    return text.replace('<details>', '<details markdown="1">')
