"""tools/dev/versions_page.py writes rows of docs/versions.md, and nobody else does."""

import datetime
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


LOG = """
setup: anything
{train} - mmengine - INFO - Epoch(train) [1][ 50/360]  lr: 1e-4
{train} - mmengine - INFO - Epoch(train) [1][100/360]  lr: 1e-4
  bbox mAP    0.538
  segm mAP    0.521
"""


def test_a_row_is_what_was_tested_here_and_replaces_the_one_before(versions_page, tmp_path):
    page, results = tmp_path / 'versions.md', tmp_path / 'results.xml'
    results.write_text(RESULTS)
    for name, commit in ('newest', 'aaa'), ('oldest', 'bbb'), ('newest', 'ccc'):
        versions_page.main([str(page), name, str(results), '--commit', commit])
    rows, quickstart = versions_page.rows_of(page.read_text())
    assert [row.split()[1] for row in rows.values()] == ['oldest', 'newest'] and not quickstart
    for row, commit in zip(rows.values(), ('bbb', 'ccc')):
        cells = row.strip('| \n').split(' | ')
        assert cells[1:3] == [platform.python_version(), torch.__version__]
        assert cells[6:10] == ['5', '3', '3', '1'] and cells[-1] == commit
        assert len(cells) == len(versions_page.TESTS)

    log, started = tmp_path / 'log', datetime.datetime.now() - datetime.timedelta(minutes=6)
    train = (started + datetime.timedelta(minutes=2)).strftime('%m/%d %H:%M:%S')
    arguments = [str(page), 'oldest', str(log), '--commit', 'ddd']
    arguments += ['--started', str(started.timestamp()), '--operators', 'torchvision']
    log.write_text(LOG.format(train=train))
    versions_page.main(arguments)
    again, quickstart = versions_page.rows_of(page.read_text())
    cells = quickstart['oldest'].strip('| \n').split(' | ')
    assert again == rows and len(cells) == len(versions_page.QUICKSTART)
    assert cells[5:8] == ['torchvision', '0.538', '0.521'] and cells[9] == '6.0'
    assert 1.9 <= float(cells[8]) <= 2.0  # the log's times have no fractions of a second
    log.write_text(LOG.partition('  bbox')[0])  # was interrupted
    with pytest.raises(ValueError, match='came to its end'):
        versions_page.main(arguments)


def test_the_page_is_as_the_script_writes_it(versions_page):
    text = (ROOT / 'docs' / 'versions.md').read_text()
    assert text == versions_page.page_of(*versions_page.rows_of(text))


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
