"""Packaging of wsbcn_mm; ``import wsbcn_mm`` needs torch alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def pins(name: str) -> list[str]:
    """The requirements of requirements/<name>.txt."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in (line.partition('#')[0].strip() for line in lines) if line]


setup(
    name='wsbcn_mm',
    version=re.search(r"'(.+)'", (ROOT / 'wsbcn_mm' / 'version.py').read_text())[1],
    description='Weight Standardization and Batch-Channel Normalization for MMDetection and '
    'MMSegmentation: training with 1-2 images per GPU',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['wsbcn_mm', 'wsbcn_mm.*']),
    # Where mim and `_base_ = 'wsbcn_mm::...'` look for configs; links in the repository, copies in
    # an installed package.
    package_data={'wsbcn_mm': ['.mim/model-index.yml', '.mim/configs/**/*', '.mim/tools/**/*']},
    include_package_data=False,
    install_requires=['torch>=2.1'],
    extras_require={'openmmlab': pins('openmmlab'), 'dev': pins('dev')},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    zip_safe=False,
)
