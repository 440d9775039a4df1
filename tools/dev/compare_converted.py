"""Trains an upstream config and its WS + BCN version at one image per step, and plots the losses.

Both start from random weights, with the same seed, data order, learning rate and schedule (the
converted one's), and nothing frozen: what differs is the layers, and `EstimatesHook` beside them.
Afterwards the loss of the validation images is taken, in evaluation: with running statistics.
The data: a folder with train.json, val.json and images/ (COCO format) for mmdet, or a VOC layout
with ImageSets/Segmentation/{train,val}.txt and classes.txt for mmseg.

Run it again, with the same -n or a larger one, and training goes on from the last checkpoint: a
long comparison may be cut into pieces. The losses are kept in --record; -n 0 trains nothing and
draws what is there.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a clone not installed


KINDS = ('original', 'converted')
COLORS = {'original': 'tab:gray', 'converted': 'C0'}
CHECKPOINT_INTERVAL = 50  # iterations that an interruption can cost


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', nargs='*', help='mmdet::... or mmseg::... names')
    parser.add_argument('--data', nargs='+', default=[], help='a data folder per source')
    parser.add_argument('-n', '--iterations', type=int, default=400, help='0: plot what is there')
    parser.add_argument('-o', '--out', default='work_dirs/compare_converted', help='folder')
    parser.add_argument('--record', default='work_dirs/compare_converted/losses.json', help='JSON')
    parser.add_argument('--plot', help='PNG to draw')
    parser.add_argument('--size', type=int, default=160, help='pixels of an image')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=KINDS, help='train this one alone')
    return parser.parse_args()


def detection_data(root: str, size: int, split: str = 'train') -> tuple[dict, int]:
    """The dataset of a COCO-format folder, and its number of classes."""
    names = json.loads((Path(root) / 'train.json').read_text())['categories']
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(size, size), keep_ratio=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs'),
    ]
    return dict(
        type='CocoDataset',
        data_root=root,
        ann_file=f'{split}.json',
        pipeline=pipeline,
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=tuple(c['name'] for c in names)),
        filter_cfg=dict(filter_empty_gt=True),
    ), len(names)


def segmentation_data(root: str, size: int, split: str = 'train') -> tuple[dict, int]:
    """The dataset of a VOC-layout folder with classes.txt, and its number of classes."""
    names = (Path(root) / 'classes.txt').read_text().split()
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='Resize', scale=(2 * size, round(1.25 * size)), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(size, size), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackSegInputs'),
    ]
    return dict(
        type='BaseSegDataset',
        data_root=root,
        ann_file=f'ImageSets/Segmentation/{split}.txt',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        metainfo=dict(classes=tuple(names)),
        pipeline=pipeline,
    ), len(names)


def data_of(scope: str):
    """The function that makes the dataset of a host."""
    return detection_data if scope == 'mmdet' else segmentation_data


def configure(source: str, data: str, kind: str, args: argparse.Namespace):
    """The config of one run."""
    from wsbcn_mm.openmmlab.conversion.convert import convert_config
    from wsbcn_mm.openmmlab.registry import ESTIMATES_HOOK

    conversion = convert_config(source)
    cfg = conversion.cfg
    if kind == 'original':  # everything as converted, the layers as they were
        cfg.model = conversion.original.model
        unfreeze(cfg.model)
    detection = cfg.default_scope == 'mmdet'
    dataset, classes = data_of(cfg.default_scope)(data, args.size)
    set_classes(cfg.model, classes)
    cfg.train_dataloader = dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type='InfiniteSampler', shuffle=True),
        dataset=dataset,
    )
    for name in ('val', 'test'):
        for key in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{name}_{key}'] = None
    if detection:
        cfg.model.data_preprocessor.pad_size_divisor = 32
        cfg.model.data_preprocessor.batch_augments = None
    else:
        cfg.model.data_preprocessor.size = (args.size, args.size)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=args.iterations)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=50)
    ]
    cfg.optim_wrapper.clip_grad = dict(max_norm=35)
    cfg.default_hooks = dict(
        logger=dict(type='LoggerHook', interval=10),
        checkpoint=dict(
            type='AtomicCheckpointHook',
            by_epoch=False,
            interval=CHECKPOINT_INTERVAL,
            max_keep_ckpts=1,
        ),
    )
    cfg.resume = True  # from the latest checkpoint of the work dir, if there is one
    # Other hooks of the source (EMA, switches of pipelines) are for its own schedule.
    ours = [hook for hook in cfg.custom_hooks if hook.type == ESTIMATES_HOOK]
    cfg.custom_hooks = [] if kind == 'original' else ours
    cfg.log_processor = dict(by_epoch=False)
    cfg.randomness = dict(seed=args.seed)
    cfg.work_dir = str(work_dir(source, kind, args))
    return cfg


def work_dir(source: str, kind: str, args: argparse.Namespace) -> Path:
    """The folder of one run; another seed or size is another run."""
    return Path(args.out) / f'{Path(source).stem}_{kind}_{args.size}px_seed{args.seed}'


def unfreeze(value: object) -> None:
    """No checkpoint, nothing frozen: both runs learn from random weights."""
    if isinstance(value, dict):
        for key, item in list(value.items()):
            if key == 'norm_eval':
                value[key] = False
            elif key == 'frozen_stages':
                value[key] = -1
            elif key == 'pretrained' or (key == 'init_cfg' and 'checkpoint' in (item or {})):
                value[key] = None
            unfreeze(item)


def set_classes(value: object, classes: int) -> None:
    """The number of classes, wherever it stands."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == 'num_classes':
                value[key] = classes
            set_classes(item, classes)


def validation_loss(runner, data: str, args: argparse.Namespace) -> float:
    """The mean loss of the validation images in evaluation: running statistics, no dropout."""
    import torch
    from mmengine.runner import set_random_seed

    dataset, _ = data_of(runner.cfg.default_scope)(data, args.size, 'val')
    loader = runner.build_dataloader(
        dict(
            batch_size=1,
            num_workers=0,
            dataset=dataset,
            sampler=dict(type='DefaultSampler', shuffle=False),
        )
    )
    set_random_seed(args.seed)  # the same crops for both
    model, losses = runner.model.eval(), []
    with torch.no_grad():
        for batch in loader:
            batch = model.data_preprocessor(batch, training=True)  # pads as in training
            losses.append(model.parse_losses(model(**batch, mode='loss'))[0].item())
    return round(sum(losses) / len(losses), 4)


def losses_of(folder: Path) -> dict[int, float]:
    """Losses by iteration of all pieces of a run; each is a mean over ten."""
    losses = {}
    for log in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in map(json.loads, log.read_text().splitlines()):
            if 'loss' in line:  # iterations after a checkpoint come again, the later ones count
                losses[line['step']] = round(line['loss'], 4)
    return dict(sorted(losses.items()))


def plot(record: dict, file: str) -> None:
    """One panel per source, the losses of both runs; what is off the scale is at its upper end."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(record), figsize=(6 * len(record), 4), squeeze=False)
    for axis, (source, entry) in zip(axes[0], record.items()):
        for kind, label in (('original', 'as shipped (BN)'), ('converted', 'converted (WS + BCN)')):
            losses = entry.get(kind, {})
            axis.plot([int(n) for n in losses], losses.values(), color=COLORS[kind], label=label)
        top = 1.1 * max(loss for kind in KINDS for loss in entry.get(kind, {'0': 1.0}).values())
        for kind, value in entry.get('validation', {}).items():
            color, label = COLORS[kind], f'validation, {kind}: {value:.4g}'
            end = max(map(int, entry[kind]))
            axis.plot(end, min(value, top), 'D' if value < top else '^', color=color, label=label)
        axis.set(
            title=f'{source}\n{entry["data"]}, {entry["size"]} px, seed {entry["seed"]}',
            xlabel='iteration, one image each',
            ylabel='training loss (mean of 10)',
        )
        axis.title.set_fontsize(9)
        axis.set_ylim(0, 1.02 * top)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Trains what is asked for, keeps and prints the losses, plots."""
    args = parse_args()
    if len(args.data) != len(args.source):
        sys.exit('error: --data needs a folder per source')
    from wsbcn_mm.openmmlab import files

    path = Path(args.record)
    record = json.loads(path.read_text()) if path.is_file() else {}
    for source, data in zip(args.source, args.data):
        settings = dict(data=Path(data).name, size=args.size, seed=args.seed)
        entry = record.setdefault(source, settings)
        if {key: entry[key] for key in settings} != settings:
            sys.exit(f'error: {path} holds {source} with other settings: name another --record')
        for kind in KINDS if args.only is None else (args.only,):
            if args.iterations:
                from mmengine.runner import Runner

                runner = Runner.from_cfg(configure(source, data, kind, args))
                runner.train()
                validation = validation_loss(runner, data, args)
                entry.setdefault('validation', {})[kind] = validation
            entry[kind] = losses_of(work_dir(source, kind, args)) or entry.get(kind, {})
            files.write_atomically(path, (json.dumps(record, indent=1) + '\n').encode())
    for source, entry in record.items():
        for kind in KINDS:
            steps = list(entry.get(kind, {}).items())
            if steps:
                (first, before), (last, after) = steps[0], steps[-1]
                validation = entry.get('validation', {}).get(kind, 'unknown')
                print(
                    f'{source} {kind}: loss {before:.3f} at iteration {first}, {after:.3f} at '
                    f'{last}, validation {validation} (seed {entry["seed"]})'
                )
    if args.plot:
        plot(record, args.plot)


if __name__ == '__main__':
    main()
