"""``wsbcn-mm``: the tools by name, from wherever the package is installed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent / '.mim' / 'tools'
# Name -> (file, what it does).
COMMANDS = {
    'train': ('train.py', 'trains the model of any config'),
    'test': ('test.py', 'evaluates a checkpoint'),
    'infer': ('infer.py', 'runs an image, a video or a folder'),
    'convert': ('model_converters/convert_config.py', 'a config with WS + BCN'),
    'convert-checkpoint': ('model_converters/convert_checkpoint.py', 'published weights'),
    'recalibrate': ('model_converters/recalibrate.py', 'measures the running statistics again'),
    'audit': ('analysis_tools/audit.py', 'what is wrong for 1-2 images per GPU'),
    'find-lr': ('analysis_tools/find_lr.py', 'a learning rate for your data and batch'),
    'diagnose': ('analysis_tools/diagnose.py', 'why a model trains well or badly'),
    'fold': ('model_converters/fold.py', 'a model for the stock host'),
    'export': ('model_converters/export_onnx.py', 'a model as ONNX'),
    'backends': (None, 'which kernels can be used here, and why not'),
}


def usage() -> str:
    """What can be called, one line each."""
    lines = [f'  {name:<20} {what}' for name, (_, what) in COMMANDS.items()]
    return '\n'.join(['usage: wsbcn-mm COMMAND ... (COMMAND --help says more)', *lines])


def main() -> None:
    """Runs a tool with the arguments behind its name."""
    name = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if name in ('-h', '--help'):
        print(usage())
        return
    if name not in COMMANDS:
        sys.exit(f'error: no command {name!r}\n{usage()}')
    file = COMMANDS[name][0]
    sys.argv = [f'wsbcn-mm {name}', *sys.argv[2:]]
    if file is None:
        runpy.run_module('wsbcn_mm.backends', run_name='__main__')
    else:
        runpy.run_path(str(TOOLS / file), run_name='__main__')


if __name__ == '__main__':
    main()
