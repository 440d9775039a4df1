"""deploy.onnx and tools/model_converters/export_onnx.py."""

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import json

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from tests.openmmlab.deploy.models import QUICK, SIZE, image_of, run_here
from wsbcn_mm import BatchChannelNorm2d, WSConv2d, fold, shapes
from wsbcn_mm.openmmlab.deploy import onnx, parts

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures


@pytest.mark.parametrize('trained', ['mask_rcnn'], indirect=True)
def test_parts_in_any_size(trained, tmp_path):
    """With opset 21; the tool exports a segmenter in one size with opset 18."""
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    pytest.importorskip('onnxruntime', reason='runs what is exported')
    cfg, model, plan = trained
    folded = plan.apply(model).requires_grad_(False)
    for part in parts.tensor_parts(folded, image_of(model, cfg)):
        file = tmp_path / f'{part.name}.onnx'
        onnx.export_part(part, file, 21, True, onnx.metadata_of(cfg, model))
        counts = onnx.check_graph(file)
        assert counts['GroupNormalization'] > 0 and counts['Conv'] > 0
        assert onnx.check_results(part, file) < 1e-4
        if part.name == 'image':  # another size, another batch size
            part.input = torch.cat([image_of(model, cfg, (96, 64))] * 2)
            assert onnx.check_results(part, file) < 1e-4
        if part.name != 'image':  # another number of RoIs
            part.input = part.input[:3]
            assert onnx.check_results(part, file) < 1e-4


def test_names_of_classes_are_in_the_order_of_the_labels(tmp_path):
    """As tools/infer.py has them: a COCO file numbers the labels, whatever order the config has."""
    names = [dict(id=3, name='square'), dict(id=9, name='disc')]
    (tmp_path / 'a.json').write_text(json.dumps(dict(images=[], annotations=[], categories=names)))
    dataset = dict(type='CocoDataset', data_root=str(tmp_path), ann_file='a.json')
    loader = dict(dataset=dict(**dataset, metainfo=dict(classes=('disc', 'square'))))
    cfg = Config(dict(default_scope='mmdet', model={}, test_dataloader=loader))
    model = nn.Identity()
    for model.dataset_meta in (dict(classes=('disc', 'square')), None):
        assert onnx.metadata_of(cfg, model)['classes'] == ['square', 'disc']
    cfg = Config(dict(default_scope='mmpretrain', model={}))  # nobody knows them
    assert onnx.metadata_of(cfg, model)['classes'] == []


def test_plain_torch_exports_what_is_folded(tmp_path):
    """What is not: tests/layers/test_onnx.py."""
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    runtime = pytest.importorskip('onnxruntime', reason='runs what is exported')
    model = nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4), nn.ReLU())
    model(torch.randn(2, 3, 8, 8) + 1)
    model.eval()
    x, file = torch.randn(1, 3, 8, 8), tmp_path / 'folded.onnx'
    torch.onnx.export(fold(model), (x,), file, dynamo=True)
    session = runtime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-4)


class LooksAtMemory(nn.Module):
    """As kernels of mmcv's own do, which no exporter can follow."""

    def forward(self, x):
        return (x + x.data_ptr(),)


def test_a_layer_that_cannot_be_exported_is_named(tmp_path):
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    part = parts.Part('image', nn.Sequential(nn.ReLU(), LooksAtMemory()), torch.ones(1, 3), ['y'])
    with pytest.raises(onnx.NotExportable, match='image: .* stops in LooksAtMemory\n +RuntimeErr'):
        onnx.export_part(part, tmp_path / 'a.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['computed', 'foreign', 'constant'])
def test_graphs_that_are_refused(tmp_path, kind):
    """A weight that is computed in the graph, as a WS convolution's; an operator of somebody."""
    graphs = pytest.importorskip('onnx', reason='makes the graph')
    make = graphs.helper
    weight = graphs.numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), 'w')
    domain = 'some.company' if kind == 'foreign' else ''
    nodes = [
        make.make_node('Mul', ['w', 'w'], ['w2']),
        make.make_node('Conv', ['x', 'w2' if kind == 'computed' else 'w'], ['z']),
        make.make_node('Relu', ['z'], ['y'], domain=domain),
    ]
    ends = [
        make.make_tensor_value_info(name, graphs.TensorProto.FLOAT, (1, channels, 4, 4))
        for name, channels in (('x', 3), ('y', 2))
    ]
    graph = make.make_graph(nodes, 'g', ends[:1], ends[1:], [weight])
    imports = [make.make_opsetid('', 18), make.make_opsetid('some.company', 1)]
    graphs.save(make.make_model(graph, opset_imports=imports), str(tmp_path / 'a.onnx'))
    if kind == 'constant':
        assert onnx.check_graph(tmp_path / 'a.onnx') == dict(Mul=1, Conv=1, Relu=1)
        return
    words = (
        'weight of z is computed' if kind == 'computed' else 'some.company::Relu is not standard'
    )
    with pytest.raises(onnx.NotExportable, match=words):
        onnx.check_graph(tmp_path / 'a.onnx')


def test_onnx_with_another_result_is_refused(tmp_path):
    pytest.importorskip('onnxruntime', reason='runs what is exported')
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    module = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()

    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return (self.inner(x),)

    part = parts.Part('image', Tuple(), torch.randn(1, 3, 8, 8), ['y'])
    onnx.export_part(part, tmp_path / 'wrong.onnx')
    assert onnx.check_results(part, tmp_path / 'wrong.onnx') < 1e-6
    module[0].bias.data += 1
    with pytest.raises(onnx.NotExportable, match='differs from torch'):
        onnx.check_results(part, tmp_path / 'wrong.onnx')


def test_export_onnx_writes_checked_files(folder, monkeypatch, tmp_path):
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    graphs = pytest.importorskip('onnx', reason='reads what is exported')
    where = ('--shape', *SIZE, '-o', tmp_path)
    run_here(
        monkeypatch,
        'model_converters/export_onnx.py',
        QUICK['deeplabv3'],
        folder / 'deeplabv3.pth',
        *where,
    )
    (file,) = tmp_path.iterdir()
    assert file.name == 'image.onnx'
    meta = {p.key: json.loads(p.value) for p in graphs.load(str(file)).metadata_props}
    counts = onnx.check_graph(file)
    assert counts['ReduceMean'] > 0 and counts['Conv'] > 0 and 'GroupNormalization' not in counts
    assert meta['classes'] == ['background', *shapes.CLASSES] and meta['channel_order'] == 'RGB'
    for more in (['--whole'], ['--images', 'a.png']):
        with pytest.raises(SystemExit, match='--whole'):
            run_here(
                monkeypatch,
                'model_converters/export_onnx.py',
                QUICK['deeplabv3'],
                folder / 'deeplabv3.pth',
                *where,
                *more,
            )
