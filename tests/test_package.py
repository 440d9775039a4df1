"""The package as a whole: what it needs, what it imports from where, and that it is documented."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import wsbcn_mm

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / 'wsbcn_mm'
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mmaction')


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
    'command': 5,
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
    'networks': 0,
    'reference': 0,
    'version': 0,
}
# Rooms of openmmlab, and the roof: they import from the modules beside them, and of each other only
# these. The modules beside them import from no room; its __init__ registers what is in them.
ROOMS = {
    'audit': {'conversion'},
    'command_line': {'data', 'explain'},
    'conversion': {'explain'},
    'data': set(),
    'datasets': set(),
    'deploy': {'data', 'datasets', 'explain'},
    'explain': {'data'},
    'hooks': {'data', 'measure'},
    'measure': {'command_line', 'data', 'explain'},
}


def python_files(*folders: str) -> list[str]:
    """Sources below the folders, relative to the repository."""
    return sorted(
        path.relative_to(REPOSITORY).as_posix()
        for folder in folders
        for path in (REPOSITORY / folder).rglob('*.py')
        # .mim links to configs and tools, for OpenMMLab's installer.
        if not any(part.startswith('.') for part in path.relative_to(REPOSITORY).parts)
    )


def parsed(path: str) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text())


SOURCES = python_files('wsbcn_mm')


def module_of(path: str) -> str:
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def imported_names(source: str, package: str) -> Iterator[str]:
    """Every dotted name that a source imports, also inside functions; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')[: len(package.split('.')) + 1 - node.level]
            prefix = '.'.join([*base, node.module or ''] if node.level else [node.module])
            # `from wsbcn_mm import layers` imports wsbcn_mm.layers.
            yield from (f'{prefix.rstrip(".")}.{alias.name}' for alias in node.names)


def violations(path: str, source: str) -> Iterator[str]:
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
        other, _, rest = rest.partition('.')
        if other == unit == 'openmmlab' and parts[2] != '__init__':
            room, other = parts[2], rest.partition('.')[0]
            allowed = {room, *ROOMS.get(room, ())}
            if other in ROOMS and other not in allowed:
                yield f'{path} imports {name}: not below {room}'
        elif other != unit and (other not in LEVELS or LEVELS[other] >= LEVELS[unit]):
            yield f'{path} imports {name}: not below {unit}'


def test_imports_point_one_way():
    for path in SOURCES:
        unit = path.split('/')[1].removesuffix('.py')
        assert unit in LEVELS or unit == '__init__', f'give {unit} its place in LEVELS'
    assert [v for path in SOURCES for v in violations(path, (REPOSITORY / path).read_text())] == []
    rooms = {p.parent.name for p in (PACKAGE / 'openmmlab').glob('*/__init__.py')}
    assert rooms | {'command_line'} == ROOMS.keys()


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
        ('wsbcn_mm/folding/plan.py', 'from tools import train'),
        ('wsbcn_mm/openmmlab/config.py', 'from wsbcn_mm.openmmlab.deploy import stock'),
        ('wsbcn_mm/openmmlab/config.py', 'from wsbcn_mm.openmmlab import conversion'),
        ('wsbcn_mm/openmmlab/conversion/probe.py', 'from wsbcn_mm.openmmlab.deploy import stock'),
        ('wsbcn_mm/openmmlab/measure/diagnosis.py', 'from ..hooks import diagnostics'),
    ],
)
def test_imports_against_the_direction_are_found(path, source):
    assert len(list(violations(path, source))) == 1


def imports_between(sources: dict[str, str]) -> dict[str, set[str]]:
    """For each module of the package: the modules of it that its source imports from."""

    def module_holding(name: str) -> str:
        while name not in modules:
            name = name.rpartition('.')[0]
        return name

    modules = {module_of(path) for path in sources}
    return {
        module_of(path): {
            module_holding(name)
            for name in imported_names(source, path.rpartition('/')[0].replace('/', '.'))
            if name.partition('.')[0] == 'wsbcn_mm'
        }
        - {module_of(path)}
        for path, source in sources.items()
    }


def test_no_module_imports_itself_by_way_of_others():
    sources = {path: (REPOSITORY / path).read_text() for path in SOURCES}
    imports = imports_between(sources)
    assert imports['wsbcn_mm.functional'] >= {'wsbcn_mm.checks'}  # it sees what is there
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle
    below, above = 'wsbcn_mm/backends/autograd.py', 'wsbcn_mm/layers/conv.py'
    assert module_of(below) in imports[module_of(above)]
    sources[below] += '\nfrom wsbcn_mm.layers import conv\n'
    with pytest.raises(CycleError):
        TopologicalSorter(imports_between(sources)).prepare()


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
# Files and functions that can be taken in

MAX_LINES, MAX_PARAMETERS = 500, 8
OURS = ['setup.py', *python_files('wsbcn_mm', 'tools', 'tests', 'configs')]
# Functions with more parameters: the two functions and the layer, whose arguments are the user's,
# and their specification. The operators have more, for a schema knows no carriers; but no function
# of ours has the arguments of a schema (tests/backends/test_contract.py).
MANY_PARAMETERS = {
    'wsbcn_mm/functional.py': {'batch_channel_norm'},
    'wsbcn_mm/layers/norm.py': {'BatchChannelNorm.__init__'},
    'wsbcn_mm/reference.py': {'batch_channel_norm', 'normalize'},
}


def functions_of(tree: ast.AST, prefix: str = '') -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions_of(node, f'{prefix}{node.name}.')
        elif isinstance(node, ast.FunctionDef):
            yield f'{prefix}{node.name}', node
            yield from functions_of(node, f'{prefix}{node.name}.')
        else:
            yield from functions_of(node, prefix)


def num_parameters(function: ast.FunctionDef) -> int:
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len(names) - (names[:1] in (['self'], ['cls'])) + bool(a.vararg) + bool(a.kwarg)


def is_triton(path: str, function: ast.FunctionDef) -> bool:
    """A kernel in Triton's language, whose arguments are those of its launch."""
    decorators = ' '.join(map(ast.unparse, function.decorator_list))
    return path.startswith('wsbcn_mm/backends/triton/') and 'triton.jit' in decorators


def too_many_parameters(path: str, tree: ast.Module) -> list[str]:
    return [
        f'{path}: {name} has {num_parameters(function)} parameters'
        for name, function in functions_of(tree)
        if num_parameters(function) > MAX_PARAMETERS
        and name not in MANY_PARAMETERS.get(path, ())
        and not is_triton(path, function)
    ]


def test_no_file_is_too_long():
    lines = {path: len((REPOSITORY / path).read_text().splitlines()) for path in OURS}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_no_function_has_too_many_parameters():
    assert [line for path in OURS for line in too_many_parameters(path, parsed(path))] == []
    for path, names in MANY_PARAMETERS.items():  # and no exception outlives its function
        functions = dict(functions_of(parsed(path)))
        assert all(num_parameters(functions[name]) > MAX_PARAMETERS for name in names)
    nine = ast.parse('class A:\n    def f(self, a, b, c, d, e, f, g, *h, i): ...')
    assert too_many_parameters('wsbcn_mm/audit.py', nine) == [
        'wsbcn_mm/audit.py: A.f has 9 parameters'
    ]


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names with an underscore that a file takes from another file of ours."""
    modules = {module_of(path) for path in OURS}
    imported = set()  # names that stand for modules of ours
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f'{node.module}.'.startswith(TOP_LEVEL):
            for alias in node.names:
                if alias.name.startswith('_') and not alias.name.startswith('__'):
                    yield f'{node.module}.{alias.name}'
                if f'{node.module}.{alias.name}' in modules:
                    imported.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in imported
            and node.attr.startswith('_')
            and not node.attr.startswith('__')
        ):
            yield f'{node.value.id}.{node.attr}'


TOP_LEVEL = ('wsbcn_mm.', 'benchmark.', 'experiments.', 'tests.')


def test_no_file_takes_a_private_name_of_another():
    assert [f'{path}: {name}' for path in OURS for name in private_names(parsed(path))] == []
    source = 'from wsbcn_mm.structure import _fits\nfrom wsbcn_mm import audit\naudit._norms()'
    assert list(private_names(ast.parse(source))) == ['wsbcn_mm.structure._fits', 'audit._norms']


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


@pytest.mark.parametrize(
    'name', ['audit', 'backends', 'convert', 'diagnostics', 'estimates', 'recalibration']
)
def test_modules_that_the_pages_name_are_there_after_the_import(name):
    assert inspect.ismodule(vars(wsbcn_mm)[name])
