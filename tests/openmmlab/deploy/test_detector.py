"""deploy.detector, heads, boxes, graph: a whole detector in ONNX finds what MMDetection finds."""

import pytest

pytest.importorskip('mmdet', reason='what is compared with')
pytest.importorskip('onnxruntime', reason='runs what is exported')
pytest.importorskip('onnx', reason='graphs are made with it')

import re

import numpy as np
import onnx
import onnxruntime
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from tests.openmmlab.deploy.models import QUICK, ROOT, run_here
from wsbcn_mm.openmmlab import config
from wsbcn_mm.openmmlab.deploy import boxes, detector, heads, inference
from wsbcn_mm.openmmlab.deploy import onnx as exported
from wsbcn_mm.openmmlab.deploy.graph import BOOL, FLOAT, INT, Graph

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures

NMS = dict(type='nms', iou_threshold=0.5)
ANCHORS = dict(type='AnchorGenerator', scales=[2, 3], ratios=[0.5, 2.0], strides=[8, 16])
POINTS = dict(type='MlvlPointGenerator', strides=[8, 16], offset=0.5)
DENSE = {
    'anchors': dict(type='RetinaHead', anchor_generator=ANCHORS),
    'softmax': dict(
        type='RetinaHead',
        anchor_generator=ANCHORS,
        loss_cls=dict(type='CrossEntropyLoss'),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=(0.1, 0.1, 0.2, 0.2)),
    ),
    'points': dict(
        type='FCOSHead', norm_cfg=None, strides=[8, 16], regress_ranges=((-1, 32), (32, 1e8))
    ),
    'distances': dict(
        type='RTMDetHead',
        norm_cfg=None,
        anchor_generator=POINTS,
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        with_objectness=False,
    ),
}
DEPLOY = ROOT / 'docs/deploy.md'
SIZE, SCALE, CLASSES = (44, 60), (0.5, 0.25), 3


def run(g, **values):
    return exported_session(g.model()).run(None, values)


def exported_session(model):
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=['CPUExecutionProvider']
    )


def maps(head, columns, spread=1.0):
    priors = head.num_base_priors
    return [
        (spread * torch.randn(1, priors * columns, height, width))
        for height, width in ((6, 8), (3, 4))
    ]


def given(g, values):
    """The maps as inputs of a graph, and for its run."""
    fed = {
        f'{name}_{i}': x.numpy() for name, levels in values.items() for i, x in enumerate(levels)
    }
    return {name: g.takes(name, FLOAT, x.shape) for name, x in fed.items()}, fed


@pytest.mark.parametrize('kind', list(DENSE))
@pytest.mark.parametrize('threshold', [0.3, 1.0], ids=['some', 'none'])
def test_dense_heads(kind, threshold):
    torch.manual_seed(0)
    settings = ConfigDict(nms_pre=50, score_thr=threshold, min_bbox_size=0, nms=NMS, max_per_img=20)
    built = dict(num_classes=CLASSES, in_channels=4, feat_channels=4, test_cfg=settings)
    head = MODELS.build({**built, **DENSE[kind]}).eval()
    distances = 20 if kind in ('points', 'distances') else 0.5
    values = dict(
        head_0=maps(head, head.cls_out_channels, 2),
        head_1=[distances * x.abs() for x in maps(head, 4)],
    )
    if kind == 'points':
        values['head_2'] = maps(head, 1)
    meta = dict(img_shape=SIZE, scale_factor=SCALE)
    (want,) = head.predict_by_feat(
        *values.values(), batch_img_metas=[meta], cfg=settings, rescale=True
    )
    assert len(want) == (20 if threshold < 1 else 0)
    g = Graph(18)
    out, fed = given(g, values)
    limits, scale = np.float32([*SIZE[::-1]] * 2), np.float32(SCALE * 2)
    found = heads.dense(g, head, out, g.add('Identity', limits), g.add('Identity', scale))
    for name in ('boxes', 'scores', 'labels'):
        g.gives(name, found[name], *detector.KINDS[name])
    found, scores, labels = run(g, **fed)
    assert labels.tolist() == want.labels.tolist()
    np.testing.assert_allclose(scores, want.scores, rtol=1e-5)
    np.testing.assert_allclose(found, want.bboxes.reshape(-1, 4), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize('smallest', [0, 12], ids=['all', 'large'])
def test_proposals(smallest):
    torch.manual_seed(0)
    settings = ConfigDict(nms_pre=30, nms=NMS, max_per_img=15, min_bbox_size=smallest)
    head = MODELS.build(
        dict(type='RPNHead', in_channels=4, anchor_generator=ANCHORS, test_cfg=settings)
    ).eval()
    values = dict(rpn_scores=maps(head, 1), rpn_boxes=maps(head, 4, 0.5))
    meta = dict(img_shape=SIZE, scale_factor=SCALE)
    (want,) = head.predict_by_feat(*values.values(), batch_img_metas=[meta], cfg=settings)
    g = Graph(18)
    out, fed = given(g, values)
    limits = g.add('Identity', np.float32([*SIZE[::-1]] * 2))
    g.gives('boxes', heads.proposals(g, head, out, limits), *detector.KINDS['boxes'])
    (found,) = run(g, **fed)
    assert len(found) == 15
    np.testing.assert_allclose(found, want.bboxes, rtol=1e-5, atol=1e-3)


RANDOM = torch.tensor(
    [[3.2, 1.0, 9.7, 4.4], [0, 0, 60, 44], [7.5, 20, 7.5, 30], [30.1, 2.2, 44, 43.9]]
)


@pytest.mark.parametrize('sampling', [0, 2])
def test_regions(sampling):
    """Boxes of several levels, one without area; with 0 a bin takes samples by its size."""
    torch.manual_seed(0)
    extractor = MODELS.build(
        dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=(3, 4), sampling_ratio=sampling),
            out_channels=2,
            featmap_strides=[4, 8],
            finest_scale=10,
        )
    )
    levels = [torch.randn(1, 2, 11, 15), torch.randn(1, 2, 6, 8)]
    rois = torch.cat([torch.zeros(4, 1), RANDOM], 1)
    assert extractor.map_roi_levels(rois, 2).tolist() == [0, 1, 0, 1]
    g = Graph(18)
    out, fed = given(g, dict(feature=levels))
    g.gives(
        'y',
        boxes.regions(g, extractor, list(out.values()), constant(g, RANDOM)),
        FLOAT,
        ['n', 2, 3, 4],
    )
    np.testing.assert_allclose(run(g, **fed)[0], extractor(levels, rois), rtol=1e-5, atol=1e-6)


def constant(g, value):
    return g.add('Identity', np.asarray(value))


def test_pasted_masks():
    torch.manual_seed(0)
    head = MODELS.build(dict(type='FCNMaskHead', num_convs=0, in_channels=2, num_classes=3))
    masks, labels = torch.randn(4, 3, 5, 7), torch.tensor([2, 0, 1, 1])
    (want,) = head.predict_by_feat(
        [masks],
        [InstanceData(bboxes=RANDOM * 2, labels=labels)],
        [dict(scale_factor=(0.5, 0.5), ori_shape=(90, 130))],
        ConfigDict(mask_thr_binary=0.5),
        rescale=False,
    )
    g = Graph(18)
    probabilities = boxes.masks_of_labels(g, constant(g, masks.sigmoid()), constant(g, labels))
    sizes = [constant(g, [45]), constant(g, [65])]
    g.gives(
        'y',
        boxes.pasted(g, probabilities, constant(g, RANDOM * 2), sizes, 0.5),
        BOOL,
        ['n', 'h', 'w'],
    )
    (found,) = run(g)
    assert found.shape == want.masks.shape and not found[2].any()  # without area
    assert all(found[i].any() for i in (0, 1, 3))
    found[2] = want.masks[2]
    assert (found != want.masks.numpy()).sum() <= 2


def without_detections(path):
    """The same file with thresholds that no score exceeds."""
    model = onnx.load(str(path))
    thresholds = {n.input[1] for n in model.graph.node if n.op_type == 'Greater'}
    changed = 0
    for i, constant in enumerate(model.graph.initializer):
        if constant.name in thresholds:
            changed += 1
            high = onnx.numpy_helper.from_array(np.float32(2), constant.name)
            model.graph.initializer[i].CopyFrom(high)
    assert changed
    return exported_session(model)


def snippet_of_deploy(**replaced):
    """The example of the page, on other files and sizes; its variables."""
    (text,) = re.findall(
        r'^```python\n(import cv2\n.*?)^```', DEPLOY.read_text(), re.MULTILINE | re.DOTALL
    )
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    exec(compile(text, 'snippet', 'exec'), values := {})
    return values


def test_a_whole_detector(folder, tmp_path, monkeypatch, capsys):
    """By the tool, on drawn pictures; then on one that was resized unevenly, and on nothing."""
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    checkpoint, out = tmp_path / 'weights.pth', tmp_path / 'out'
    state = torch.load(folder / 'mask_rcnn.pth', weights_only=True)
    # Scores of 1 and 1 - 1e-7 are in either order.
    state['state_dict']['roi_head.bbox_head.fc_cls.weight'] /= 8
    torch.save(state, checkpoint)
    images = (folder / 'images/a.png', folder / 'images/b.jpg')
    run_here(
        monkeypatch,
        'model_converters/export_onnx.py',
        *(QUICK['mask_rcnn'], checkpoint, '-o', out),
        *('--shape', 64, 96, '--whole', '--images', *images),
    )
    said = capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ['model.onnx']
    assert all(f'{image}: ' in said for image in images) and ': 0 found' not in said
    cfg = config.load_config(str(QUICK['mask_rcnn']))
    model = inference.load_model(cfg, str(checkpoint))
    session = exported.onnxruntime_session(out / 'model.onnx')
    found = detector.check_detector(session, model, uneven(cfg))
    assert found['found'] > 0 and found['boxes'] < 0.01 and found['scores'] < 1e-4
    values = snippet_of_deploy(
        **{"'DIR/": f"'{out}/", "'IMAGE.jpg'": repr(str(images[1])), '800 /': '64 /', '1333': '96'}
    )
    assert len(values['boxes']) == len(values['masks'][0]) > 0
    assert values['masks'][0].shape[1:] == values['image'].shape[:2]
    first, *_, masks = without_detections(out / 'model.onnx').run(
        None,
        {
            detector.IMAGE: np.zeros((64, 96, 3), np.uint8),
            detector.SCALE: np.ones(2, np.float32),
            detector.SIZE: np.array([30, 40], np.int64),
        },
    )
    assert first.shape == (0, 4) and masks.shape == (0, 30, 40)
    model.roi_head.bbox_head.fc_reg.bias.data += 1  # another model finds other boxes
    with pytest.raises(exported.NotExportable, match='the model finds class'):
        detector.check_detector(session, model, uneven(cfg))


def test_that_nothing_was_found_is_said():
    """Two random images show next to nothing of a model that knows its own classes."""
    nothing = dict(found=0.0, boxes=0.0, scores=0.0, masks=0.0)
    assert 'compares little' in detector.report({'a': nothing, 'b': nothing})
    assert 'compares little' not in detector.report({'a': nothing, 'b': {**nothing, 'found': 1.0}})


def uneven(cfg):
    """A random image, resized to less than half its width and half its height."""
    batch = inference.batch_of(cfg, inference.random_image(70, 50))
    meta = dict(ori_shape=(140, 150), scale_factor=(50 / 150, 70 / 140))
    batch['data_samples'][0].set_metainfo(meta)
    return batch


def test_a_dense_detector(folder, tmp_path):
    """Without norms, which take the exporter most of its time."""
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    cfg = config.load_config(str(folder / 'retinanet.py'))
    plain, model = dict(norm_cfg=None, conv_cfg=None), cfg.model
    model.backbone.norm_cfg = dict(type='BN')  # update would merge
    model.backbone.update(conv_cfg=None, out_indices=(3,))
    model.neck.update(plain, in_channels=[64], num_outs=2)
    model.bbox_head.update(plain, type='RetinaHead', stacked_convs=1)
    model.bbox_head.pop('num_ins')
    model.bbox_head.anchor_generator.strides = [32, 64]
    torch.manual_seed(0)
    model = inference.build_model(cfg)
    model.bbox_head.retina_cls.bias.data += 3  # scores above the threshold
    x = inference.preprocess(model, cfg, inference.random_image(64, 96))
    detector.export_detector(model, x, tmp_path / 'model.onnx', metadata=dict(classes=['a']))
    exported.check_graph(tmp_path / 'model.onnx')
    session = exported.onnxruntime_session(tmp_path / 'model.onnx')
    assert [given.name for given in session.get_inputs()] == [detector.IMAGE, detector.SCALE]
    assert session.get_modelmeta().custom_metadata_map == dict(classes='["a"]')
    found = detector.check_detector(session, model, uneven(cfg))
    assert found['found'] > 0 and found['boxes'] < 0.01 and found['scores'] < 1e-4


def test_heads_that_predict_in_another_way_are_refused(folder):
    cfg = config.load_config(str(folder / 'retinanet.py'))
    model = inference.build_model(cfg)
    heads.refuse_what_differs(model)
    settings = model.bbox_head.test_cfg
    for change, words in (
        (dict(nms=dict(type='soft_nms')), 'another non-maximum suppression'),
        (dict(nms_pre=-1), 'no test_cfg.nms_pre'),
    ):
        model.bbox_head.test_cfg = ConfigDict({**settings, **change})
        with pytest.raises(exported.NotExportable, match=words):
            heads.refuse_what_differs(model)
    model.bbox_head.test_cfg = settings
    model.bbox_head.__class__ = type('Own', (type(model.bbox_head),), {'predict': lambda s: None})
    with pytest.raises(exported.NotExportable, match='Own has another predict than BaseDenseHead'):
        heads.refuse_what_differs(model)


def test_constants_and_names_of_a_graph():
    g = Graph(18)
    x = g.takes('x', INT, ['n'])
    g.gives('y', g.add('Add', g.add('Mul', x, 2), [1]), INT, ['n'])
    (y,) = run(g, x=np.arange(3))
    assert y.tolist() == [1, 3, 5]
