"""Packaging of wsbcn_mm; ``import wsbcn_mm`` needs torch alone.

The CPU kernels are compiled where torch and a C++ compiler are there. torch is there only without
build isolation: ``pip install --no-build-isolation .``; WSBCN_BUILD=1 makes a missing or failed
build an error, WSBCN_BUILD=0 skips it. The package works without them, more slowly.
"""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def pins(name: str) -> list[str]:
    """The requirements of requirements/<name>.txt."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in (line.partition('#')[0].strip() for line in lines) if line]


def files(folder: str, pattern: str) -> list[str]:
    """The files of a folder, relative to this one, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


def marked() -> str:
    """A source that says which operators are compiled: others are not loaded."""
    schemas = run_path(str(ROOT / 'wsbcn_mm' / 'backends' / 'schemas.py'))
    text = f'extern const char mark[];\nconst char mark[] = "{schemas["mark"]().decode()}";\n'
    path = ROOT / 'build' / 'mark.cpp'
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path.relative_to(ROOT))


def cpu_kernels() -> dict:
    """The arguments of setup() that compile the CPU kernels; empty where they are not compiled."""
    wanted = os.environ.get('WSBCN_BUILD', 'auto')
    if wanted == '0':
        return {}
    if find_spec('torch') is None:
        if wanted == '1':
            sys.exit('error: WSBCN_BUILD=1 needs torch at build time: add --no-build-isolation')
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                self.extensions[0].sources.append(marked())
                super().run()
            except Exception as error:
                if wanted == '1':
                    raise
                self.extensions = []  # nothing to copy into an editable install
                print(f'warning: the CPU kernels were not compiled: {error}', file=sys.stderr)

    # One extension, for what it shares; neither CUDA nor a GPU is needed.
    folders = [f'wsbcn_mm/backends/{name}' for name in ('nodes', 'cpu', 'triton/host')]
    extension = CppExtension(
        'wsbcn_mm.backends.cpu._kernels',
        [file for folder in folders for file in files(folder, '*.cpp')],
        depends=[file for folder in folders for file in files(folder, '*.h')],
        # OpenMP at compile time only: at run time torch's own library must be found, because a
        # second one would keep threads of its own.
        # Wno-psabi: vectors are passed between inlined functions only.
        extra_compile_args=['-O3', '-g0', '-fno-math-errno', '-Wno-psabi']
        + (['-fopenmp'] if sys.platform == 'linux' else []),
    )
    return dict(ext_modules=[extension], cmdclass=dict(build_ext=Build))


setup(
    name='wsbcn_mm',
    version=re.search(r"'(.+)'", (ROOT / 'wsbcn_mm' / 'version.py').read_text())[1],
    description='Weight Standardization and Batch-Channel Normalization for MMDetection, '
    'MMSegmentation, MMPretrain and MMAction2: training with 1-2 images per GPU',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='normalization, weight standardization, small batches, detection, segmentation',
    project_urls={'Paper': 'https://arxiv.org/abs/1903.10520'},
    python_requires='>=3.10',
    packages=find_packages(include=['wsbcn_mm', 'wsbcn_mm.*']),
    # Where mim and `_base_ = 'wsbcn_mm::...'` look for configs; links in the repository, copies in
    # an installed package.
    package_data={
        'wsbcn_mm': ['py.typed', '.mim/model-index.yml', '.mim/configs/**/*', '.mim/tools/**/*']
    },
    include_package_data=False,
    entry_points=dict(console_scripts=['wsbcn-mm=wsbcn_mm.command:main']),
    install_requires=['torch>=2.6'],  # wsbcn_mm/compat.py says up to which it was tested
    extras_require={name: pins(name) for name in ('openmmlab', 'classification', 'video', 'dev')},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: C++',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    zip_safe=False,
    **cpu_kernels(),
)
