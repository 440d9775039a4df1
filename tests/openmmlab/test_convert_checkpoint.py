"""Converted checkpoints in real models of mmdet and mmseg, and the tool that converts files."""

import pytest

pytest.importorskip('mmdet', reason='the detectors are built from it')
pytest.importorskip('mmseg', reason='the segmenters are built from it')

import functools
import importlib.util
import pickle
import sys

import torch
from mmdet.models.backbones import ResNet, ResNeXt
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from tests import published_layouts as layouts
from tests.openmmlab import matrix
from wsbcn_mm import BatchChannelNorm2d, WSConv2d, reference
from wsbcn_mm.checkpoint_layouts import convert_state
from wsbcn_mm.openmmlab.filling import compare
from wsbcn_mm.openmmlab.hooks import loading
from wsbcn_mm.openmmlab.measure.recalibration import write_statistics
from wsbcn_mm.recalibration import recalibrate

# ---- GN + WS keeps its function ----------------------------------------------------------------


def small(folder, name):
    cfg = Config.fromfile(matrix.CONFIGS / folder / f'{name}.py')
    matrix.shrink(cfg.model)
    return cfg


def gn_and_bcn(folder, name, monkeypatch):
    """A GN + WS model with random weights, and the BCN + WS model that takes its checkpoint."""
    matrix.one_block_a_stage(monkeypatch)
    cfg = small(folder, name)
    old = matrix.build(cfg)
    for key, p in old.named_parameters():
        if key.rpartition('.')[0].endswith(('gn', 'gn1', 'gn2', 'gn3', 'downsample.1')):
            torch.nn.init.normal_(p, 1.0 if key.endswith('weight') else 0.0, 0.3)
    done = convert_state(old.state_dict(), 'openmmlab-gn-ws', 'bcn-ws', num_groups=4)
    assert not done.left and done.preserves
    for part in matrix.walk(cfg.model):
        if part.get('type') == 'GN':
            part.update(type='BCN', affine=done.affine)
    new = matrix.build(cfg)
    assert sum(isinstance(m, BatchChannelNorm2d) for m in new.modules()) >= 20
    assert compare(new, done.state).complete
    new.load_state_dict(done.state)
    return cfg, old, new


def features(model, images):
    """What backbone and neck give."""
    x = model.extract_feat(images)
    return [*x] if isinstance(x, (tuple, list)) else [x]


def assert_same(new, old, factor=1.0):
    for a, b in zip(new, old, strict=True):
        # Float tolerance: each is computed in float32 in another order.
        torch.testing.assert_close(a, b, rtol=1e-4 * factor, atol=1e-4 * factor)


FAMILIES = {
    'mask-rcnn': ('mask_rcnn', 'mask-rcnn_x50-32x4d_fpn_ws-gn_4xb2-2x_coco'),
    'retinanet': ('retinanet', 'retinanet_r50_fpn_ws-gn_8xb1-1x_coco'),
    'deeplabv3': ('deeplabv3', 'deeplabv3_r101_ws-gn_8xb2-50e_voc12aug-513x513'),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_gn_ws_to_bcn_ws_computes_the_same(family, monkeypatch):
    cfg, old, new = gn_and_bcn(*FAMILIES[family], monkeypatch)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        old.eval(), new.eval()
        expected = features(old, images)
        assert_same(features(new, images), expected)

        # The statistics become known, and still nothing else changes.
        batches = [matrix.make_batch(family, 1) for _ in range(3)]
        state = new.state_dict()
        checkpoint = dict(state_dict={k: v.clone() for k, v in state.items()})
        converted = {k: v.clone() for k, v in state.items()}
        done = recalibrate(new, batches, new.test_step, keep_function=True)
        assert done.drift < 1e-3  # what a layer gets does not depend on the statistics
        measured = [
            m
            for name, m in new.named_modules()
            if isinstance(m, BatchChannelNorm2d) and name not in done.unreached
        ]
        assert len(measured) >= 15
        for layer in measured:
            assert (layer.bn.running_var - 1).abs().max() > 1e-2
            assert not torch.allclose(layer.batch_weight, torch.ones(()), atol=1e-2)
        assert_same(features(new, images), expected)

        # So does the file that the tool writes.
        write_statistics(new, checkpoint, keep_function=True)
        again = matrix.build(cfg)
        again.load_state_dict(checkpoint['state_dict'])
        assert_same(features(again.eval(), images), expected)
        # The statistics alone, without batch_weight and batch_bias, change the function.
        again.load_state_dict(converted)
        recalibrate(again, batches, again.test_step)
        difference = max((a - b).abs().max() for a, b in zip(features(again, images), expected))
        assert difference > 1e-2


def test_training_goes_on_from_a_converted_model(monkeypatch):
    """The first loss is that of the GN model, and it falls; the estimates move on."""
    cfg, old, new = gn_and_bcn(*FAMILIES['deeplabv3'], monkeypatch)
    with DefaultScope.overwrite_default_scope('mmseg'):
        torch.manual_seed(0)
        batch = matrix.make_batch('deeplabv3', 2)
        for sample in batch['data_samples']:
            sample.gt_sem_seg.data[:] = 3  # something that can be learnt in eight steps
        recalibrate(new, [batch], new.test_step, keep_function=True)
        for part in (old, new):
            part.decode_head.dropout = part.auxiliary_head.dropout = None
        first = {}
        for name, model in (('gn', old), ('bcn', new)):
            optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
            losses = [model.train().train_step(batch, optimizer)['loss'].item() for _ in range(8)]
            first[name] = losses[0]
            assert losses[-1] < 0.9 * losses[0]
        # Not equal to the last digit: a training step takes its own batch into the estimates first.
        assert first['bcn'] == pytest.approx(first['gn'], rel=0.02)
        layer = new.backbone.layer4[0].norm3
        assert layer.bn.num_batches_tracked == 2 + 8  # two images measured, eight steps


# ---- every layout fills its backbone -----------------------------------------------------------


@pytest.mark.parametrize('depth, groups', [(50, 1), (101, 1), (50, 32), (101, 32)])
@pytest.mark.parametrize('source', ['authors-bcn', 'openmmlab-gn-ws', 'torchvision'])
def test_a_converted_file_fills_every_conv_and_norm_tensor(source, depth, groups):
    norm = {
        'authors-bcn': layouts.authors_bcn,
        'openmmlab-gn-ws': layouts.affine,
        'torchvision': layouts.batch_norm,
    }[source]

    def backbone(**arguments):
        conv = dict(type='WSConv2d', formula=done.formula)
        kind = ResNet if groups == 1 else functools.partial(ResNeXt, groups=32, base_width=4)
        with torch.device('meta'):
            return kind(depth=depth, conv_cfg=conv, **arguments)

    nothing = torch.zeros(1)
    state = layouts.resnet(str(depth), norm, groups, shape=lambda *size: nothing.expand(size))
    done = convert_state(layouts.module(state), source, 'bcn-ws')
    model = backbone(norm_cfg=dict(type='BCN', num_groups=32, affine=done.affine))
    assert compare(model, done.state).complete
    assert set(done.state) == set(model.state_dict())
    if source != 'authors-bcn':
        done = convert_state(state, source, 'gn-ws')
        model = backbone(norm_cfg=dict(type='GN', num_groups=32))
        assert compare(model, done.state).complete
        assert set(done.state) == set(model.state_dict())


def test_the_authors_tensors_mean_what_ours_do():
    """Stem of an authors' file, computed by the reference from the file's own tensors."""
    torch.manual_seed(0)
    state = {
        'module.conv1.weight': torch.randn(64, 3, 7, 7),
        **layouts.module(
            {
                k: torch.rand_like(v) if v.dim() else v
                for k, v in layouts.authors_bcn('bn1', 64).items()
            }
        ),
    }
    done = convert_state(state, 'authors-bcn', 'bcn-ws')
    conv = WSConv2d(3, 64, 7, 2, 3, bias=False, formula=done.formula)
    norm = BatchChannelNorm2d(64, done.num_groups, affine=done.affine).eval()
    conv.load_state_dict({'weight': done.state['conv1.weight']})
    norm.load_state_dict({k.removeprefix('bcn1.'): v for k, v in done.state.items() if 'bcn1' in k})
    x = torch.randn(2, 3, 32, 32)
    weight = reference.weight_standardize(state['module.conv1.weight'], formula='var_eps')
    z = torch.nn.functional.conv2d(x, weight, None, 2, 3)
    of = {k.removeprefix('module.bn1.'): v for k, v in state.items()}
    expected = reference.normalize(
        z,
        of['pbn.running_mean'],
        of['pbn.running_var'],
        32,
        of['pbn.weight'],
        of['pbn.bias'],
        of['weight'].flatten(),
        of['bias'].flatten(),
    )
    torch.testing.assert_close(norm(conv(x)), expected, rtol=1e-4, atol=1e-4)


# ---- the tool ----------------------------------------------------------------------------------


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the tool; gives its exit status (None: 0), and what it printed or exited with."""
    spec = importlib.util.spec_from_file_location(
        'convert_checkpoint', matrix.CONFIGS.parent / 'tools/model_converters/convert_checkpoint.py'
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *map(str, arguments)])
        try:
            tool.main()
        except SystemExit as exit:
            return exit.code, capsys.readouterr().out
        return None, capsys.readouterr().out

    return run


def stem(norm, **extra):
    return {'conv1.weight': torch.zeros(64, 3, 7, 7), **norm('bn1', 64), **extra}


def test_the_tool_says_what_became_of_the_tensors_and_records_the_formula(convert, tmp_path):
    source, out = tmp_path / 'rn50.pth.tar', tmp_path / 'new' / 'a.pth'
    state = layouts.module(stem(layouts.authors_bcn, **{'fc.weight': torch.zeros(2, 2)}))
    torch.save(dict(state_dict=state, epoch=90), source)
    code, said = convert(source, '-o', out, '--from', 'authors-bcn')
    assert code is None
    assert '1 tensors under their names\n  conv1.weight\n' in said
    assert '1 tensors dropped\n  fc.weight: the classifier' in said
    assert '7 tensors renamed, such as\n  bn1.weight -> bcn1.weight\n' in said
    assert 'pbn' not in said  # one stands for all
    code, every = convert(source, '-o', out, '--from', 'authors-bcn', '--verbose')
    assert 'bn1.pbn.running_var -> bcn1.bn.running_var' in every
    assert "conv_cfg=dict(type='WSConv2d', formula='var_eps')" in said
    written = torch.load(out, weights_only=True)
    assert written['meta']['formula'] == 'var_eps'
    assert written['state_dict']['bcn1.weight'].shape == (32,)
    assert [file.name for file in out.parent.iterdir()] == ['a.pth']  # no temporary file

    torch.save(stem(layouts.affine), source)
    arguments = (source, '-o', out, '--from', 'authors-gn-ws', '--to', 'bcn-ws', '-v')
    code, said = convert(*arguments)
    assert code is None
    assert '(new) -> bcn1.bn.running_var = 1' in said
    assert "affine='channel'" in said and 'recalibrate.py' in said and '--keep-function' in said


class Code:
    def __reduce__(self):
        return print, ('this was run',)


def test_the_tool_refuses_with_one_clear_line(convert, tmp_path):
    source, out = tmp_path / 'a.pth', tmp_path / 'b.pth'

    def refused(*arguments):
        code, said = convert(source, '-o', out, *arguments)
        assert isinstance(code, str) and code.startswith('error: ')  # sys.exit: status 1
        assert not out.exists()
        return code, said

    code, _ = refused('--from', 'timm')
    assert 'no checkpoint file' in code
    torch.save(stem(layouts.affine, **{'aspp.conv1.weight': torch.zeros(2, 2, 1, 1)}), source)
    code, said = refused('--from', 'openmmlab-gn-ws')
    assert 'NOT CONVERTED: aspp.conv1.weight' in said and '1 of 4 tensors' in code
    code, _ = refused('--from', 'authors-bcn')
    assert "it looks like 'openmmlab-gn-ws'" in code

    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    assert 'is incomplete' in refused('--from', 'openmmlab-gn-ws')[0]
    source.write_bytes(b'')
    assert 'is empty' in refused('--from', 'openmmlab-gn-ws')[0]
    source.write_bytes(b'hello world')
    assert 'is not a checkpoint' in refused('--from', 'openmmlab-gn-ws')[0]
    source.write_bytes(pickle.dumps(dict(state_dict=Code())))
    code, said = refused('--from', 'openmmlab-gn-ws')
    assert 'could run any code' in code and 'this was run' not in said
    for empty in ({}, None, 5):
        torch.save(dict(state_dict=empty), source)
        assert 'no tensors' in refused('--from', 'openmmlab-gn-ws')[0]
    torch.save([1, 2], source)
    assert 'holds a list' in refused('--from', 'openmmlab-gn-ws')[0]


@pytest.mark.parametrize('keys', [('model',), ('state_dict', 'state_dict'), ('state_dict_ema',)])
def test_the_tool_finds_the_tensors(convert, tmp_path, keys):
    content = layouts.module(stem(layouts.affine))
    for key in keys:
        content = {key: content, 'epoch': 3}
    torch.save(content, tmp_path / 'a.pth')
    code, _ = convert(tmp_path / 'a.pth', '-o', tmp_path / 'b.pth', '--from', 'openmmlab-gn-ws')
    assert code is None
    assert 'bcn1.weight' in torch.load(tmp_path / 'b.pth', weights_only=True)['state_dict']


def test_the_tool_takes_a_part_of_a_model(convert, tmp_path):
    state = {f'encoder.{key}': value for key, value in stem(layouts.affine).items()}
    torch.save(state | {'other.weight': torch.zeros(2, 2)}, tmp_path / 'a.pth')
    arguments = [tmp_path / 'a.pth', '-o', tmp_path / 'b.pth', '--from', 'openmmlab-gn-ws']
    assert 'NOT CONVERTED: encoder.conv1.weight' in convert(*arguments)[1]
    code, said = convert(*arguments, '--prefix', 'encoder.')
    assert code is None and '1 tensors under their names' in said
    assert "no name that starts with 'decoder.'" in convert(*arguments, '--prefix', 'decoder.')[0]
    torch.save(state, tmp_path / 'a.pth')
    assert "all names start with 'encoder.': give --prefix" in convert(*arguments)[0]


# ---- loading through a config ------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(loading, 'print_log', lambda text, *rest: lines.append((text, rest[1:])))
    return lines


def backbone(file, monkeypatch, formula='std_eps', affine='channel', **init):
    matrix.one_block_a_stage(monkeypatch)
    return ResNet(
        depth=50,
        base_channels=8,
        norm_cfg=dict(type='BCN', num_groups=4, affine=affine),
        conv_cfg=dict(type='WSConv2d', formula=formula),
        init_cfg=dict(type='Pretrained', checkpoint=str(file), **init),
    )


def test_init_cfg_says_how_much_of_the_model_it_fills(said, tmp_path, monkeypatch):
    file = tmp_path / 'a.pth'
    model = backbone(file, monkeypatch)
    expected = {key: torch.rand_like(v.float()) for key, v in model.state_dict().items()}
    torch.save(dict(state_dict=expected, meta=dict(formula='std_eps')), file)
    model.init_weights()
    assert torch.equal(model.layer4[0].norm3.batch_bias, expected['layer4.0.bcn3.batch_bias'])
    ((text, _),) = said
    assert 'ResNet: fills all ' in text

    # The same with a prefix, as a classifier's or detector's file has it.
    said.clear()
    torch.save({f'backbone.{key}': value for key, value in expected.items()}, file)
    model = backbone(file, monkeypatch, prefix='backbone.')
    model.init_weights()
    assert torch.equal(model.conv1.weight, expected['conv1.weight'])
    assert 'fills all' in said[0][0]

    # Another norm: the share, and the first names.
    said.clear()
    torch.save({k.replace('bcn', 'gn'): v for k, v in expected.items()}, file)
    backbone(file, monkeypatch).init_weights()
    ((text, (level,)),) = said
    assert 'does not fill' in text and ' %)' in text and 'bcn1.weight' in text
    assert level == 30  # a warning

    # Another formula: as loud, with the line that mends it.
    said.clear()
    torch.save(dict(state_dict=expected, meta=dict(formula='var_eps')), file)
    backbone(file, monkeypatch).init_weights()
    ((text, (level,)),) = said
    assert "formula 'var_eps'" in text and "formula='var_eps')" in text and level == 30

    with pytest.raises(ValueError, match="no key that starts with 'neck.'"):
        backbone(file, monkeypatch, prefix='neck').init_weights()


def test_a_missing_or_damaged_start_is_told_before_training(tmp_path, monkeypatch):
    from wsbcn_mm.openmmlab.preflight import check_pretrained

    monkeypatch.chdir(tmp_path)
    name = 'mask-rcnn_r50_fpn_ws-bcn_4xb2-2x_coco'
    cfg = Config.fromfile(matrix.CONFIGS / 'mask_rcnn' / f'{name}.py')
    with pytest.raises(FileNotFoundError) as error:
        check_pretrained(cfg)
    message = str(error.value)
    assert 'model.backbone starts from checkpoints/resnet50_ws-bcn.pth' in message
    assert 'convert_checkpoint.py' in message and 'init_cfg.checkpoint=' in message
    (tmp_path / 'checkpoints').mkdir()
    file = tmp_path / 'checkpoints/resnet50_ws-bcn.pth'
    file.write_bytes(b'PK\x03\x04 cut short')
    with pytest.raises(ValueError, match='is incomplete'):
        check_pretrained(cfg)
    torch.save({'conv1.weight': torch.zeros(1)}, file)
    check_pretrained(cfg)
    gn = Config.fromfile(matrix.CONFIGS / 'mask_rcnn' / f'{name.replace("bcn", "gn")}.py')
    check_pretrained(gn)  # an address: mmengine's
