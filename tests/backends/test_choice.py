"""Choosing a backend: by the device, by name, by the environment."""

import importlib.util
import runpy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from wsbcn_mm import BatchChannelNorm2d, WSConv2d, backends
from wsbcn_mm.backends import cpu, schemas

needs_cpu_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason=f'{cpu.unavailable()}')


@needs_cpu_kernels
def test_cpu_tensors_get_the_cpu_kernels():
    assert backends.select(torch.zeros(1)) == 'cpu'
    assert backends.select(torch.zeros(1, device='meta')) == 'eager'


def test_use_backend_is_undone_also_after_an_error():
    before = backends.select(torch.zeros(1))
    with pytest.raises(KeyError), backends.use_backend('eager'):
        assert backends.select(torch.zeros(1)) == 'eager'
        raise KeyError
    assert backends.select(torch.zeros(1)) == before


@needs_cpu_kernels
@pytest.mark.parametrize('first_to_end', [0, 1])
def test_blocks_that_overlap_leave_nothing_behind(first_to_end):
    """As two threads or tasks open them: the one entered last decides, in all threads."""
    before = backends.forced()
    blocks = [backends.use_backend(name) for name in ('eager', 'cpu')]
    for block in blocks:
        block.__enter__()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(backends.forced).result() == backends.forced() == 'cpu'
    blocks[first_to_end].__exit__(None, None, None)
    assert backends.forced() == ('eager' if first_to_end else 'cpu')
    blocks[1 - first_to_end].__exit__(None, None, None)
    assert backends.forced() == before


def test_many_threads_open_and_close_blocks():
    before = backends.forced()

    def use(name):
        for _ in range(50):
            with backends.use_backend(name), backends.use_backend('eager'):
                assert backends.forced() is not None

    names = [name for name in ('eager', 'cpu') if backends.BACKENDS[name].unavailable() is None]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, 4 * names))
    assert backends.forced() == before


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match='must be one of cpu, triton, eager\n  got .cuda.'):
        with backends.use_backend('cuda'):
            pass


def test_a_backend_that_is_missing_is_an_error_when_asked_for(monkeypatch):
    monkeypatch.setattr(cpu, 'unavailable', lambda: 'no compiler')
    with pytest.raises(RuntimeError, match='cannot be used\n  no compiler'):
        with backends.use_backend('cpu'):
            pass


@needs_cpu_kernels
def test_a_backend_asked_for_does_not_take_what_it_cannot():
    with backends.use_backend('cpu'), pytest.raises(RuntimeError, match='tensor on meta'):
        WSConv2d(2, 2, 3, device='meta').standardized_weight()


@needs_cpu_kernels
def test_empty_tensors_pass_also_where_the_backend_asked_for_takes_none(monkeypatch):
    """As the Triton kernels: a mask head without RoIs."""
    takes = cpu.supports
    refuses = lambda x: takes(x) if x.numel() else 'cannot take an empty tensor'  # noqa: E731
    monkeypatch.setattr(cpu, 'supports', refuses)
    layer, conv = BatchChannelNorm2d(8, 4), WSConv2d(8, 8, 1)
    x = torch.zeros(0, 8, 5, 5, requires_grad=True)
    with backends.use_backend('cpu'):
        y = layer(conv(x))
        y.sum().backward()
        assert backends.select(x.detach() + 0) == 'eager' and x.grad.shape == y.shape == x.shape
        assert layer.eval()(x).shape == x.shape


def test_a_missing_backend_is_reported_once(monkeypatch):
    monkeypatch.setitem(backends.UNAVAILABLE, 'cpu', 'no compiler')
    monkeypatch.setattr(backends, '_warned', set())
    with pytest.warns(UserWarning, match='slower: no compiler'):
        assert backends.select(torch.zeros(1)) == 'eager'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert backends.select(torch.zeros(1)) == 'eager'


def test_the_environment_chooses(monkeypatch):
    """When the module is imported, which it is once more here, under another name."""
    spec = importlib.util.spec_from_file_location('again', backends.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setenv('WSBCN_BACKEND', 'eager')
    spec.loader.exec_module(again)
    assert again.select(torch.zeros(1)) == again.forced() == 'eager'
    monkeypatch.setenv('WSBCN_BACKEND', 'fast')
    with pytest.raises(ValueError, match='WSBCN_BACKEND must be one of'):
        spec.loader.exec_module(again)


def test_report_names_every_backend(capsys):
    runpy.run_module('wsbcn_mm.backends', run_name='__main__')
    printed = capsys.readouterr().out
    for name in backends.BACKENDS:
        assert f'\n{name}' in printed
    assert backends.report() in printed


def test_what_is_wrong_with_a_build_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, '__file__', str(tmp_path / '__init__.py'))
    assert 'not compiled' in cpu.load() and '--no-build-isolation' in cpu.load()
    library = tmp_path / f'_kernels{cpu.EXTENSION_SUFFIXES[0]}'
    library.write_bytes(b'of any torch' + schemas.mark() + b'.')
    assert 'another torch (' in cpu.load()
    monkeypatch.setattr(schemas, 'SCHEMAS', (*schemas.SCHEMAS, 'one_more() -> ()'))
    assert 'another version of this package' in cpu.load() and 'compiles them again' in cpu.load()
