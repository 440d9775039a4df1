"""The package as a whole: what it needs, what it imports from where, and that it is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import wsbcn_mm

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / 'wsbcn_mm'
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmseg')


def run_python(code):
    return subprocess.run(
        [sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


# ----------------------------------------------------------------------------------------------
# `import wsbcn_mm` with torch alone

WITH_TORCH_ALONE = """
import importlib.util, sys, warnings

class Without:
    '''A finder that sees everything except OpenMMLab, as if it were not installed.'''
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in {names!r}:
    assert importlib.util.find_spec(name) is None
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + ' can be imported: this test would show nothing')

import torch

def touched(*args, **kwargs):
    raise AssertionError('CUDA was touched while wsbcn_mm was imported')

for name in ('_lazy_init', 'is_available', 'device_count', 'current_device',
             'get_device_capability', 'get_device_properties', 'init'):
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, touched)

before = set(sys.modules)
warnings.simplefilter('error')
import wsbcn_mm

assert not torch.cuda.is_initialized()
new = {{name.partition('.')[0] for name in set(sys.modules) - before}}
print(sorted(new - set(sys.stdlib_module_names)))
norm = wsbcn_mm.BatchChannelNorm2d(8, 4)
conv = wsbcn_mm.WSConv2d(3, 8, 3)
print(tuple(norm(conv(torch.zeros(1, 3, 5, 5))).shape))
"""


def test_import_and_use_with_torch_alone():
    result = run_python(WITH_TORCH_ALONE.format(names=OPENMMLAB))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''
    loaded, shape = result.stdout.splitlines()
    assert set(ast.literal_eval(loaded)) <= {'wsbcn_mm', 'torch'}
    assert shape == '(1, 8, 3, 3)'


# ----------------------------------------------------------------------------------------------
# Imports point one way

# A module may import from its own unit and from units of a lower level. A unit is the first name
# after `wsbcn_mm`: a module, or a package with all that is in it.
LEVELS = {
    'openmmlab': 5,
    'audit': 4,
    'checkpoint_layouts': 4,
    'convert': 4,
    'diagnostics': 4,
    'estimates': 4,
    'folding': 4,
    'recalibration': 4,
    'shapes': 4,
    'layers': 3,
    'structure': 3,
    'functional': 2,
    'backends': 1,
    'distributed': 1,
    'checks': 0,
    'compat': 0,
    'reference': 0,
    'version': 0,
}
SOURCES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in PACKAGE.rglob('*.py')
    # .mim links to configs and tools, for OpenMMLab's installer.
    if not any(part.startswith('.') for part in path.relative_to(PACKAGE).parts)
)


def imported_names(source, package):
    """Every dotted name that a source imports, also inside functions; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')[: len(package.split('.')) + 1 - node.level]
            prefix = '.'.join([*base, node.module or ''] if node.level else [node.module])
            # `from wsbcn_mm import layers` imports wsbcn_mm.layers.
            yield from (f'{prefix.rstrip(".")}.{alias.name}' for alias in node.names)


def violations(path, source):
    """What a file of the package imports against the direction; `path` as in SOURCES."""
    parts = path.removesuffix('.py').split('/')
    unit = parts[1]
    for name in imported_names(source, '.'.join(parts[:-1])):
        top, _, rest = name.partition('.')
        if top in OPENMMLAB and unit != 'openmmlab':
            yield f'{path} imports {name}: only wsbcn_mm/openmmlab may'
        if top in ('tools', 'tests', 'configs'):
            yield f'{path} imports {name}'
        if top != 'wsbcn_mm' or unit == '__init__':
            continue
        other = rest.partition('.')[0]
        if other == unit:
            continue
        if other not in LEVELS or LEVELS[other] >= LEVELS[unit]:
            yield f'{path} imports {name}: not below {unit}'


@pytest.mark.parametrize('path', SOURCES)
def test_imports_point_one_way(path):
    unit = path.split('/')[1].removesuffix('.py')
    assert unit in LEVELS or unit == '__init__', f'give {unit} its place in LEVELS'
    assert list(violations(path, (REPOSITORY / path).read_text())) == []


@pytest.mark.parametrize(
    'path, source',
    [
        ('wsbcn_mm/layers/norm.py', 'import mmengine'),
        ('wsbcn_mm/backends/eager.py', 'def f():\n    from mmcv.cnn import ConvModule'),
        ('wsbcn_mm/functional.py', 'from wsbcn_mm import layers'),
        ('wsbcn_mm/functional.py', 'from wsbcn_mm.layers import WSConv2d'),
        ('wsbcn_mm/functional.py', 'from .layers import WSConv2d'),
        ('wsbcn_mm/backends/eager.py', 'from ..functional import MODES'),
        ('wsbcn_mm/backends/eager.py', 'import wsbcn_mm.functional as f'),
        ('wsbcn_mm/reference.py', 'from wsbcn_mm import batch_channel_norm'),
        ('wsbcn_mm/reference.py', 'import wsbcn_mm'),
        ('wsbcn_mm/audit.py', 'from wsbcn_mm.openmmlab import config'),
        ('wsbcn_mm/folding.py', 'from tools import train'),
    ],
)
def test_imports_against_the_direction_are_found(path, source):
    assert len(list(violations(path, source))) == 1


def test_core_needs_torch_and_the_standard_library_only():
    allowed = {'torch', 'triton', 'wsbcn_mm', *sys.stdlib_module_names}
    core = ('functional', 'layers', 'reference', 'backends', 'distributed', '__init__')
    files = [path for path in SOURCES if path.split('/')[1].removesuffix('.py') in core]
    assert len(files) >= 5
    for path in files:
        package = path.rpartition('/')[0].replace('/', '.')
        names = imported_names((REPOSITORY / path).read_text(), package)
        assert {name.partition('.')[0] for name in names} <= allowed, path


# ----------------------------------------------------------------------------------------------
# Public names


def test_all_lists_the_public_names():
    assert wsbcn_mm.__all__ == sorted(wsbcn_mm.__all__)
    public = {
        name
        for name, value in vars(wsbcn_mm).items()
        if not name.startswith('_') and not inspect.ismodule(value) and name != 'find_spec'
    }
    assert public | {'__version__'} == set(wsbcn_mm.__all__)


@pytest.mark.parametrize('name', [n for n in wsbcn_mm.__all__ if n != '__version__'])
def test_public_names_are_documented(name):
    value = getattr(wsbcn_mm, name)
    assert 'Args:' in vars(value).get('__doc__', '') if inspect.isclass(value) else value.__doc__
    if inspect.isclass(value):
        for base in value.__mro__:
            if base.__module__.startswith('wsbcn_mm'):
                undocumented = [
                    f'{base.__name__}.{attribute}'
                    for attribute, member in vars(base).items()
                    if not attribute.startswith('_') and callable(member) and not member.__doc__
                ]
                assert undocumented == []


def test_version_is_a_version():
    major, minor, patch = wsbcn_mm.__version__.split('.')[:3]
    assert major.isdigit() and minor.isdigit() and patch[0].isdigit()
