"""What `python -m build` makes, and that it installs with and without a compiler.

Everything here looks at the built files, never at the tree: what is forgotten in MANIFEST.in or in
setup.py is missing here, too.
"""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NAME = 'mask-rcnn_r50_fpn_ws-bcn_4xb2-2x_coco'
# Two layers, two passes: the line about missing kernels must come once. Then, where there is mmdet,
# a config that inherits from the installed ones by name.
USE = """
import torch, warnings, wsbcn_mm
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    for _ in range(2):
        for norm in wsbcn_mm.BatchChannelNorm2d(4, 2), wsbcn_mm.BatchChannelNorm2d(4, 2):
            y = norm(torch.randn(1, 4, 3, 3))
print(wsbcn_mm.__file__)
print(*[str(w.message) for w in said if 'wsbcn_mm' in str(w.message)], sep='|')
try:
    import mmdet
except ImportError:
    raise SystemExit
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile('mine.py')
init_default_scope('mmdet')
with torch.device('meta'):
    model = MODELS.build(cfg.model)
print(type(model).__name__, type(model.backbone.norm1).__name__)
"""


def run(*command, folder, **environment):
    # PYTHONPATH: a tree on it would stand in front of what was installed.
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )


def shipped(root):
    """What the tree would ship of a folder: every file but compiled and cached ones."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / root, followlinks=True)
        for path in (Path(folder, name) for name in names)
        if '__pycache__' not in path.parts and path.suffix not in ('.so', '.pyc')
    }


@pytest.fixture(scope='module')
def metadata(distributions):
    with zipfile.ZipFile(distributions.wheel) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith('.dist-info/METADATA')]
        return email.message_from_bytes(wheel.read(name))


def test_the_sdist_has_every_file_that_a_build_needs(distributions):
    with tarfile.open(distributions.sdist) as sdist:
        files = {name.partition('/')[2] for name in sdist.getnames()}
    assert shipped('wsbcn_mm') | shipped('configs') | shipped('tools') <= files
    assert shipped('requirements') | {'LICENSE', 'README.md', 'CHANGELOG.md', 'setup.py'} <= files
    assert not [name for name in files if name.endswith('.so') or '__pycache__' in name]


def test_the_wheel_has_the_whole_package(distributions):
    with zipfile.ZipFile(distributions.wheel) as wheel:
        files = {name for name in wheel.namelist() if name.startswith('wsbcn_mm/')}
        (licence,) = [n for n in wheel.namelist() if n.endswith('.dist-info/licenses/LICENSE')]
        assert wheel.read(licence) == (ROOT / 'LICENSE').read_bytes()
    kept = ('.cpp', '.h', '.clang-format')  # for those who compile
    sources = {name for name in shipped('wsbcn_mm') if name.endswith(kept)}
    assert files == shipped('wsbcn_mm') - sources


def test_metadata(metadata):
    assert metadata['Name'] == 'wsbcn_mm'
    assert metadata['License'] == 'Apache-2.0'
    assert metadata['Description-Content-Type'] == 'text/markdown'
    assert metadata.get_payload().lstrip().startswith('# wsbcn_mm')
    needed = [line for line in metadata.get_all('Requires-Dist') if 'extra ==' not in line]
    assert len(needed) == 1 and needed[0].startswith('torch>=')
    assert {'openmmlab', 'dev'} <= set(metadata.get_all('Provides-Extra'))


@pytest.fixture(scope='module')
def printed(installed, tmp_path_factory):
    """By a process that uses what was installed, from a folder of its own."""
    folder = tmp_path_factory.mktemp('outside')
    (folder / 'mine.py').write_text(
        f"_base_ = 'wsbcn_mm::mask_rcnn/{NAME}.py'\nmodel = dict(backbone=dict(init_cfg=None))\n"
    )
    used = run('-W', 'ignore', '-c', USE, folder=folder, PYTHONPATH=str(installed))
    assert used.returncode == 0, used.stderr[-2000:]
    return used.stdout.splitlines()


def test_a_wheel_without_kernels_says_so_once(installed, printed):
    file, said, *_ = printed
    assert Path(file).is_relative_to(installed)
    assert 'the CPU kernels are not compiled' in said and '|' not in said


def test_a_config_outside_inherits_from_the_installed_package(printed):
    pytest.importorskip('mmdet', reason='the config inherits from mmdet')
    assert printed[-1] == 'MaskRCNN BatchChannelNorm2d'


@pytest.fixture
def build(distributions, tmp_path):
    """Compiles the kernels of the unpacked sdist with a compiler that fails."""
    with tarfile.open(distributions.sdist) as sdist:
        sdist.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()

    def build(**environment):
        command = ('setup.py', 'build_ext', '--inplace')
        return run(*command, folder=folder, CXX='false', CC='false', **environment)

    return build


def test_a_compiler_that_fails_leaves_a_package_without_kernels(build):
    done = build()
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'warning: the CPU kernels were not compiled' in done.stderr


def test_a_compiler_that_fails_is_an_error_where_kernels_are_asked_for(build):
    assert build(WSBCN_BUILD='1').returncode != 0


def test_the_build_may_be_skipped(build):
    done = build(WSBCN_BUILD='0')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'not compiled' not in done.stderr
