"""Evaluates a trained model and what fold.py makes of it, the latter without this package.

Folds with tools/model_converters/fold.py, and evaluates three times on the test data: the trained
model; the folded files, in a process of the stock host in which wsbcn_mm cannot be imported; these
again after ``mmcv.cnn.fuse_conv_bn``. Prints the metrics as a table; of a classifier also how far
the score of any class moved at most, and how many samples kept their class. The exit status is 1
where a metric moved by more than 0.001 of itself.

Modules that MMPretrain and MMAction2 import and that are not there (torchvision beside a CPU build
of torch, one that MMAction2's wheel forgot) are empty in the stock process.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # also from a clone not installed

TRAINED, FOLDED, FUSED = 'trained', 'folded, stock', 'stock, after fuse_conv_bn'
EVALUATE = """
import json, sys
from types import ModuleType

class Empty(ModuleType):
    __version__, __path__ = '0', []
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})

kind, config, checkpoint, folder, missing = sys.argv[1:]
if kind == 'trained':
    import wsbcn_mm.openmmlab
else:
    sys.modules['wsbcn_mm'] = None  # importing it fails
    for name in json.loads(missing):
        module = sys.modules[name] = Empty(name)
        parent, _, child = name.rpartition('.')
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)

from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.runner import Runner

cfg = Config.fromfile(config)
cfg.load_from, cfg.resume, cfg.work_dir, cfg.launcher = checkpoint, False, folder, 'none'
cfg.log_level = 'WARNING'
if cfg.get('default_scope') in ('mmpretrain', 'mmaction'):  # their models score every class
    dump = dict(type='mmengine.DumpResults', out_file_path=f'{folder}/scores.pkl')
    found = cfg.test_evaluator
    cfg.test_evaluator = [*(found if isinstance(found, list) else [found]), dump]
runner = Runner.from_cfg(cfg)
runner.load_or_resume()
if 'fuse_conv_bn' in kind:
    runner.model = fuse_conv_bn(runner.model)
metrics = {key: float(value) for key, value in runner.test().items()}
with open(f'{folder}/metrics.json', 'w') as file:
    json.dump(metrics, file)
"""


def parse_args() -> argparse.Namespace:
    """The command line."""
    from wsbcn_mm.openmmlab import command_line

    return command_line.parser_of(__doc__).parse_args()


def evaluate(kind: str, config: str, checkpoint: str, folder: Path) -> dict[str, Any]:
    """What a process of its own finds: the metrics, and the scores where it has some."""
    from wsbcn_mm.openmmlab import stand_ins

    folder.mkdir()
    missing = [] if find_spec('torchvision') else list(stand_ins.TORCHVISION)
    if stand_ins.DRN in sys.modules:  # stands in this process for a file that is not there
        missing.append(stand_ins.DRN)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    if kind == TRAINED:
        environment['PYTHONPATH'] = str(ROOT)
    parts = [kind, config, checkpoint, str(folder), json.dumps(missing)]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', EVALUATE, *parts],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f'error: {kind}: the evaluation failed\n{done.stderr[-3000:]}')
    result: dict[str, Any] = dict(metrics=json.loads((folder / 'metrics.json').read_text()))
    if (folder / 'scores.pkl').is_file():
        import torch

        with (folder / 'scores.pkl').open('rb') as file:
            samples = pickle.load(file)  # written by the process above
        result['scores'] = torch.stack([sample['pred_score'] for sample in samples])
    return result


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per metric; of scores, what moved."""
    lines = [f'| | {" | ".join(found)} |', '|---' * (len(found) + 1) + '|']
    for name in found[TRAINED]['metrics']:
        values = [f'{result["metrics"][name]:.4f}' for result in found.values()]
        lines.append(f'| {name} | {" | ".join(values)} |')
    scores = {kind: result['scores'] for kind, result in found.items() if 'scores' in result}
    if scores:
        trained = scores[TRAINED]
        moved = [f'{(other - trained).abs().max():.1e}' for other in scores.values()]
        same = [int((other.argmax(1) == trained.argmax(1)).sum()) for other in scores.values()]
        lines += [
            f'| largest difference of a score | {" | ".join(moved)} |',
            f'| same class, of {len(trained)} samples | {" | ".join(map(str, same))} |',
        ]
    return '\n'.join(lines)


def main() -> None:
    """Folds, evaluates, compares."""
    args = parse_args()
    from wsbcn_mm.openmmlab import config
    from wsbcn_mm.openmmlab.deploy.fold import METRICS_TOLERANCE

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.load_config(args.config, args.cfg_options).dump(folder / 'trained.py')
        fold = ROOT / 'tools/model_converters/fold.py'
        source = [str(folder / 'trained.py'), args.checkpoint]
        command = [sys.executable, str(fold), *source, '-o', name]
        if subprocess.run(command, check=False).returncode:
            sys.exit('error: nothing to compare')
        files = [str(folder / f'trained_folded{suffix}') for suffix in ('.py', '.pth')]
        places = (source, files, files)
        found = {
            kind: evaluate(kind, config_file, checkpoint, folder / kind)
            for kind, (config_file, checkpoint) in zip((TRAINED, FOLDED, FUSED), places)
        }
    print(table(found))
    before = found[TRAINED]['metrics']
    for kind, result in found.items():
        for metric, value in before.items():
            if not abs(result['metrics'][metric] - value) <= METRICS_TOLERANCE * abs(value):
                sys.exit(f'{kind}: {metric} is {result["metrics"][metric]}, trained {value}')


if __name__ == '__main__':
    main()
