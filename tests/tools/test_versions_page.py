"""tools/dev/versions_page.py writes rows of docs/versions.md, and nobody else does."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULTS = """<testsuites><testsuite tests="11" failures="1" errors="2" skipped="3" time="61.2">
</testsuite></testsuites>"""


@pytest.fixture
def versions_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools' / 'dev')
    yield __import__('versions_page')
    sys.modules.pop('versions_page')


def test_a_row_is_what_was_tested_here_and_replaces_the_one_before(versions_page, tmp_path):
    page, results = tmp_path / 'versions.md', tmp_path / 'results.xml'
    results.write_text(RESULTS)
    for name, commit in ('newest', 'aaa'), ('oldest', 'bbb'), ('newest', 'ccc'):
        versions_page.main([str(page), name, str(results), '--commit', commit])
    text = page.read_text()
    rows = text.removeprefix(versions_page.HEAD).splitlines()
    assert [row.split()[1] for row in rows] == ['oldest', 'newest'] and 'aaa' not in text
    for row, commit in zip(rows, ('bbb', 'ccc')):
        cells = row.strip('| ').split(' | ')
        assert cells[1:3] == [platform.python_version(), torch.__version__]
        assert cells[6:10] == ['5', '3', '3', '1'] and cells[-1] == commit
        assert len(cells) == len(versions_page.COLUMNS)


def test_the_page_is_as_the_script_writes_it(versions_page):
    text = (ROOT / 'docs' / 'versions.md').read_text()
    rows = versions_page.rows_of(text)
    order = [name for name in versions_page.stacks() if name in rows]
    assert text == versions_page.HEAD + ''.join(rows[name] for name in order)


def test_a_stack_that_is_not_in_the_list_is_refused_before_anything_is_made(tmp_path):
    done = subprocess.run(
        ['bash', ROOT / 'tools/dev/matrix.sh', 'newest', 'none'],
        env=dict(PATH='/usr/bin:/bin', WSBCN_STACKS=str(tmp_path / 'stacks')),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "no stack 'none' in tools/dev/stacks.txt" in done.stderr
    assert not (tmp_path / 'stacks').exists()
