"""The page of diagnose.py: explanations, plots and tables in one HTML file."""

import base64
import html
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

KEYS = {
    'activations',
    'checkpoint',
    'config',
    'estimates',
    'gradients',
    'images',
    'layers',
    'smoothness',
    'step_size',
    'summary',
}
THIS, OTHER = '#0a6c74', '#d98032'

# Measure -> (what people call it, what it means, where it should be).
MEASURES = {
    'skill': (
        'skill',
        'share that is right of what the commonest class leaves open; of boxes: the share found',
        'near 1',
    ),
    'loss_fallen': (
        'fall of the loss',
        'from the first to the last tenth of the training that made the checkpoint',
        'large',
    ),
    'dead_channels': (
        'dead channels',
        'share of channels that their ReLU switches off in every image',
        '0',
    ),
    'singularity_distance': (
        'distance to singularities',
        'mean over channels of min(1, 2 × share of values above zero); ours',
        'near 1',
    ),
    'stat_spread': (
        'spread of channel statistics',
        'how much means and deviations differ between channels, in units of the layer’s rms; ours',
        'small',
    ),
    'mean_gap': ('gap of the estimated mean', 'in standard deviations of the data', 'near 0'),
    'drift_share': (
        'drifting estimates',
        'share of channels whose estimated mean is off by more than half a deviation, or whose '
        'deviation by more than a factor 1.5',
        '0',
    ),
    'gradient_ratio': (
        'gradient against the WS bound',
        '|dL/dw| in shares of |dL/dŵ| / σ, mean over WS convolutions',
        'at most 1',
    ),
    'loss_range': (
        'loss range',
        'highest minus lowest loss from half to four times the step',
        'small',
    ),
    'beta': (
        'effective β-smoothness',
        'largest change of the gradient per distance gone; compares nets with weights of like norm',
        'small',
    ),
}

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1060px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em} h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:1em 0} td,th{padding:.3em .8em;text-align:left;
border-bottom:1px solid #e4e4e4} td.n{text-align:right;font-variant-numeric:tabular-nums}
img{max-width:100%} small,.quiet{color:#666} .this{color:#0a6c74} .other{color:#b9651b}
li.bad{color:#b00} li.doubtful{color:#9a6700}
details{margin:1em 0} code{background:#f3f3f3;padding:.1em .3em;overflow-wrap:anywhere}
"""


def read_numbers(path: str) -> dict:
    """A diagnostics.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not one of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no file {path}')
    try:
        numbers = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(numbers, dict) or not set(numbers) >= KEYS:
        raise ValueError(f'{path} was not written by diagnose.py')
    return numbers


def write_page(numbers: dict, target: Path, other: dict | None = None) -> None:
    """Writes the page.

    Args:
        numbers: What `wsbcn_mm.openmmlab.measure.diagnosis.diagnose` returned.
        target: The HTML file.
        other: Numbers of another model, drawn beside these.
    """
    models = [(numbers, THIS, 'this model')]
    if other is not None:
        models.append((other, OTHER, 'the other'))
    names = ' against '.join(html.escape(Path(m['config']).stem) for m, _, _ in models)
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f'<title>Diagnosis: {names}</title><style>{STYLE}</style></head><body>',
        f'<h1>Diagnosis: {names}</h1>',
        *(_origin(*model) for model in models),
        '<h2>In short</h2>',
        *(_verdict(numbers, label) for numbers, _, label in models),
        _summary(models),
        *_switched_off(models),
        '<h2>Are the running estimates right?</h2>',
        _estimates(models),
        '<h2>Does Weight Standardization smooth the gradient?</h2>',
        _gradients(models),
        '<h2>How far does the gradient hold?</h2>',
        f'<p>Along the gradient from half to four times a step of {numbers["step_size"]:g} '
        '(Santurkar et al., arXiv 1805.11604): a smooth loss goes down evenly, and the gradient at '
        'the new point is near the one that led there. One line a training batch.</p>',
        _picture(_plot_smoothness(models), 'loss and gradient along the step'),
        '<h2>All layers</h2>',
        *(_table(numbers, label) for numbers, _, label in models),
        '</body></html>',
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text('\n'.join(parts), encoding='utf-8')


def _origin(numbers: dict, colour: str, label: str) -> str:
    kind = 'this' if colour == THIS else 'other'
    return (
        f'<p><b class="{kind}">{label}</b>: <code>{html.escape(Path(numbers["config"]).name)}'
        f'</code>, checkpoint <code>{html.escape(numbers["checkpoint"])}</code>; '
        f'{html.escape(", ".join(f"{n} {kind}" for kind, n in numbers["layers"].items()))}; '
        f'{numbers["images"]} validation images, {len(numbers["smoothness"])} training batches</p>'
    )


def _verdict(numbers: dict, label: str) -> str:
    lines = [
        f'<li class="{finding["level"]}">{html.escape(finding["text"])}'
        + (f' <small>try: {html.escape(finding["advice"])}</small>' if finding['advice'] else '')
        + '</li>'
        for finding in numbers.get('verdict', [])  # older files have none
    ]
    return f'<p>{label}:</p><ul>{"".join(lines)}</ul>' if lines else ''


def _switched_off(models: list) -> list[str]:
    """Singularities and channels; nothing for networks without ReLU."""
    models = [model for model in models if model[0]['activations']]
    if not models:
        return ['<h2>Are channels switched off?</h2><p>No ReLU ran in this network.</p>']
    return [
        '<h2>Are channels switched off?</h2>',
        '<p>A channel whose ReLU is off for every input takes no part any more, nor does it get a '
        'gradient: an elimination singularity (arXiv 1911.09738). Layers from input to output.</p>',
        _picture(plot_singularities(models), 'dead channels and distance by layer'),
        '<p>Each dot is a channel: mean and deviation of what its ReLU gets, in units of the '
        'layer’s rms. Behind a BatchNorm all lie close together, near (0, 1); a channel far left '
        'of the line is off almost always (mean below −2 deviations).</p>',
        _picture(plot_channels(models), 'mean and deviation of every channel'),
    ]


def _summary(models: list) -> str:
    head = ''.join(f'<th class="n">{label}</th>' for _, _, label in models)
    rows = [f'<table><tr><th>measure</th>{head}<th>good</th><th>what it is</th></tr>']
    for key, (name, meaning, good) in MEASURES.items():
        values = [m['summary'].get(key) for m, _, _ in models]
        if all(value is None for value in values):
            continue
        cells = ''.join(
            f'<td class="n">{"–" if v is None else format(v, ".3g")}</td>' for v in values
        )
        rows.append(
            f'<tr><td><b>{name}</b></td>{cells}<td>{good}</td><td><small>{meaning}</small></td></tr>'
        )
    return '\n'.join([*rows, '</table>'])


def _picture(figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def plot_singularities(models: list):
    """Three measures by layer; ``models`` holds (numbers, colour, label)."""
    figure, axes = plt.subplots(3, 1, figsize=(9.5, 7.5), sharex=True, constrained_layout=True)
    keys = ('dead_channels', 'singularity_distance', 'stat_spread')
    labels = ('share of dead channels', 'distance to singularities', 'spread of statistics')
    for axis, key, title in zip(axes, keys, labels):
        for i, (numbers, colour, label) in enumerate(models):
            values = [layer[key] for layer in numbers['activations'].values()]
            width = 0.8 / len(models)
            places = np.arange(len(values)) + (i - (len(models) - 1) / 2) * width
            axis.bar(places, values, width, color=colour, label=label)
        axis.set_ylabel(title)
        axis.grid(axis='y', alpha=0.3)
        # Fixed, so that two pages can be laid side by side.
        axis.set_ylim(0, 1 if key != 'stat_spread' else 1.5)
    names = list(models[0][0]['activations'])
    axes[-1].set_xticks(range(len(names)), [_short(n) for n in names], rotation=90, fontsize=7)
    axes[0].legend()
    return figure


def _short(name: str) -> str:
    for long, short in (
        ('backbone.', ''),
        ('decode_head.', 'head.'),
        ('roi_head.', ''),
        ('.activate', ''),
        ('auxiliary_head.', 'aux.'),
        ('_modules', ''),
    ):
        name = name.replace(long, short)
    return name


def plot_channels(models: list):
    """Mean and deviation of every channel; ``models`` as above."""
    figure, axes = plt.subplots(
        1, len(models), figsize=(5 * len(models), 4.4), squeeze=False, constrained_layout=True
    )
    for axis, (numbers, colour, label) in zip(axes[0], models):
        for layer in numbers['activations'].values():
            mean, std = np.array(layer['mean']), np.array(layer['std'])
            rms = np.sqrt(np.mean(mean**2 + std**2)) or 1
            dead = np.array(layer['dead_share']) == 1
            axis.plot(mean / rms, std / rms, '.', color=colour, alpha=0.25, markersize=4)
            axis.plot(mean[dead] / rms, std[dead] / rms, 'x', color='#c00', markersize=5)
        axis.plot([0, -3], [0, 1.5], color='#999', linewidth=1)
        axis.set(
            xlim=(-3, 3),
            ylim=(0, 2.5),
            title=f'{label} (red: dead)',
            xlabel='mean / rms',
            ylabel='deviation / rms',
        )
        axis.grid(alpha=0.3)
    return figure


def _estimates(models: list) -> str:
    models = [m for m in models if m[0]['estimates']]
    if not models:
        return '<p>No layer has running estimates.</p>'
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), constrained_layout=True)
    for numbers, colour, label in models:
        layers = numbers['estimates'].values()
        for axis, key in zip(axes, ('mean_gap', 'std_ratio')):
            middle = [np.median(layer[key]) for layer in layers]
            low = [np.quantile(layer[key], 0.1) for layer in layers]
            high = [np.quantile(layer[key], 0.9) for layer in layers]
            axis.plot(middle, 'o-', color=colour, label=label, markersize=3)
            axis.fill_between(range(len(middle)), low, high, color=colour, alpha=0.2)
    axes[0].set(xlabel='layer', ylabel='|running mean − mean| / deviation', ylim=(0, None))
    axes[1].set(
        xlabel='layer', ylabel='running deviation / deviation', yscale='log', ylim=(0.4, 2.5)
    )
    axes[1].set_yticks([0.5, 0.67, 1, 1.5, 2], ['0.5', '0.67', '1', '1.5', '2'])
    axes[1].minorticks_off()
    axes[1].axhline(1, color='#999', linewidth=1)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    return (
        '<p>What the layers with running statistics divide by in evaluation, against what the '
        'validation images really show there: median and middle 80 % of the channels.</p>'
        + _picture(figure, 'running estimates against the data')
    )


def _gradients(models: list) -> str:
    figure, axis = plt.subplots(figsize=(9.5, 3.6), constrained_layout=True)
    standardized = False
    for numbers, colour, label in models:
        values = list(numbers['gradients'].values())
        axis.plot([v['norm'] for v in values], 'o-', color=colour, markersize=3, label=label)
        bounds = [v['bound'] if v['bound'] is not None else np.nan for v in values]
        if not np.all(np.isnan(bounds)):
            standardized = True
            axis.plot(bounds, '_', color=colour, markersize=9, label=f'{label}: bound')
    axis.set(xlabel='convolution', ylabel='|dL/dw|', yscale='log')
    axis.grid(alpha=0.3)
    axis.legend()
    text = (
        'Each raw weight’s gradient and the bound |dL/dŵ| / σ: WS takes the parts of the gradient '
        'along the mean and along the weight itself away.'
        if standardized
        else 'No convolution is weight-standardized: there is no bound.'
    )
    return f'<p>{text}</p>' + _picture(figure, 'weight gradients by layer')


def _plot_smoothness(models: list):
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), constrained_layout=True)
    for numbers, colour, label in models:
        for i, step in enumerate(numbers['smoothness']):
            name = label if i == 0 else None
            steps = [0, *step['step_sizes']]
            axes[0].plot(steps, [step['loss'], *step['losses']], 'o-', color=colour, label=name)
            relative = [d / step['gradient_norm'] for d in step['gradient_distances']]
            axes[1].plot(step['step_sizes'], relative, 'o-', color=colour, label=name)
    axes[0].set(xlabel='step size', ylabel='loss of the batch')
    axes[1].set(xlabel='step size', ylabel='|gradient there − here| / |here|', ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def _table(numbers: dict, label: str) -> str:
    rows = [
        f'<details><summary>ReLUs of {label}</summary><table><tr><th>layer</th><th>channels</th>'
        '<th>dead</th><th>distance</th><th>spread</th><th>σ<sub>μ</sub></th>'
        '<th>σ<sub>σ</sub></th></tr>'
    ]
    for name, layer in numbers['activations'].items():
        cells = [len(layer['mean'])] + [
            f'{layer[key]:.3g}'
            for key in (
                'dead_channels',
                'singularity_distance',
                'stat_spread',
                'sigma_mu',
                'sigma_sigma',
            )
        ]
        rows.append(
            f'<tr><td><code>{html.escape(name)}</code></td>'
            + ''.join(f'<td class="n">{cell}</td>' for cell in cells)
            + '</tr>'
        )
    return '\n'.join([*rows, '</table></details>'])
