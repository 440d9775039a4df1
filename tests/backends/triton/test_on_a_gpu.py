"""On a GPU: networks train over the launcher as over plain torch, in threads, graphs, streams."""

import copy
import threading
import time

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


def network(mode: str = 'estimate', scope: bool = True, watched: bool = False) -> Network:
    torch.manual_seed(0)
    model = Network(mode).double().cuda()
    if scope:
        wsbcn_mm.standardize_once_per_forward(model)
    if watched:  # as by DistributedDataParallel: each weight of a scope has nodes of its own
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: None)
    return model


def images(*sizes):
    torch.manual_seed(1)
    return [torch.randn(2, 3, size, 7, dtype=torch.float64).cuda() for size in sizes]


def test_the_launcher_is_there():
    if backends.BACKENDS['cpu'].unavailable() is None:
        assert triton.HAS_NODES


@pytest.mark.parametrize('scope, watched', [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_a_network_trains_as_over_plain_torch(mode, scope, watched):
    steps = images(6, 8, 6, 40)
    with backends.use_backend('eager'):
        expected = network(mode, scope)
        train(expected, steps)
    model = network(mode, scope, watched)
    train(model, steps)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize('watched', [False, True])
def test_a_new_thread_and_another_stream(watched):
    (x,) = images(6)
    model, found = network(watched=watched), []
    same = copy.deepcopy(model)
    expected = same(x)
    expected.square().mean().backward()
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
    for parameter, alike in zip(model.parameters(), same.parameters()):
        torch.testing.assert_close(parameter.grad, alike.grad)


@pytest.mark.parametrize('mode, watched', [('estimate', False), ('batch', False), ('batch', True)])
def test_a_step_captured_in_a_graph(mode, watched):
    (x,) = images(6)
    model = network(mode, watched=watched)
    parameters = list(model.parameters())

    def step():
        model.zero_grad()
        model(x).square().mean().backward()
        return [parameter.grad for parameter in parameters]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    before = copy.deepcopy(model.state_dict())
    time.sleep(0.02)  # autograd's thread may still hold a node of a stream that is not captured
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


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_training_compiled_for_graphs(mode):
    """It runs once, is captured in the second step, and replayed from then on."""
    (x,) = images(6)
    model = network(mode)
    expected, compiled = copy.deepcopy(model), torch.compile(model, mode='reduce-overhead')
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        for one in (expected, compiled):
            one(x).square().mean().backward()
        with torch.no_grad():
            for own in (expected, model):
                for parameter in own.parameters():
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


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
