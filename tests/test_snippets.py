"""Every snippet of README, docs and the pages beside configs: Python runs, commands are accepted.

A ``python`` block that begins with ``_base_`` is a config: it is read and its model built. Others
are executed. A ``bash`` block runs in bash, with the programs that it calls replaced by ones that
note their arguments; a tool of ours must accept them, and files of ours must be there.
"""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wsbcn_mm import BatchChannelNorm2d, WSConv2d

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob('*.md'),
        *ROOT.glob('docs/**/*.md'),
        *ROOT.glob('configs/*/README.md'),
        *ROOT.glob('tools/*.md'),
    ]
)
# What a snippet calls that is no tool of ours.
PROGRAMS = ('pip', 'ln', 'mkdir', 'source', 'pre-commit', 'bash', 'cd', 'wsbcn-mm')
NOTEBOOKS = ('docs/your_data.md',)  # run as a whole by tests/openmmlab/test_your_data.py
ELSEWHERE = 'InferenceSession'  # such a snippet is run by tests/openmmlab/deploy/test_detector.py
LANGUAGES = ('python', 'bash', 'text', '')


def snippets(language):
    for page in PAGES:
        blocks = re.findall(r'^```(\w*)\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL)
        for number, (kind, text) in enumerate(blocks):
            assert kind in LANGUAGES, f'{page}: {kind}'
            name = page.relative_to(ROOT).as_posix()
            elsewhere = kind == 'python' and (name in NOTEBOOKS or ELSEWHERE in text)
            if kind == language and not elsewhere:
                yield pytest.param(text, id=f'{name}:{number}')


@pytest.mark.parametrize('text', snippets('python'))
def test_python(text, tmp_path, monkeypatch):
    if '_base_' not in text:
        model = torch.nn.Sequential(
            WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4), torch.nn.ReLU()
        ).eval()
        exec(compile(text, 'snippet', 'exec'), dict(model=model, image=torch.randn(1, 3, 8, 8)))
        return
    pytest.importorskip('mmdet', reason='the snippet is a config')
    pytest.importorskip('mmseg', reason='the snippet is a config')
    from wsbcn_mm.openmmlab.config import load_config
    from wsbcn_mm.openmmlab.conversion import probe

    monkeypatch.chdir(ROOT)
    path = tmp_path / 'config.py'
    path.write_text(text)
    model = probe.build(load_config(str(path)))
    assert any(isinstance(module, BatchChannelNorm2d) for module in model.modules())


PRELUDE = """set -eu
note() { { for word in "$@"; do printf "%s\\0" "$word"; done; printf "\\1"; } >> "$NOTES"; }
"""


def calls(text, notes):
    """The commands of a bash block, as lists of words; ``notes`` is a file to keep them in."""
    notes.touch()
    stubs = ''.join(f'{name}() {{ note {name} "$@"; }}\n' for name in ('python', *PROGRAMS))
    done = subprocess.run(
        ['bash', '--norc', '-c', PRELUDE + stubs + text],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, NOTES=str(notes)),
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [call.split('\0')[:-1] for call in notes.read_text().split('\1')[:-1]]


@pytest.mark.parametrize('text', snippets('bash'))
def test_bash(text, tmp_path, monkeypatch):
    pytest.importorskip('mmdet', reason='the tools need mmdet')
    found = calls(text, tmp_path / 'notes')
    assert found
    for program, *arguments in found:
        files = [
            word for word in arguments if re.match(r'(tools|configs|tests|requirements)/', word)
        ]
        for word in files:
            assert (ROOT / word).exists(), word
        if program == 'python' and arguments[0] != '-m':
            accepted(ROOT / arguments[0], arguments[1:], monkeypatch)
        elif program == 'python':
            assert importlib.util.find_spec(arguments[1]) is not None, arguments[1]


def accepted(tool, arguments, monkeypatch):
    """The tool's own parser takes the arguments; one that does not ends the process."""
    monkeypatch.setattr(sys, 'argv', [str(tool), *arguments])
    monkeypatch.setattr(sys, 'path', [str(tool.parent), *sys.path])
    spec = importlib.util.spec_from_file_location(f'tool_{tool.stem}', tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert 'parse_args' in vars(module), f'{tool} has no parse_args'
    takes = inspect.signature(module.parse_args).parameters
    try:
        module.parse_args(arguments) if takes else module.parse_args()
    except SystemExit as ended:
        raise AssertionError(f'{tool.name} does not take {arguments}') from ended
