"""docs/your_data.md and its notebook: the same, and every cell runs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.tool import tool

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


# The page is for a reader who wants to see something learned; here it only has to run.
SMALLER = {
    '--num-train 40 --num-val 8': '--num-train 6 --num-val 2',
    'iterations = 40': 'iterations = 6',
    'iter_40.pth': 'iter_6.pth',
    '--steps 40': '--steps 20',
    '--images 8': '--images 2',
}


def shrunk(text):
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


def test_every_cell_runs(tmp_path):
    """Magics are those that the notebook has; commands end well, but for what is said below."""
    notebook = NOTEBOOK.read_text()
    assert all(large in notebook for large in SMALLER)
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    (tmp_path / 'work_dirs' / 'mine').mkdir(parents=True)
    for cell in json.loads(notebook)['cells'][2:]:
        text = shrunk(''.join(cell['source']))
        if cell['cell_type'] != 'code':
            continue
        if text.startswith('%%writefile '):
            name, _, content = text.partition('\n')
            (tmp_path / name.removeprefix('%%writefile ')).write_text(content)
            continue
        for line in text.splitlines():
            program, *command = line.split()
            assert program == '!python'
            module = command[0] == '-m'
            name = ' '.join(command[:2]) if module else command[0].removeprefix('tools/')
            done = tool(name, *command[1 + module :], cwd=tmp_path)
            # Some steps may be too few for a suggestion; then the tool says so and ends with 1.
            assert done.returncode == 0 or 'no suggestion' in done.stdout + done.stderr, done
    mine = tmp_path / 'work_dirs' / 'mine'
    for made in ('find_lr.png', 'report/index.html', 'masks/iter_6.pth', 'objects/epoch_1.pth'):
        assert (mine / made).is_file(), made
    for folder in ('predictions', 'boxes', 'stock'):
        assert any((mine / folder).iterdir()), folder
