"""tools/dev/compare_converted.py: what differs between its runs, and its records."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmseg', reason='compares configs of mmseg')

import json
import sys

import compare_converted as tool

SOURCE = 'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py'


def arguments(monkeypatch, *more):
    monkeypatch.setattr(sys, 'argv', ['compare_converted.py', *map(str, more)])
    return tool.parse_args()


def without(value, *keys):
    """A config without some keys, at any depth."""
    if isinstance(value, dict):
        return {k: without(v, *keys) for k, v in value.items() if k not in keys}
    return [without(v, *keys) for v in value] if isinstance(value, (list, tuple)) else value


def test_the_layers_and_their_hook_are_all_that_differs(monkeypatch, tmp_path):
    (tmp_path / 'classes.txt').write_text('sky\nroad\n')
    args = arguments(monkeypatch, SOURCE, '--data', tmp_path, '-o', tmp_path / 'out')
    old, new = (tool.configure(SOURCE, str(tmp_path), kind, args) for kind in tool.KINDS)
    assert new.custom_hooks == [dict(type='EstimatesHook')] and old.custom_hooks == []
    assert new.model.backbone.norm_cfg.type == 'BCN'
    assert old.model.backbone.norm_cfg.type == 'SyncBN'
    layers = ('norm_cfg', 'conv_cfg', 'custom_hooks', 'work_dir')
    assert without(new.to_dict(), *layers) == without(old.to_dict(), *layers)
    for cfg in (old, new):
        assert cfg.resume and cfg.train_dataloader.batch_size == 1
        assert cfg.model.pretrained is None and not cfg.model.backbone.norm_eval
        assert cfg.model.decode_head.num_classes == 2
    assert old.work_dir != new.work_dir


def test_losses_of_pieces_are_one_run(tmp_path):
    """What came after the checkpoint that training went on from is replaced."""
    for piece, losses in (('1', {10: 3.0, 20: 2.0}), ('2', {20: 2.5, 30: 1.0})):
        file = tmp_path / piece / 'vis_data' / 'scalars.json'
        file.parent.mkdir(parents=True)
        lines = [dict(step=step, loss=loss) for step, loss in losses.items()]
        file.write_text('\n'.join(map(json.dumps, [*lines, dict(step=30, lr=0.1)])))
    assert tool.losses_of(tmp_path) == {10: 3.0, 20: 2.5, 30: 1.0}


def test_the_picture_comes_from_the_record_alone(monkeypatch, root, tmp_path, capsys):
    record = root / 'docs' / 'converted_losses.json'
    arguments(monkeypatch, '-n', 0, '--record', record, '--plot', tmp_path / 'a.png')
    tool.main()
    assert (tmp_path / 'a.png').stat().st_size > 10_000
    assert 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py converted' in capsys.readouterr().out
    for entry in json.loads(record.read_text()).values():
        assert entry['original'].keys() == entry['converted'].keys()  # of equal length
        assert max(map(int, entry['original'])) >= 300
        assert entry['validation'].keys() == {'original', 'converted'}


def test_a_record_of_other_settings_is_not_overwritten(monkeypatch, tmp_path):
    record = tmp_path / 'losses.json'
    text = json.dumps({SOURCE: dict(data='camvid', size=112, seed=0)})
    record.write_text(text)
    arguments(monkeypatch, SOURCE, '--data', 'camvid', '--size', 64, '--record', record)
    with pytest.raises(SystemExit, match='other settings'):
        tool.main()
    assert record.read_text() == text
