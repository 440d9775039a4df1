"""tools/dev: check_folding.py goes network by network; the table of evaluate_folded.py."""

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import json
import sys

import check_folding
import evaluate_folded
import torch

from tests.openmmlab.deploy.models import LISTED

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures


def test_check_folding_goes_through_networks_and_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / 'segmenter.py').write_text(LISTED['segmenter'])
    other = tmp_path / 'other_training.py'
    other.write_text("_base_ = 'segmenter.py'\nmodel = dict(backbone=dict(norm_eval=True))\n")
    names = [f'{tmp_path}/segmenter.py', str(other)]
    file = tmp_path / 'found.jsonl'
    monkeypatch.setattr(sys, 'argv', ['', *names, '--shape', '64', '96', '-o', str(file)])
    check_folding.main()
    (row,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith('| segmenter'))
    assert row.startswith('| segmenter | 2 | 23 | 0 | 0 |') and 'layers listed' in row
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[1]['same_as'] == names[0]
    assert 0 < rows[0]['fold_float64'] < 1e-10 and rows[0]['left'] == {}
    rows[0]['fold_float64'] = 1e-9  # what is in the file is not computed again, but judged
    file.write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match='(?s)too large.*segmenter.py: fold_float64 1e-09'):
        check_folding.main()


def test_what_the_evaluation_of_a_folded_model_shows():
    def result(top1, *scores):
        return dict(metrics={'acc/top1': top1}, scores=torch.tensor(scores, dtype=torch.float64))

    found = {
        evaluate_folded.TRAINED: result(0.5, [0.75, 0.25], [0.5, 0.5 - 1e-7]),
        evaluate_folded.FOLDED: result(0.5, [0.75, 0.25], [0.5, 0.5 + 1e-7]),
    }
    assert evaluate_folded.table(found).splitlines()[2:] == [
        '| acc/top1 | 0.5000 | 0.5000 |',
        '| largest difference of a score | 0.0e+00 | 2.0e-07 |',
        '| same class, of 2 samples | 2 | 1 |',
    ]
