"""The project's speed and memory bars, checked against what was measured."""

from collections.abc import Iterable

from benchmark import host_time
from benchmark.detectors import FROZEN
from benchmark.sections import HELD
from benchmark.timing import BANDWIDTH_BYTES

BAR_SHAPES = ([1, 64, 200, 304], [1, 256, 200, 304], [2, 256, 50, 76], [1, 1024, 50, 76])
# By size of the image: a training step; evaluation with weights held, and standardized anew.
BACKBONE_BARS = (
    ([160, 192], 1.12, 1.05, 1.20),
    ([256, 320], 1.05, 1.05, 1.10),
    ([512, 640], 0.97, 1.05, None),
)
DTYPES = ('float32', 'float16', 'bfloat16')
LAYOUTS = ('nchw', 'channels_last')


def check(results: dict) -> list[dict]:
    """All bars: what, the value measured (None: not measured), the limit, and whether it is met."""
    return [*_host(results), *_cpu(results), *_memory(results), *_cuda(results)]


def _bar(what: str, value: float | None, limit: float, at_least: bool = False) -> dict:
    met = None
    if value is not None:
        value = round(value, 3)
        met = value >= limit if at_least else value <= limit
    return dict(bar=what, measured=value, limit=limit, at_least=at_least, met=met)


def _worst(values: Iterable[float], worst=max) -> float | None:
    return worst(values, default=None)


def _host(results: dict) -> list[dict]:
    device = results['machine']['device']
    found = {} if results['settings']['quick'] else results.get('host') or {}
    bars = _host_of(device, found)
    if device == 'cpu':
        bars += _host_of("the GPU's launcher", found.get('launcher') or {})
    return bars


def _host_of(what: str, found: dict) -> list[dict]:
    ratios = found.get('ratios', {})
    limits = dict(host_time.OURS, BCN=1.0) if what == 'cuda' else host_time.OURS
    bars = [
        _bar(f'host time, {what}: {name} / GN, forward + backward', ratios.get(name), limit)
        for name, limit in limits.items()
    ]
    return bars + [
        _bar(f'host time, {what}: what {name} adds to conv / GN', ratios.get(name), limit)
        for name, limit in host_time.CONVOLUTIONS.items()
    ]


def _cpu(results: dict) -> list[dict]:
    machine = results['machine']
    counts = machine['device'] == 'cpu' and machine['threads'] == 2
    norms, backbones = (
        [
            row
            for row in results.get(section) or []
            if counts and row['dtype'] == 'float32' and row['layout'] == 'nchw'
        ]
        for section in ('norm', 'backbone')
    )
    kind = 'CPU, float32, 2 threads'
    bars = []
    for shape in BAR_SHAPES:
        ratios = [r['peers']['BCN']['both']['ratio'] for r in norms if r['shape'] == shape]
        what = f'{kind}: BCN / GN, forward + backward, {tuple(shape)}'
        bars.append(_bar(what, _worst(ratios), 1.10))
    for size, *limits in BACKBONE_BARS:
        rows = [row for row in backbones if row['size'] == size]
        for (what, found), limit in zip(_of_backbone(rows).items(), limits):
            if limit is not None:
                where = f'{size[0]}x{size[1]}'
                bars.append(
                    _bar(f'{kind}: R50 WS + BCN / conv + GN, {what}, {where}', found, limit)
                )
    shares = [
        row['peers']['WS']['both']['ms'] / row['limit_ms']
        for row in results.get('ws') or []
        if counts and row['dtype'] == 'float32'
    ]
    what = f'{kind}: WS of all weights of R50, forward + backward / what copying allows'
    bars.append(_bar(what, _worst(shares), 1.30))
    return bars


def _of_backbone(rows: list[dict]) -> dict[str, float | None]:
    """The worst ratio of each kind of pass."""
    ours = 'WS + BCN'
    return {
        'training step': _worst(row['training'][ours]['both']['ratio'] for row in rows),
        'evaluation, weights held': _worst(
            row['evaluation'][f'{ours}{HELD}']['forward']['ratio'] for row in rows
        ),
        'evaluation': _worst(row['evaluation'][ours]['forward']['ratio'] for row in rows),
    }


def _memory(results: dict) -> list[dict]:
    # Of a large shape: what is kept per row and per group weighs nothing there.
    saved = [
        peers[name]['saved']
        for row in results.get('norm') or []
        if row['shape'] == BAR_SHAPES[1]
        for peers in [row['peers']]
        for name in ('BCN', 'BCN batch')
    ]
    what = 'saved for backward, BCN + in-place ReLU, multiples of the input'
    return [_bar(what, _worst(saved), 2.0)]


def _cuda(results: dict) -> list[dict]:
    counts = results['machine']['device'] == 'cuda'
    norms = (results.get('norm') or []) if counts else []
    backbones = [
        row for row in (results.get('backbone') or []) if counts and row['size'] == [800, 1333]
    ]
    bars = []
    for dtype in DTYPES:
        for layout in LAYOUTS:
            ratios = {
                r['peers']['BCN']['gpu']['both']['ratio']: tuple(r['shape'])
                for r in norms
                if (r['dtype'], r['layout']) == (dtype, layout)
            }
            worst = _worst(ratios)
            where = '' if worst is None else f', worst shape {ratios[worst]}'
            what = f'CUDA, {dtype}, {layout}: kernels of BCN / GN, forward + backward{where}'
            bars.append(_bar(what, worst, 1.00))
    shares = [r['share_of_copy_bandwidth']['both'] for r in norms if r['bytes'] > BANDWIDTH_BYTES]
    what = 'CUDA: share of copy bandwidth, tensors over 256 MB, worst'
    bars.append(_bar(what, _worst(shares, min), 0.85, at_least=True))
    shares = [r['ws_share']['alone'] for r in backbones if r['dtype'] != 'float32']
    bars.append(_bar('CUDA: share of WS in an AMP step, R50, 800x1333', _worst(shares), 0.02))
    for what, other, limit in (
        ('wall', 'conv + GN', 0.80),
        ('wall', 'conv + BN', 1.05),
        ('launches', 'conv + GN', 1.00),
        ('peak', 'conv + GN', 1.01),
        ('peak', 'conv + GN', 0.50),
    ):
        rows = [row for row in backbones if what in ('wall', *row['training']['WS + BCN'])]
        if limit == 0.50:
            rows = [row for row in rows if row['dtype'] != 'float32']
        worst = _worst(_step_ratio(row['training'], what, other) for row in rows)
        kind = ', AMP' if limit == 0.50 else ''
        bars.append(_bar(f'CUDA: R50 step, WS + BCN / {other}, {what}{kind}, worst', worst, limit))
    detectors = (results.get('detector') or []) if counts else []
    for other, limit in (('GN', 0.95), (FROZEN, 1.05)):
        steps = [row['peers'] for row in detectors]
        worst = _worst(s['WS + BCN']['step']['ms'] / s[other]['step']['ms'] for s in steps)
        bars.append(_bar(f'CUDA: Mask R-CNN step, WS + BCN / {other}, wall, worst', worst, limit))
    return bars


def _step_ratio(training: dict, what: str, other: str) -> float:
    ours, theirs = training['WS + BCN'], training[other]
    if what == 'wall':
        return ours['both']['ms'] / theirs['both']['ms']
    return ours[what] / theirs[what]
