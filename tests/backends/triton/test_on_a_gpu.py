"""On a GPU: networks train over the launcher as over plain torch, in threads, graphs, streams."""

import copy
import threading

import pytest
import torch

import wsbcn_mm
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.network import Network, train
from wsbcn_mm import BatchChannelNorm2d, backends
from wsbcn_mm.backends import triton

pytestmark = pytest.mark.skipif(DEVICE != 'cuda', reason='needs a GPU')


@pytest.fixture(autouse=True)
def allocator():
    """Poisoned memory is for kernels; what is captured in a graph may not wait for a fill."""
    torch.use_deterministic_algorithms(False)


def network(mode: str = 'estimate', scope: bool = True) -> Network:
    torch.manual_seed(0)
    model = Network(mode).double().cuda()
    if scope:
        wsbcn_mm.standardize_once_per_forward(model)
    return model


def images(*sizes):
    torch.manual_seed(1)
    return [torch.randn(2, 3, size, 7, dtype=torch.float64).cuda() for size in sizes]


def test_the_launcher_is_there():
    if backends.BACKENDS['cpu'].unavailable() is None:
        assert triton.HAS_NODES


@pytest.mark.parametrize('scope', [False, True])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_a_network_trains_as_over_plain_torch(mode, scope):
    steps = images(6, 8, 6, 40)
    with backends.use_backend('eager'):
        expected = network(mode, scope)
        train(expected, steps)
    model = network(mode, scope)
    train(model, steps)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_a_new_thread_and_another_stream():
    (x,) = images(6)
    model, found = network(), []
    expected = copy.deepcopy(model)(x)
    layer, y = BatchChannelNorm2d(8, 4).cuda(), torch.randn(2, 8, 5, 5, device='cuda')
    layer(y)
    torch.cuda.synchronize()

    def first_of_all():  # nothing but our kernels has used the device in this thread
        layer.eval()
        with torch.no_grad():
            found.append(layer(y))

    def in_a_stream():
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(model(x))
            found[-1].square().mean().backward()
            torch.cuda.current_stream().synchronize()

    for work in (first_of_all, in_a_stream):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(found) == 2
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found[0], layer(y))


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_a_step_captured_in_a_graph(mode):
    (x,) = images(6)
    model = network(mode)
    parameters = list(model.parameters())

    def step():
        return torch.autograd.grad(model(x).square().mean(), parameters)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    before = copy.deepcopy(model.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step()
    model.load_state_dict(before)
    graph.replay()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    for captured, expected in zip(gradients, step()):
        torch.testing.assert_close(captured, expected)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(after[name], value)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision_and_checkpointing(dtype, monkeypatch):
    # Else cuDNN may add up a convolution's gradients in another order, rounded to half precision.
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    x = images(12)[0].float()
    model = network().float()
    expected = copy.deepcopy(model)

    def run(model, checkpointed):
        with torch.autocast('cuda', dtype):
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            else:
                y = model(x)
        y.float().square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    found, wanted = run(model, True), run(expected, False)
    for name, gradient in wanted.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()
        torch.testing.assert_close(found[name], gradient)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
