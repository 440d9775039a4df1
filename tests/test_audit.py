"""wsbcn_mm.audit: every finding has a model that shows it, and one that does not."""

import pytest
import torch
from torch import nn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.audit import audit_model, has_problems
from wsbcn_mm.convert import convert_model


def codes(model, *args, **kwargs):
    return [(f.level, f.code) for f in audit_model(model, *args, **kwargs)]


def block(conv=WSConv2d, norm=None):
    return nn.Sequential(conv(3, 8, 3), norm or BatchChannelNorm2d(8, 4))


def test_ws_and_bcn_are_clean():
    assert codes(block()) == []


def test_a_converted_model_is_clean():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    assert codes(model) == [('error', 'batch-statistics')]
    convert_model(model)
    assert codes(model) == []


@pytest.mark.parametrize('images, found', [(1, True), (2, True), (3, False), (16, False)])
def test_batch_statistics_of_few_images(images, found):
    assert bool(codes(block(nn.Conv2d, nn.BatchNorm2d(8)), images)) is found


def test_sync_bn_needs_processes():
    model = block(nn.Conv2d, nn.SyncBatchNorm(8))
    assert codes(model, 1, 1) == [('error', 'sync-bn-without-processes')]
    assert codes(model, 1, 2) == [('error', 'batch-statistics')]
    assert codes(model, 1, 8) == []
    assert codes(model, 16, 1) == [('warning', 'sync-bn-without-processes')]


@pytest.mark.parametrize('norm', [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_norm_of_vectors_is_no_case_for_bcn(norm):
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), norm(4))
    found = audit_model(model)
    assert [(f.level, f.code) for f in found] == [('error', 'vector-statistics')]
    assert 'a LayerNorm there' in found[0].fix
    assert codes(model, 32, 2) == []


class NormEval(nn.Sequential):
    """Freezes BatchNorm in train(), as mmdet's norm_eval does."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def test_norm_eval_freezes_the_estimates():
    model = NormEval(*block())
    model.eval()
    assert codes(model) == [('error', 'frozen-estimates')]
    assert not any(m.training for m in model.modules())  # as it was


def test_frozen_bn_is_a_note():
    findings = audit_model(NormEval(*block(nn.Conv2d, nn.BatchNorm2d(8))))
    assert [(f.level, f.code) for f in findings] == [('note', 'frozen-bn')]
    assert not has_problems(findings) and has_problems(findings, strict=True)


def test_batch_mode_of_few_images():
    norm = BatchChannelNorm2d(8, 4, mode='batch')
    assert codes(block(norm=norm)) == [('error', 'batch-statistics')]
    assert codes(block(norm=norm), 8, 2) == [('warning', 'batch-statistics')]
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(block(norm=norm))
    assert codes(synchronised, 1, 8) == []


def test_ws_without_a_norm():
    model = nn.Sequential(*block(), WSConv2d(8, 8, 3))
    (finding,) = audit_model(model)
    assert (finding.level, finding.code) == ('error', 'ws-without-norm')
    assert '72' not in finding.why and 'sqrt(fan-in) = 8' in finding.why


def test_a_norm_without_ws():
    for norm in (BatchChannelNorm2d(8, 4), nn.GroupNorm(4, 8)):
        assert codes(block(nn.Conv2d, norm)) == [('note', 'norm-without-ws')]


def test_findings_are_made_per_part():
    model = nn.ModuleDict(
        dict(
            backbone=nn.Sequential(
                *block(nn.Conv2d, nn.BatchNorm2d(8)), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
            ),
            head=block(nn.Conv2d, nn.BatchNorm2d(8)),
        )
    )
    findings = audit_model(model)
    assert [f.where for f in findings] == [
        'backbone (2 layers, first backbone.1)',
        'head (head.1)',
    ]
    assert 'convert_model' in findings[0].fix and 'error: backbone' in str(findings[0])


def test_a_run_finds_what_the_structure_hides():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = WSConv2d(4, 4, 1), BatchChannelNorm2d(4, 2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    model, x = Skip(), torch.randn(1, 4, 3, 3)
    assert codes(model) == []
    assert codes(model, run=lambda: model(x)) == [('error', 'ws-without-norm')]


def test_wrong_arguments():
    with pytest.raises(TypeError, match='model'):
        audit_model(None)
    with pytest.raises(ValueError, match='images_per_gpu'):
        audit_model(block(), 0)
