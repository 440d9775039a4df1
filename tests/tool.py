"""Tools as a user calls them, in this process: a new one imports OpenMMLab for 5 to 8 seconds."""

import ast
import contextlib
import io
import os
import runpy
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str, *arguments: object, cwd: Path = ROOT) -> 'CompletedProcess[str]':
    """Runs ``python tools/NAME ARGUMENTS`` and answers what `subprocess.run` would.

    An exception that would end in a traceback is raised.

    Args:
        name: A file below tools/, or ``'-m MODULE'``.
        *arguments: Of the command line.
        cwd: Where it is called.
    """
    is_module = name.startswith('-m ')
    script = name.removeprefix('-m ') if is_module else str(ROOT / 'tools' / name)
    out, errors = io.StringIO(), io.StringIO()
    with _process([script, *map(str, arguments)], cwd, out, errors):
        if not is_module:
            sys.path.insert(0, str(Path(script).parent))  # as python does
        run = runpy.run_module if is_module else runpy.run_path
        code = 0
        try:
            run(script, run_name='__main__')
        except SystemExit as end:
            code = int(end.code if isinstance(end.code, int) else end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=errors)
    return CompletedProcess([name, *arguments], code, out.getvalue(), errors.getvalue())


def leave_configs_unformatted() -> None:
    """Lets mmengine write configs as Python that is only parsed, not formatted.

    A runner writes its own four times, and yapf takes up to a second for each.
    """

    def parse(text: str, **_: object) -> tuple[str, bool]:
        ast.parse(text)
        return text, False

    config = sys.modules.get('mmengine.config.config')
    if config is not None:
        config.FormatCode = parse


def go_on_at_the_end_of_data() -> None:
    """Lets a loop by iterations begin its data anew at once: mmengine waits two seconds there."""
    loops = sys.modules.get('mmengine.runner.loops')
    if loops is not None:
        without_sleep = {**vars(time), 'sleep': lambda seconds: None}
        loops.time = SimpleNamespace(**without_sleep)


@contextlib.contextmanager
def _process(
    command: list[str], cwd: Path, out: io.StringIO, errors: io.StringIO
) -> Iterator[None]:
    """What a process has for itself, put back at the end."""
    argv, path, folder, environment = sys.argv, list(sys.path), Path.cwd(), dict(os.environ)
    _forget_runs()
    try:
        sys.argv = command
        os.chdir(cwd)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter('ignore')
            yield
    finally:
        sys.argv, sys.path[:] = argv, path
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _forget_runs()


def _forget_runs() -> None:
    """Removes the loggers and visualizers of earlier runs, which mmengine keeps by name.

    The name is the second in which a run starts: two within one would write into one folder.
    """
    if 'mmengine' not in sys.modules:
        return
    from mmengine.utils import ManagerMixin

    kinds = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()
