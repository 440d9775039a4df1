"""docs/your_data.md and its notebook: the same, and every cell runs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='the page trains a detector')
pytest.importorskip('mmseg', reason='the page trains a segmenter')
pytest.importorskip('matplotlib', reason='the page draws pictures')

ROOT = Path(__file__).parents[2]
PAGE, NOTEBOOK = ROOT / 'docs' / 'your_data.md', ROOT / 'demo' / 'your_data.ipynb'


def test_the_notebook_is_that_of_the_page():
    """`python tools/dev/page_to_notebook.py docs/your_data.md demo/your_data.ipynb` makes it."""
    path = ROOT / 'tools' / 'dev' / 'page_to_notebook.py'
    spec = importlib.util.spec_from_file_location('page_to_notebook', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.notebook_of(PAGE.read_text())
    assert made == json.loads(NOTEBOOK.read_text())
    blocks = re.findall(r'^```(?:python|bash)$', PAGE.read_text(), re.MULTILINE)
    cells = [cell for cell in made['cells'] if cell['cell_type'] == 'code']
    assert len(cells) == len(blocks) + 1  # the set-up


def run(command, folder):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    program, *rest = command.split()
    assert program == 'python'
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *rest],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_every_cell_runs(tmp_path):
    """Magics are those that the notebook has; commands end well, but for what is said below."""
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    (tmp_path / 'work_dirs' / 'mine').mkdir(parents=True)
    for cell in json.loads(NOTEBOOK.read_text())['cells'][2:]:
        text = ''.join(cell['source'])
        if cell['cell_type'] != 'code':
            continue
        if text.startswith('%%writefile '):
            name, _, content = text.partition('\n')
            (tmp_path / name.removeprefix('%%writefile ')).write_text(content)
            continue
        for line in text.splitlines():
            assert line.startswith('!')
            code, output = run(line[1:], tmp_path)
            # 40 steps may be too few for a suggestion; then the tool says so and ends with 1.
            assert code == 0 or 'no suggestion' in output, output[-3000:]
    mine = tmp_path / 'work_dirs' / 'mine'
    for made in ('find_lr.png', 'report/index.html', 'masks/iter_40.pth', 'objects/epoch_1.pth'):
        assert (mine / made).is_file(), made
    for folder in ('predictions', 'boxes', 'stock'):
        assert any((mine / folder).iterdir()), folder
