"""Every kind of pair becomes plain layers of torch with the same results."""

import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from tests.folding.cases import check_fold, relative, trained
from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
    fold,
)

SIZES = {1: (9,), 2: (7, 9), 3: (5, 6, 7)}
KINDS = {
    1: (nn.Conv1d, WSConv1d, BatchChannelNorm1d),
    2: (nn.Conv2d, WSConv2d, BatchChannelNorm2d),
    3: (nn.Conv3d, WSConv3d, BatchChannelNorm3d),
}


@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('ws', [True, False])
@pytest.mark.parametrize('affine', ['group', 'channel', None])
def test_convolution_and_bcn(dims, ws, affine):
    plain, standardized, norm = KINDS[dims]
    x = torch.randn(2, 4, *SIZES[dims]).double() + 1
    kinds = itertools.product((True, False), ('zeros', 'reflect'), (1, 2), ('paper', 'std_eps'))
    for bias, padding_mode, groups, formula in kinds:
        arguments = dict(bias=bias, padding=1, padding_mode=padding_mode, groups=groups)
        if ws:
            conv = standardized(4, 8, 3, formula=formula, eps=1e-3, **arguments)
        else:
            conv = plain(4, 8, 3, **arguments)
        model = nn.Sequential(conv, norm(8, 2, eps=1e-2, affine=affine), nn.ReLU())
        folded = check_fold(model, x)
        assert [type(m) for m in folded] == [plain, nn.GroupNorm, nn.ReLU]
        assert folded[0].padding_mode == padding_mode
        assert (folded[1].weight is None) == (affine is None)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('kind', [nn.ConvTranspose2d, WSConvTranspose2d])
def test_transposed_convolution_and_bcn(kind, groups):
    conv = kind(4, 12, 3, stride=2, padding=1, output_padding=1, groups=groups, dilation=2)
    folded = check_fold(
        nn.Sequential(conv, BatchChannelNorm2d(12, 3)), torch.randn(2, 4, 7, 6).double()
    )
    assert [type(m) for m in folded] == [nn.ConvTranspose2d, nn.GroupNorm]


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_ws_and_batch_norm(norm, affine):
    model = nn.Sequential(WSConv2d(4, 8, 3), norm(8, affine=affine), nn.ReLU())
    folded = check_fold(model, torch.randn(2, 4, 7, 7).double())
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]


def test_ws_and_group_norm_or_nothing():
    model = nn.Sequential(WSConv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), WSConv2d(8, 2, 1))
    norm = model[1]
    folded = check_fold(model, torch.randn(2, 4, 7, 7).double())
    assert [type(m) for m in folded] == [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.Conv2d]
    assert folded[1] is not norm


def test_batch_norm_of_others_is_not_touched():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), WSConv2d(8, 4, 3))
    folded = check_fold(model, torch.randn(2, 4, 7, 7).double())
    assert [type(m) for m in folded] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]


def test_batch_norm_without_statistics_cannot_be_folded():
    model = nn.Sequential(WSConv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).double()
    x = torch.randn(2, 4, 7, 7).double()
    folded = fold(model)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.BatchNorm2d]
    assert relative(folded(x), model.eval()(x)) < 1e-12


@pytest.mark.parametrize('model', [WSConv2d(3, 8, 3), WSConvTranspose2d(3, 8, 3)])
def test_a_single_layer(model):
    folded = check_fold(model, torch.randn(2, 3, 7, 7).double())
    assert type(folded) in (nn.Conv2d, nn.ConvTranspose2d)


def test_batch_mode_folds_its_running_statistics():
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2, mode='batch'))
    check_fold(model, torch.randn(2, 4, 7, 7).double())


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_dtype_and_layout_stay(dtype, bound):
    model = trained(nn.Sequential(WSConv2d(16, 32, 3), BatchChannelNorm2d(32, 4))).eval()
    x = torch.randn(2, 16, 9, 9)
    expected = model(x.double())
    model = model.to(dtype, memory_format=torch.channels_last)
    folded = fold(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert relative(folded(x.to(dtype)).double(), expected) < bound


def test_folding_keeps_what_is_frozen():
    model = nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2))
    assert all(p.requires_grad for p in fold(model).parameters())
    assert not any(p.requires_grad for p in fold(model.requires_grad_(False)).parameters())


def test_the_result_is_saved_without_this_package():
    model = trained(nn.Sequential(WSConv2d(4, 8, 3), BatchChannelNorm2d(8, 2), WSConv2d(8, 8, 1)))
    file = io.BytesIO()
    torch.save(fold(model), file)
    assert b'wsbcn_mm' not in file.getvalue()
    assert b'wsbcn_mm' not in pickle.dumps(fold(model))
