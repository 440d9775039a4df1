"""Shows a run as people look at it: a table, curves.png, and predictions.png from the pictures."""

import argparse
import json
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from PIL import Image

# What is worth a line of the table and a curve: key in scalars.json -> what people call it.
METRICS = {
    'coco/bbox_mAP': 'bbox mAP',
    'coco/segm_mAP': 'segm mAP',
    'mIoU': 'mIoU',
    'acc/top1': 'top-1 accuracy',  # of MMAction2
    'accuracy/top1': 'top-1 accuracy',  # of MMPretrain
}
PERCENT = ('mIoU', 'accuracy/top1')
# What to train on data of one's own, by metric: a config, and where its data lie.
NEXT = {
    'bbox mAP': ('configs/mask_rcnn/mask-rcnn_r50_fpn_ws-bcn_8xb1-scratch-6x_coco.py', 'data/coco'),
    'mIoU': (
        'configs/deeplabv3/deeplabv3_r101_ws-bcn_16xb1-scratch-50e_voc12-513x513.py',
        'data/VOCdevkit',
    ),
}


def read_scalars(work_dir: Path) -> list[dict]:
    """The records of the latest training run below a work dir.

    Raises:
        FileNotFoundError: no scalars.json there.
    """
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(f'no training log {work_dir}/<timestamp>/vis_data/scalars.json')
    return [json.loads(line) for line in files[-1].read_text().splitlines()]


def metrics_of(record: dict) -> dict[str, float]:
    """Metrics by name, in shares of one; some hosts give them in percent."""
    return {
        name: record[key] / 100 if key in PERCENT else record[key]
        for key, name in METRICS.items()
        if key in record
    }


def plot_curves(scalars: list[dict], target: Path, steps_per_epoch: float) -> None:
    """Loss against step, and every metric against the step at which it was evaluated."""
    train = [record for record in scalars if 'loss' in record]
    evaluated = [record for record in scalars if metrics_of(record)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for key in [k for k in train[0] if k.startswith('loss') or '.loss' in k]:
        left.plot(
            [r['step'] for r in train],
            [r.get(key) for r in train],
            label=key,
            linewidth=2.2 if key == 'loss' else 1,
        )
    left.set(xlabel='step', ylabel='training loss', ylim=(0, None))
    left.legend()
    for name in metrics_of(evaluated[-1]):
        values = [metrics_of(r)[name] for r in evaluated]
        steps = [r['step'] * steps_per_epoch for r in evaluated]
        right.plot(steps, values, 'o-', label=f'{name} {values[-1]:.3f}')
    right.set(xlabel='step', ylabel='validation', ylim=(0, 1))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)


def picture_sheet(folder: Path, target: Path) -> None:
    """The first eight pictures of a folder and of those in it, by their names, in one PNG."""
    found = [file for file in folder.rglob('*') if file.suffix in ('.png', '.jpg')]
    files = sorted(found, key=lambda file: (file.name, file))[:8]
    pictures = [Image.open(file).convert('RGB') for file in files]
    width, height = pictures[0].size
    columns = 1 if width > 4 * height else 2  # the frames of a clip
    rows = -(-len(pictures) // columns)
    sheet = Image.new('RGB', (columns * (width + 6) - 6, rows * (height + 6) - 6), 'white')
    for i, picture in enumerate(pictures):
        sheet.paste(
            picture.resize((width, height)),
            (i % columns * (width + 6), i // columns * (height + 6)),
        )
    sheet.save(target)


def steps_per_epoch(scalars: list[dict]) -> float:
    """Evaluations are logged by epoch where training counts epochs; curves are over steps."""
    last_train = max((r for r in scalars if 'loss' in r), key=lambda r: r['step'])
    last_evaluated = max(r['step'] for r in scalars if metrics_of(r))
    if 'epoch' not in last_train or last_evaluated > last_train['epoch']:
        return 1.0
    return last_train['step'] / last_train['epoch']


def latest_pictures(work_dir: Path) -> Path | None:
    """The folder that the last `test.py --show-dir` or `infer.py` below the work dir filled."""
    files = [*work_dir.glob('**/pictures/**/*.png'), *work_dir.glob('**/pictures/**/*.jpg')]
    if not files:
        return None
    last = max(files, key=lambda file: file.stat().st_mtime)
    return next(folder for folder in last.parents if folder.name == 'pictures')


def training_minutes(work_dir: Path) -> float:
    """From the first to the last line of the latest training log, evaluations included."""
    folder = max(path.parents[1] for path in work_dir.glob('*/vis_data/scalars.json'))
    times = [
        time.mktime(time.strptime(line[:19], '%Y/%m/%d %H:%M:%S'))
        for line in (folder / f'{folder.name}.log').read_text().splitlines()
        if line[:2] == '20' and line[4] == '/'
    ]
    return (times[-1] - times[0]) / 60


def main() -> None:
    """Writes the pictures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='folder of a training run')
    parser.add_argument('--started', type=int, help='start of the whole job, seconds since 1970')
    args = parser.parse_args()
    try:
        scalars = read_scalars(args.work_dir)
    except FileNotFoundError as error:
        sys.exit(f'error: {error}')

    curves = args.work_dir / 'curves.png'
    plot_curves(scalars, curves, steps_per_epoch(scalars))
    rows = [
        (name, f'{value:.3f}')
        for name, value in metrics_of([r for r in scalars if metrics_of(r)][-1]).items()
    ]
    rows.append(('training', f'{training_minutes(args.work_dir):.1f} min'))
    if args.started:
        rows.append(('in all', f'{(time.time() - args.started) / 60:.1f} min'))
    rows.append(('curves', str(curves)))
    pictures = latest_pictures(args.work_dir)
    if pictures is not None:
        sheet = args.work_dir / 'predictions.png'
        picture_sheet(pictures, sheet)
        rows += [('pictures', str(sheet)), ('', f'all of them: {pictures}')]
    checkpoint = (args.work_dir / 'last_checkpoint').read_text().strip()
    rows.append(('checkpoint', str(Path(checkpoint))))
    width = max(len(name) for name, _ in rows)
    print('\n' + '\n'.join(f'  {name:<{width}}  {value}' for name, value in rows))
    for name, (config, data) in NEXT.items():
        if any(name == row for row, _ in rows):
            print(
                f'\nYour own data, in the standard layout at {data}:\n'
                f'  {sys.executable} tools/train.py {config} --auto-scale-lr'
            )


if __name__ == '__main__':
    main()
