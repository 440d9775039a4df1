"""Gaps between the installed OpenMMLab and this package, closed once when it is imported.

Each function names the gap, and does nothing where it is not there:

- `find_packages_by_import_name`: ``_base_ = 'wsbcn_mm::...'`` and ``'mmdet::...'`` with setuptools
  >= 82 (no pkg_resources), in editable installs, and in the maintained fork, whose distributions
  have other names.
- `checkpoints.allow_checkpoint_globals`: torch >= 2.6 refuses the few harmless classes in
  mmengine's checkpoints. They go on torch's allow-list; the check itself stays on.
- `guarded_loaders.guard_loaders`: a checkpoint that is damaged, or would run code, is refused with
  its name and what to do, from disk or from an address.
- `stand_ins.apply`: a module that MMAction2's wheel lacks; torchvision, which MMPretrain imports
  for a few transforms.
- `torchvision_ops.apply`: mmcv without compiled operators, where the user asks for torchvision's.
- `fuse_standardized_weights`: mmcv's fuse_conv_bn would fold a BatchNorm into the raw weight.
- `complete_initialisation`: MMAction2's 3d networks start the last norm of each branch at 0, and
  ask for it as ``conv3.bn``, whatever norm it is. TridentNet's convolutions are left as the memory
  happened to be, unless a checkpoint fills them.

`require` tells the user what to install, with the command; `unwrapped` looks into the hosts'
wrappers of a model.
"""

import contextlib
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab import checkpoints, guarded_loaders, stand_ins, torchvision_ops
from wsbcn_mm.openmmlab.patches import surround

# import name -> (oldest version that is let pass, not tested; how to get the one that is tested)
PACKAGES = {
    'mmengine': ('0.10.0', 'pip install mmengine==0.10.7'),
    'mmcv': ('2.0.0', 'MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv==2.1.0'),
    'mmdet': ('3.0.0', 'pip install mmdet==3.3.0'),
    'mmseg': ('1.0.0', 'pip install mmsegmentation==1.2.2 ftfy regex'),
    'mmpretrain': ('1.0.0', 'pip install mmpretrain==1.2.0'),
    # Its wheel asks for opencv-contrib-python, another opencv over the one that is there.
    'mmaction': (
        '1.0.0',
        "pip install --no-deps mmaction2==1.2.0; pip install decord einops 'importlib_metadata<8'",
    ),
}


def apply() -> None:
    """Closes every gap; may be called more than once."""
    find_packages_by_import_name()
    checkpoints.allow_checkpoint_globals()
    guarded_loaders.guard_loaders()
    stand_ins.apply()
    if find_spec('mmcv') is not None:
        torchvision_ops.apply()
        fuse_standardized_weights()
        complete_initialisation()


def find_packages_by_import_name() -> None:
    """Makes ``_base_ = '<package>::...'`` look for what can be imported, ours included."""
    from mmengine.config import config
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE['wsbcn_mm'] = 'wsbcn_mm'
    surround(config, 'is_installed', _is_installed)
    surround(config, 'get_installed_path', _installed_path)
    surround(config.Config, '_get_cfg_path', _path_of_base)


def _is_installed(_original: Callable[..., bool], package: str) -> bool:
    return find_spec(_import_name(package)) is not None


def _installed_path(_original: Callable[..., str], package: str) -> str:
    return package_folder(package)


def _path_of_base(
    original: Callable[..., tuple[str, str | None]], cfg_path: str, filename: str
) -> tuple[str, str | None]:
    from mmengine.config.utils import MODULE2PACKAGE

    if not isinstance(cfg_path, str):
        raise TypeError(
            f'_base_ must be a path or a list of paths: got {cfg_path!r} (a comma at the end of a '
            'line makes a tuple)'
        )
    scope, _, name = cfg_path.rpartition('::')
    if scope not in MODULE2PACKAGE or '/' not in name or find_spec(scope) is None:
        return original(cfg_path, filename)
    # mmengine reads every metafile of the package first, a fifth of a second for each base, and
    # then takes this file all the same.
    configs = Path(package_folder(MODULE2PACKAGE[scope])) / '.mim' / 'configs'
    if not (configs / name).is_file():
        raise FileNotFoundError(
            f'{filename} inherits from {cfg_path!r}: {scope} has no such config'
            + near_names(name, configs)
        )
    # mmengine marks every dict of another package's config with that package's registry scope.
    # We have none: our layers are in the root registry, our configs name mmdet's or mmseg's.
    return str(configs / name), None if scope == 'wsbcn_mm' else scope


def near_names(path: str | Path, *folders: Path) -> str:
    """Lines that name the configs whose names resemble that of ``path``.

    Args:
        path: What was looked for; its own folder is searched, and nothing below it.
        *folders: Searched at any depth.
    """
    known = {}
    for folder in folders:
        if folder.is_dir():
            for file in folder.rglob('*.py'):
                if '_base_' not in file.parts:
                    known[file.stem] = file
    own = Path(path).parent
    if own.is_dir():
        known |= {file.stem: file for file in own.glob('*.py')}
    names = difflib.get_close_matches(Path(path).stem, known, n=3, cutoff=0.5)
    return ''.join(['\n  did you mean'] + [f'\n    {known[n]}' for n in names]) if names else ''


def _import_name(distribution: str) -> str:
    from mmengine.config.utils import MODULE2PACKAGE

    return {value: key for key, value in MODULE2PACKAGE.items()}.get(distribution, distribution)


def package_folder(distribution: str) -> str:
    """Where a package lies, by its import name or its distribution's."""
    name = _import_name(distribution)
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f'a config inherits from {name!r}, which is not installed')
    return str(Path(next(iter(spec.submodule_search_locations))))


def fuse_standardized_weights() -> None:
    """Lets mmcv's fuse_conv_bn fold a BatchNorm into the *standardized* weight of a WS conv."""
    # Not an attribute walk: `mmcv.cnn.utils.fuse_conv_bn` is the function of that name.
    module = importlib.import_module('mmcv.cnn.utils.fuse_conv_bn')
    surround(module, '_fuse_conv_bn', _fuse_standardized)


def _fuse_standardized(original: Callable[..., Any], conv: Any, bn: Any) -> Any:
    return original(conv.to_plain() if isinstance(conv, WeightStandardized) else conv, bn)


def complete_initialisation() -> None:
    """Lets BCN be found as the ``bn`` of its ConvModule meanwhile; initialises TridentConv."""
    from mmengine.model import BaseModule

    surround(BaseModule, 'init_weights', _init_weights)


def _init_weights(original: Callable[..., None], model: Any) -> None:
    _initialise_trident_convs(model)  # before a checkpoint is loaded
    with _named_bn(model):
        original(model)


def _initialise_trident_convs(backbone: Any) -> None:
    """As MMDetection initialises the other convolutions of this backbone."""
    from mmengine.model import kaiming_init

    trident = sys.modules.get('mmdet.models.backbones.trident_resnet')
    if trident is not None and isinstance(backbone, trident.TridentResNet):
        for module in backbone.modules():
            if isinstance(module, trident.TridentConv):
                kaiming_init(module)


@contextlib.contextmanager
def _named_bn(model: Any) -> Iterator[None]:
    from mmcv.cnn import ConvModule

    named = []
    for module in model.modules():
        if (
            isinstance(module, ConvModule)
            and isinstance(module.norm, BatchChannelNorm)
            and not hasattr(module, 'bn')
        ):
            # Beside its submodules: neither a parameter nor a name of the state dict is added.
            module.__dict__['bn'] = module.norm
            named.append(module)
    try:
        yield
    finally:
        for module in named:
            del module.__dict__['bn']


def unwrapped(model: Any) -> Any:
    """The model inside of mmengine's wrappers: several processes, test-time augmentation."""
    from mmengine.model import BaseTTAModel, is_model_wrapper

    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def require(*names: str) -> None:
    """Raises unless the named packages can be imported and are recent enough.

    Args:
        *names: Import names out of `PACKAGES`.

    Raises:
        ModuleNotFoundError: one is missing; the message holds the command that installs it.
        ImportError: one is too old, or mmcv lacks the compiled ops that mmdet needs.
    """
    for name in names:
        oldest, command = PACKAGES[name]
        if find_spec(name) is None:
            raise ModuleNotFoundError(f'{name} is not installed\n  {command}', name=name)
        found = _version_of(name)
        if _as_tuple(found) < _as_tuple(oldest):
            raise ImportError(f'{name} >= {oldest} is needed\n  got {found}\n  {command}')
    if 'mmdet' in names and find_spec('mmcv._ext') is None:
        raise ImportError(
            'mmdet needs the compiled ops of mmcv, and the installed mmcv has none (mmcv-lite, or '
            f'built without MMCV_WITH_OPS=1)\n  pip uninstall mmcv-lite mmcv; {PACKAGES["mmcv"][1]}'
            f'\n  or take NMS and RoIAlign of torchvision: {torchvision_ops.VARIABLE}=torchvision'
        )


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a fork: same import name, another distribution
        return importlib.import_module(name).__version__


def _as_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r'\d+', text)[:3])
