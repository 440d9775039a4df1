"""Checkpoints of others in this package's layout: pure functions from state dict to state dict.

`convert_state` takes the tensors of a published file and names them as OpenMMLab's models with WS +
BCN or WS + GN do; every key is accounted for. What each source holds:

- ``authors-bcn``: the authors' BCN + WS models. Norms ``bnX.weight``, ``bnX.bias`` (1, G, 1) and an
  inner BatchNorm ``bnX.pbn``; trained with the formula ``'var_eps'``. Every tensor has its place.
- ``authors-gn-ws``, ``openmmlab-gn-ws``: GN + WS, norms with (C,) scales, formula ``'std_eps'``.
  To BCN + WS the function is preserved: the outer affine is GroupNorm's (``affine='channel'``) and
  the batch stage is the identity; `wsbcn_mm.recalibration` can measure the statistics and keep it
  so.
- ``openmmlab-bn``, ``torchvision``, ``timm``: plain BatchNorm networks. Standardizing their weights
  is **not** function-preserving: a starting point. Scales and shifts of BatchNorm become those of
  the batch stage, and its statistics are divided as the weights are.

Backbones (keys ``conv1.weight``, ``layer1.0.bn1.weight``, ...) and, from OpenMMLab, whole models.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wsbcn_mm.checks import check_choice

SOURCES = ('authors-bcn', 'authors-gn-ws', 'openmmlab-gn-ws', 'openmmlab-bn', 'torchvision', 'timm')
TARGETS = ('bcn-ws', 'gn-ws')
# The WS formula that the weights were trained with; None: without WS, so that ours is free.
FORMULAS = {'authors-bcn': 'var_eps', 'authors-gn-ws': 'std_eps', 'openmmlab-gn-ws': 'std_eps'}
EPS = 1e-5

_NORM = re.compile(r'(?:bn|gn|norm|bcn)(\d*)')
_BACKBONE = re.compile(
    r'(?:backbone\.)?(?:conv1|(?:bn|gn|norm)1|layer\d+\.\d+\.(?:conv\d|(?:bn|gn|norm)\d'
    r'|downsample\.\d))\.(?:pbn\.)?\w+'
)


@dataclass
class Conversion:
    """What `convert_state` made.

    Attributes:
        state: The new state dict.
        moved: ``(old key, new key)``, in the order of the source.
        added: Keys that the source has nothing for, with what they were set to.
        dropped: Keys that the target has no place for, with the reason; nothing is wrong with that.
        left: Keys that should have moved and did not, with the reason.
        formula: The WS formula for the layers that take it: ``conv_cfg=dict(formula=...)``.
        affine: That of the BCN layers, ``norm_cfg=dict(affine=...)``; None for GN.
        num_groups: Of the norms.
        preserves: Whether the new model computes what the old one did.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    moved: list[tuple[str, str]] = field(default_factory=list)
    added: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    formula: str = 'paper'
    affine: str | None = None
    num_groups: int = 32
    preserves: bool = True


def convert_state(
    state: dict[str, Tensor], source: str, target: str, num_groups: int = 32
) -> Conversion:
    """Renames and, where the layers differ, rewrites the tensors of a checkpoint.

    Args:
        state: Tensors by name; a leading ``module.`` is passed over. Not changed.
        source: One of `SOURCES`; see the module.
        target: ``'bcn-ws'`` (norms ``bcnX``) or ``'gn-ws'`` (norms ``gnX``), in OpenMMLab's layout.
        num_groups: G of the norms. The files of the authors with BCN say it themselves.

    Returns:
        The conversion. It is complete only where its ``left`` is empty.

    Raises:
        ValueError: an unknown source or target, a state dict of another layout (the message says
            of which), two keys that would get the same name, or a target that the source cannot
            become.
    """
    check_choice(source, SOURCES, 'source')
    check_choice(target, TARGETS, 'target')
    if source == 'authors-bcn' and target == 'gn-ws':
        raise ValueError(
            'BCN + WS cannot become GN + WS: its batch stage scales every channel of a '
            'standardized convolution, for which GN + WS has no place\n'
            '  to run it without this package, fold it: tools/model_converters/fold.py'
        )
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    found = guess_source(state)
    if _kind(source) != _kind(found):
        raise ValueError(
            f'this state dict is not in the layout {source!r}\n'
            f'  it looks like {found!r}; its first keys: {", ".join(list(state)[:3])}'
        )
    result = Conversion(num_groups=num_groups, formula=FORMULAS.get(source, 'paper'))
    result.preserves = _kind(source) != 'bn'
    if target == 'bcn-ws':
        result.affine = 'channel' if _kind(source) == 'gn' else 'group'
    whole = source.startswith('openmmlab') and any(key.startswith('backbone.') for key in state)
    norms = _norms(state)
    for key, value in state.items():
        path, _, tail = key.rpartition('.')
        if path.removesuffix('.pbn') in norms:
            continue  # below, all tensors of a norm together
        if not whole and re.match(r'(fc|classifier|head)\.', key):
            result.dropped[key] = 'the classifier; detectors and segmenters have heads of their own'
        elif whole or (_BACKBONE.fullmatch(key) and tail == 'weight' and value.dim() == 4):
            _move(result, key, key, value)
        else:
            result.left[key] = 'no place for it in a ResNet or ResNeXt with a plain 7x7 stem'
    for path in norms:
        _convert_norm(result, state, path, source, target, whole)
    order = {key: i for i, key in enumerate(state)}
    result.moved.sort(key=lambda pair: order[pair[0]])
    twice = [key for key, count in Counter(new for _, new in result.moved).items() if count > 1]
    if twice:
        raise ValueError(f'two keys of the checkpoint would both become {twice[0]}')
    return result


def guess_source(state: dict[str, Tensor]) -> str:
    """The layout that the keys and shapes of a state dict look like; one name per kind of norm."""
    keys = [key.removeprefix('module.') for key in state]
    if any('.pbn.' in key for key in keys):
        return 'authors-bcn'
    if any(key.endswith('.batch_weight') for key in keys):
        return 'bcn-ws'
    if any(key.endswith('.running_mean') for key in keys):
        return 'openmmlab-bn'
    return 'openmmlab-gn-ws'


def name_in_mmaction(name: str, target: str, shifted: bool) -> str:
    """The name that a tensor of a backbone has in MMAction2's networks, whose layers are modules.

    ``layer1.0.conv2.weight`` is ``layer1.0.conv2.conv.weight`` there, and ``layer1.0.bcn2.weight``
    is ``layer1.0.conv2.bcn.weight``.

    Args:
        name: In OpenMMLab's layout: what `convert_state` gives.
        target: One of `TARGETS`.
        shifted: Of `ResNetTSM` up to 50 layers: the first convolution of each block is inside of a
            temporal shift.
    """
    norm = 'bcn' if target == 'bcn-ws' else 'gn'
    name = re.sub(r'(^|\.)conv(\d)\.(weight|bias)$', r'\1conv\2.conv.\3', name)
    name = re.sub(r'(^|\.)(bcn|gn)(\d)\.', r'\1conv\3.\2.', name)
    name = name.replace('.downsample.0.', '.downsample.conv.')
    name = name.replace('.downsample.1.', f'.downsample.{norm}.')
    if shifted:
        name = re.sub(r'^(layer\d\.\d+\.conv1\.conv)\.', r'\1.net.', name)
    return name


def _kind(source: str) -> str:
    if source in ('authors-bcn', 'bcn-ws'):
        return source
    return 'gn' if 'gn' in source else 'bn'


def _norms(state: dict[str, Tensor]) -> list[str]:
    """Paths of the modules that are norms: by name or, in a Sequential, by shape."""
    paths = []
    for key, value in state.items():
        path, _, tail = key.rpartition('.')
        name = path.rpartition('.')[2]
        in_sequence = name.isdigit() and value.dim() in (1, 3)  # shortcuts, deep stems
        if tail == 'weight' and (_NORM.fullmatch(name) or in_sequence):
            paths.append(path)
    return paths


def _convert_norm(
    result: Conversion, state: dict[str, Tensor], path: str, source: str, target: str, whole: bool
) -> None:
    """Moves the tensors of one norm, and adds what the new one has besides."""
    own = {k: v for k, v in state.items() if k.rpartition('.')[0].removesuffix('.pbn') == path}
    if not whole and not _BACKBONE.fullmatch(f'{path}.weight'):
        reason = 'no place for it in a ResNet or ResNeXt with a plain 7x7 stem'
        result.left.update(dict.fromkeys(own, reason))
        return
    holder, _, name = path.rpartition('.')
    match = _NORM.fullmatch(name)
    new = path
    if match:
        new = ('bcn' if target == 'bcn-ws' else 'gn') + match[1]
        new = f'{holder}.{new}' if holder else new
    kind = _kind(source)
    if kind == 'authors-bcn':
        names = {
            'weight': 'weight',
            'bias': 'bias',
            'pbn.weight': 'batch_weight',
            'pbn.bias': 'batch_bias',
            'pbn.running_mean': 'bn.running_mean',
            'pbn.running_var': 'bn.running_var',
            'pbn.num_batches_tracked': 'bn.num_batches_tracked',
        }
    elif kind == 'gn' or target == 'gn-ws':
        names = {'weight': 'weight', 'bias': 'bias'}
    else:
        names = {
            'weight': 'batch_weight',
            'bias': 'batch_bias',
            'running_mean': 'bn.running_mean',
            'running_var': 'bn.running_var',
            'num_batches_tracked': 'bn.num_batches_tracked',
        }
    channels = own[f'{path}.pbn.weight' if kind == 'authors-bcn' else f'{path}.weight'].numel()
    divisor = _divisor(state, path) if kind == 'bn' and target == 'bcn-ws' else None
    for key, value in own.items():
        tail = key.removeprefix(f'{path}.')
        if tail not in names:
            if kind == 'bn' and target == 'gn-ws':
                result.dropped[key] = 'GroupNorm keeps no statistics'
            else:
                result.left[key] = f'a norm of {source} has no such tensor'
            continue
        if kind == 'authors-bcn' and tail in ('weight', 'bias'):
            value = value.flatten()  # (1, G, 1)
            result.num_groups = value.numel()
        elif value.dim() > 0 and value.shape != (channels,):
            result.left[key] = f'shape {tuple(value.shape)}, expected ({channels},)'
            continue
        if divisor is not None and tail in ('running_mean', 'running_var'):
            value = value / (divisor if tail == 'running_mean' else divisor.square())
        _move(result, key, f'{new}.{names[tail]}', value)
    missing = [tail for tail in names if f'{path}.{tail}' not in own and 'tracked' not in tail]
    for tail in missing:
        result.left[f'{path}.{tail}'] = 'is not in the checkpoint'
    if target == 'bcn-ws':
        _add(result, new, kind, channels, state[f'{path}.weight'])


def _add(result: Conversion, new: str, kind: str, channels: int, like: Tensor) -> None:
    """What a BCN has and the source's norm has not: the stage that changes nothing."""
    if kind == 'gn':
        # (1 + eps)^0.5 / (1 + eps)^0.5: exactly the identity.
        values = dict(batch_weight=(1 + EPS) ** 0.5, batch_bias=0.0)
        sizes = dict.fromkeys(values, channels)
        values |= {'bn.running_mean': 0.0, 'bn.running_var': 1.0}
        sizes |= {'bn.running_mean': channels, 'bn.running_var': channels}
    elif kind == 'bn':
        values = dict(weight=1.0, bias=0.0)
        sizes = dict.fromkeys(values, result.num_groups)
        if channels % result.num_groups:
            raise ValueError(
                f'{new} has {channels} channels, which {result.num_groups} groups do not divide\n'
                '  give another num_groups, and the same to the config'
            )
    else:
        values, sizes = {}, {}
    for tail, value in values.items():
        result.state[f'{new}.{tail}'] = like.new_full((sizes[tail],), value)
        result.added[f'{new}.{tail}'] = f'{value:g}'
    tracked = f'{new}.bn.num_batches_tracked'
    if tracked not in result.state:
        result.state[tracked] = torch.tensor(0)
        result.added[tracked] = '0'


def _divisor(state: dict[str, Tensor], path: str) -> Tensor | None:
    """What WS divides the filters of the convolution in front of a norm by; None: none found."""
    holder, _, name = path.rpartition('.')
    number = _NORM.fullmatch(name)
    if number is None:  # in a Sequential
        conv = f'{holder}.{int(name) - 1}.weight'
    else:
        conv = f'{holder}.conv{number[1]}.weight'.removeprefix('.')
    weight = state.get(conv)
    if weight is None or weight.dim() != 4:
        return None
    var = weight.flatten(1).double().var(1, correction=0)
    return (var + EPS).sqrt().to(weight.dtype)


def _move(result: Conversion, old: str, new: str, value: Tensor) -> None:
    result.moved.append((old, new))
    result.state[new] = value
