"""Checkpoints of others: what would run code is refused, wherever it comes from.

The pickle here is harmless: all that it would do is to leave a mark.
"""

import pytest

pytest.importorskip('mmengine', reason='the doors are its loaders')

import functools
import http.server
import io
import json
import shutil
import sys
import threading
from types import SimpleNamespace

import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import checkpoint as loaders

from tests.openmmlab.tiny import make_runner, tiny_model
from wsbcn_mm.openmmlab import command_line, config, foreign_config
from wsbcn_mm.openmmlab.checkpoints import CheckpointRefused, check_checkpoint, read_checkpoint


class Mark:
    """A pickle that makes an empty file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.fixture(scope='module')
def evil(tmp_path_factory):
    """The file, and the mark that it would leave."""
    folder = tmp_path_factory.mktemp('evil')
    mark, file = folder / 'mark', folder / 'evil.pth'
    torch.save(dict(state_dict=tiny_model().state_dict(), payload=Mark(str(mark))), file)
    torch.load(file, weights_only=False)['payload'].close()
    assert mark.exists()  # it works where nobody checks
    mark.unlink()
    return SimpleNamespace(file=file, mark=mark)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def address(evil):
    """The same file from a server on this machine."""
    handler = functools.partial(Quiet, directory=str(evil.file.parent))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/evil.pth'
    server.shutdown()
    server.server_close()


@pytest.fixture
def hubs(evil, address, tmp_path, monkeypatch):
    """Lists of models and stores that know the file."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    home = tmp_path / 'mmengine'
    home.mkdir()
    shutil.copy(evil.file, home / 'evil.pth')
    (home / 'open_mmlab.json').write_text(json.dumps(dict(evil=address, file='evil.pth')))
    for name in ('get_torchvision_models', 'get_mmcls_models'):
        monkeypatch.setattr(loaders, name, lambda: dict(evil=address))
    store = SimpleNamespace(get=lambda name: evil.file.read_bytes())
    monkeypatch.setattr(loaders, 'get_file_backend', lambda *_, **__: store)
    model = SimpleNamespace(name='evil.pth', download=lambda path: shutil.copy(evil.file, path))
    cloud = SimpleNamespace(modelcloud=SimpleNamespace(get=lambda name: model))
    monkeypatch.setitem(sys.modules, 'pavi', cloud)


ADDRESSES = [
    'FILE',
    'HTTP',
    'torchvision://evil',
    'modelzoo://evil',
    'open-mmlab://evil',
    'openmmlab://file',
    'mmcls://evil',
    's3://bucket/evil',
    'petrel://bucket/evil',
    'pavi://evil',
]
# Who opens one: the Runner, teachers and averaged models by load_checkpoint, backbones by
# _load_checkpoint, init_cfg, and the tools.
DOORS = {
    'load_checkpoint': lambda source: loaders.load_checkpoint(tiny_model(), source),
    '_load_checkpoint': loaders._load_checkpoint,
    'init_cfg': lambda source: WEIGHT_INITIALIZERS.build(
        dict(type='Pretrained', checkpoint=source)
    )(tiny_model()),
    "mmengine's own init": lambda source: PretrainedInit(source)(tiny_model()),
    'tools': read_checkpoint,
}


@pytest.mark.usefixtures('hubs')
@pytest.mark.parametrize('source', ADDRESSES)
def test_no_door_lets_code_in(source, evil, address, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')  # torch's default, switched off
    source = dict(FILE=str(evil.file), HTTP=address).get(source, source)
    for name, door in DOORS.items():
        with pytest.raises(CheckpointRefused, match='more than tensors and numbers') as error:
            door(source)
        assert source in str(error.value), name
        assert not evil.mark.exists(), name


@pytest.mark.usefixtures('hubs')
@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('source', ['FILE', 'HTTP'])
def test_the_runner_lets_none_in(source, resume, evil, address, tmp_path):
    source = dict(FILE=str(evil.file), HTTP=address)[source]
    hooks = [dict(type='EMAHook')]
    runner = make_runner(tmp_path, load_from=source, resume=resume, custom_hooks=hooks)
    with pytest.raises(CheckpointRefused) as error:
        runner.load_or_resume()
    text = str(error.value)
    assert f'{source} was refused: it holds more than tensors and numbers (' in text
    assert 'open' in text  # what it asks for
    assert 'save its state_dict alone' in text
    assert '\n\n' not in text  # not torch's page of advice
    assert not evil.mark.exists()


class Asks:
    """A pickle that asks for an attribute, as that of a HistoryBuffer does for its methods."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize(
    'owner, name',
    [(HistoryBuffer, '__init__'), (HistoryBuffer, '__subclasses__'), (torch.Tensor, 'tofile')],
)
def test_getattr_in_a_checkpoint_reaches_nothing_but_the_logs_statistics(owner, name, tmp_path):
    """The real getattr on the allow-list would hand out the whole interpreter."""
    file = str(tmp_path / 'asks.pth')
    torch.save(dict(state_dict={}, payload=Asks(owner, name)), file)
    with pytest.raises(CheckpointRefused):
        loaders.load_checkpoint(tiny_model(), file)


@pytest.mark.usefixtures('hubs')
def test_a_good_one_comes_in_by_every_address(evil, address, monkeypatch):
    """What is refused is the content, not the way."""
    good = io.BytesIO()
    torch.save(dict(state_dict=tiny_model(2.0).state_dict()), good)
    store = SimpleNamespace(get=lambda name: good.getvalue())
    monkeypatch.setattr(loaders, 'get_file_backend', lambda *_, **__: store)
    (evil.file.parent / 'good.pth').write_bytes(good.getvalue())
    for source in (address.replace('evil', 'good'), 's3://bucket/good'):
        model = tiny_model(1.0)
        loaders.load_checkpoint(model, source)
        assert (model.conv.weight == 2).all()


def test_no_text_in_it_runs_when_a_training_goes_on(tmp_path):
    """mmengine runs ``meta['config']`` of a checkpoint that it resumes from."""
    make_runner(tmp_path).train()
    file, mark = tmp_path / 'epoch_1.pth', tmp_path / 'mark'
    content = torch.load(file, weights_only=False)
    content['meta']['config'] = f"open({str(mark)!r}, 'w')"
    torch.save(content, file)
    runner = make_runner(tmp_path, epochs=2, load_from=str(file), resume=True)
    runner.train()
    assert runner.epoch == 2 and not mark.exists()


@pytest.mark.parametrize('key', ['load_from', 'init_cfg'])
@pytest.mark.parametrize('name', ['http://127.0.0.1:9/a.pth', 'open-mmlab://no_such'])
def test_what_cannot_be_had_is_named_with_its_place(key, name, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cfg = config.Config(dict(model=dict(init_cfg=dict(checkpoint=name)), load_from=None))
    if key == 'load_from':
        cfg = config.Config(dict(model=dict(), load_from=name))
    place = 'load_from' if key == 'load_from' else 'model.init_cfg.checkpoint'
    with pytest.raises(SystemExit, match=f'error: {place}: {name} cannot be loaded: .*Error'):
        with command_line.errors_of_a_run(cfg):
            WEIGHT_INITIALIZERS.build(dict(type='Pretrained', checkpoint=name))(tiny_model())


@pytest.mark.parametrize('source', [['a', 'b'], '', 3])
def test_what_is_no_name_of_a_checkpoint(source):
    with pytest.raises(ValueError, match=r'named by a path or an address.*\n  got '):
        check_checkpoint(source)


# ---- texts in a checkpoint ---------------------------------------------------------------------


def test_a_config_in_a_checkpoint_is_read_as_data(formatted_configs):
    """All forms that mmengine writes (``Config.pretty_text``)."""
    cfg = config.Config(
        dict(
            model=dict(type='A', depth=50, rate=-0.5, out=(0, 1), none=None, on=True),
            hooks=[dict(type='B'), 'text\n"quoted"', {}],
            map={'a b': 1, 2: 'two'},
            empty=(),
        )
    )
    assert foreign_config.read_text(cfg.pretty_text).to_dict() == cfg.to_dict()


@pytest.mark.parametrize(
    'text',
    [
        "open({mark!r}, 'w')",
        "a = open({mark!r}, 'w')",
        "a = dict(b=[open({mark!r}, 'w')])",
        "a = dict(**open({mark!r}, 'w'))",
        'import os',
        'a = f"{{open({mark!r}, chr(119))}}"',
        "a = [open({mark!r}, 'w') for _ in '1']",
        'a, b = 1, 2',
        'a = ' + '(' * 500,
    ],
)
def test_nothing_else_in_it_is_understood(text, tmp_path):
    mark = tmp_path / 'mark'
    with pytest.raises(ValueError, match=r'more than data|no config'):
        foreign_config.read_text(text.format(mark=str(mark)))
    assert not mark.exists()


def foreign(model, scope='mmdet'):
    return config.Config(dict(default_scope=scope, model=model)).pretty_text


@pytest.mark.parametrize(
    'model, words',
    [
        (dict(type='os.mkdir', path='MARK'), 'os.mkdir'),
        (dict(type='RetinaNet', neck=[dict(type='builtins.open', file='MARK')]), 'builtins.open'),
        (dict(type='Converted', kind='os.mkdir', path='MARK'), 'os.mkdir'),
        (dict(type='mmengine.dump', obj=1, file='MARK'), 'mmengine.dump'),
        (dict(type='this'), 'this'),  # a module of Python that prints when it is imported
        (dict(type='A', nms=dict(type='os.nms')), 'os.nms'),
        # Evaluates its argument as Python.
        (dict(type='A', cmc=dict(type='CameraMotionCompensation', warp_mode='1')), 'CameraMotion'),
    ],
)
def test_a_config_in_a_checkpoint_names_what_is_registered_or_is_not_built(model, words):
    """mmengine would import and call whatever a type names."""
    pytest.importorskip('mmdet', reason='the scope of the config')
    with pytest.raises(ValueError, match=f'names .*{words}.*registered'):
        foreign_config.foreign_config(foreign(model))
    with pytest.raises(ValueError, match='none of'):
        foreign_config.foreign_config(foreign(dict(type='A'), scope='antigravity'))


def test_a_config_in_a_checkpoint_may_hold_classes_by_their_path():
    pytest.importorskip('mmdet', reason='the scope of the config')
    model = dict(type='mmdet.models.detectors.retinanet.RetinaNet', backbone=dict(type='ResNet'))
    # Words that the hosts look up among mmcv's operators.
    model |= dict(test_cfg=dict(nms=dict(type='nms')), roi=dict(type='RoIAlign'))
    cfg = foreign_config.foreign_config(foreign(model, scope=None))
    assert (cfg.default_scope, cfg.model.type) == ('mmdet', 'RetinaNet')


@pytest.mark.parametrize(
    'text', ["open({mark!r}, 'w')", "model = dict(type='os.mkdir', path={mark!r})"]
)
def test_audit_runs_nothing_of_a_checkpoint(text, tmp_path):
    pytest.importorskip('mmdet', reason='builds the models of configs')
    from wsbcn_mm.openmmlab.audit import audit

    mark, file = tmp_path / 'mark', tmp_path / 'a.pth'
    meta = dict(cfg=f"default_scope = 'mmdet'\n{text.format(mark=str(mark))}\n")
    torch.save(dict(state_dict=tiny_model().state_dict(), meta=meta), file)
    (found,) = (f for f in audit(file) if f.code == 'config')
    assert 'cannot be audited' in found.why
    assert not mark.exists()
