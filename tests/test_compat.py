"""Which releases of torch are taken, and the gaps between them."""

import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from wsbcn_mm import compat

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('version', ['2.5.1', '2.5.1+cu121', '1.13.0'])
def test_a_torch_that_is_too_old_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, '__version__', version)
    with pytest.raises(ImportError, match=re.escape(f'needs torch >= 2.6\n  got {version}\n')):
        compat.check_torch()


def test_a_torch_that_is_newer_than_those_tested_gets_one_line(monkeypatch):
    newer = f'{compat.NEWEST[0]}.{compat.NEWEST[1] + 1}.0a0+git1234'
    monkeypatch.setattr(torch, '__version__', newer)
    with pytest.warns(UserWarning, match='tested with torch 2.6 to') as said:
        compat.check_torch()
    assert len(said) == 1 and '\n' not in str(said[0].message)


@pytest.mark.parametrize(
    'version', ['2.6.0+cpu', '2.10.0', f'{compat.NEWEST[0]}.{compat.NEWEST[1]}.1']
)
def test_tested_ones_are_taken_without_a_word(monkeypatch, version):
    monkeypatch.setattr(torch, '__version__', version)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        compat.check_torch()


def test_the_bounds_are_those_of_the_package_and_of_the_stacks_that_are_tested():
    stacks = [
        line.split()
        for line in (ROOT / 'tools/dev/stacks.txt').read_text().splitlines()
        if not line.startswith('#')
    ]
    releases = sorted(tuple(map(int, stack[2].split('.')[:2])) for stack in stacks)
    assert (releases[0], releases[-1]) == (compat.OLDEST, compat.NEWEST)
    setup = (ROOT / 'setup.py').read_text()
    assert f"install_requires=['torch>={'.'.join(map(str, compat.OLDEST))}']" in setup
    pythons = sorted(tuple(map(int, stack[1].split('.'))) for stack in stacks)
    assert f"python_requires='>={'.'.join(map(str, pythons[0]))}'" in setup


def test_a_backward_pass_is_seen():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append(compat.backward_pass())
            return grad * 2

    assert compat.backward_pass() == -1
    Look.apply(torch.ones(1, requires_grad=True)).backward()
    assert len(seen) == 1 and seen[0] >= 0


def test_hooks_on_saved_tensors_are_seen():
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert compat.saved_tensors_may_be_hooked()
    if compat.saved_tensors_may_be_hooked():  # a False may be missing in old releases alone
        assert compat.installed() < (2, 8)


def test_a_torch_that_cannot_be_asked_for_hooks(monkeypatch):
    monkeypatch.setattr(compat, 'TOP_HOOKS', None)
    assert compat.saved_tensors_may_be_hooked()
    assert compat.recording_checkpoint() is None


def test_the_question_that_stops_old_tracers_is_not_asked_while_compiling(monkeypatch):
    def refuse(device_type):
        raise AssertionError('asked')

    monkeypatch.setattr(torch.amp, 'is_autocast_available', refuse)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    assert compat.autocast_dtype('cpu') is None


def test_what_autocast_computes_in():
    assert compat.autocast_dtype('cpu') is None
    assert compat.autocast_dtype('meta') is None  # has no autocast
    with torch.autocast('cpu', torch.bfloat16):
        assert compat.autocast_dtype('cpu') is torch.bfloat16
        assert compat.autocast_dtype('meta') is None
        with torch.autocast('cpu', enabled=False):
            assert compat.autocast_dtype('cpu') is None


def test_memory_of_cuda_graphs_is_known(monkeypatch):
    """With a GPU that there is not: who captures, and who runs before torch.compile captures."""
    here, device = object(), torch.device('cuda', 1)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda of: here)
    managers = {0: here}

    def get_manager(index, create_if_none_exists):
        assert not create_if_none_exists
        return managers.get(index) and types.SimpleNamespace(stream=managers[index])

    trees = types.SimpleNamespace(
        local=types.SimpleNamespace(tree_manager_containers={}), get_manager=get_manager
    )
    for modules, of_graph in (({}, None), ({'torch._inductor.cudagraph_trees': trees}, here)):
        monkeypatch.setattr(sys, 'modules', modules)
        for stream in (None, here, object()):
            managers[1] = stream
            for captures in (False, True):
                monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda c=captures: c)
                expected = captures or (of_graph is not None and stream is here)
                assert compat.allocates_for_graphs(device) == expected
                assert not compat.allocates_for_graphs(torch.device('cpu'))
