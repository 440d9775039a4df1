"""BCN layers under what torch does to modules; see docs/guarantees.md."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    convert,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
    quantize_dynamic,
    quantize_fx,
)
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import mkldnn
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import (
    BatchChannelNorm2d,
    WSConv2d,
    WSConvTranspose2d,
    compat,
    standardize_once_per_forward,
)
from wsbcn_mm.layers.subclasses import standardized_copy

X = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1)).double() + 1


def norm(**settings):
    torch.manual_seed(0)
    layer = BatchChannelNorm2d(8, 4, momentum=0.3, **settings).double()
    nn.init.normal_(layer.batch_weight)
    return layer


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_averaged_models_have_averaged_statistics():
    for settings in (dict(), dict(multi_avg_fn=get_ema_multi_avg_fn(0.5))):
        model, seen = norm(), []
        average = AveragedModel(model, use_buffers=True, **settings)
        for i in range(3):
            model(X + i)
            average.update_parameters(model)
            seen.append(model.bn.running_mean.clone())
        expected = seen[0]
        for i, mean in enumerate(seen[1:], start=1):
            expected = expected.lerp(mean, 0.5 if settings else 1 / (i + 1))
        same(average.module.bn.running_mean, expected)
        assert average.module.bn.weight is average.module.batch_weight


@pytest.mark.parametrize('scope', [False, True])
def test_weights_that_are_edited_before_the_backward_pass_are_refused(scope):
    model = nn.Sequential(WSConv2d(8, 8, 3), WSConv2d(8, 8, 3)).double()
    if scope:
        standardize_once_per_forward(model)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        try:
            loss = model(X).square().sum()
        except AttributeError as error:
            if "'list' object has no attribute 'data_ptr'" not in str(error):
                raise
            pytest.skip('this torch does not know operators that write into lists of tensors there')
        with torch.no_grad():
            model[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            loss.backward()


def test_pruned_and_parametrized_scales_are_frozen_by_the_child():
    norm = BatchChannelNorm2d(8, 4)
    prune.l1_unstructured(norm, 'batch_weight', 2)
    norm.bn.requires_grad_(False)
    assert not norm.batch_weight_orig.requires_grad and norm.weight.requires_grad
    before = norm.bn
    with pytest.raises(ValueError, match='batch_weight of the layer is pruned'):
        norm.bn = nn.BatchNorm2d(8, eps=0.5)
    assert norm.bn is before and norm.eps == 1e-5


def test_a_hook_of_the_child_in_a_trace():
    norm = BatchChannelNorm2d(8, 4, mode='batch')
    norm.bn.register_forward_hook(lambda bn, args, result: None)
    torch.jit.trace(norm, torch.randn(2, 8, 3, 3), check_trace=False)


def test_pruned_and_parametrized_scales():
    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    for change in (
        lambda layer: prune.l1_unstructured(layer, 'batch_weight', 0.5),
        lambda layer: parametrize.register_parametrization(layer, 'batch_weight', Double()),
    ):
        layer, plain = norm(), norm()
        change(layer)
        plain.batch_weight.data.copy_(layer.batch_weight.detach())
        same(layer(X), plain(X))
        assert layer.bn.weight is not plain.bn.weight
        same(layer.bn.weight.detach(), plain.bn.weight.detach())


@pytest.mark.parametrize(
    'change',
    [
        lambda bn: prune.l1_unstructured(bn, 'weight', 0.5),
        lambda bn: prune.custom_from_mask(bn, 'bias', torch.ones(8)),
        lambda bn: parametrize.register_parametrization(bn, 'weight', nn.Identity()),
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
    ],
)
def test_scales_are_not_taken_apart_in_the_child(change):
    layer, expected = norm(), norm()
    with pytest.raises(RuntimeError, match="(?s)child bn cannot be pruned.*layer's batch_"):
        change(layer.bn)
    same(layer(X), expected(X))
    same(layer.state_dict(), expected.state_dict())


def test_tensors_that_are_spread_over_processes_are_refused():
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh('cpu', (1,))
        x = distribute_tensor(X, mesh, [Replicate()])
        scoped = nn.Sequential(WSConv2d(8, 8, 3), WSConv2d(8, 8, 3)).double()
        standardize_once_per_forward(scoped)
        for layer in (norm(), WSConv2d(8, 8, 3).double(), scoped):
            with pytest.raises(TypeError, match=r'got a DTensor(.|\n)*fully_shard'):
                distribute_module(layer, mesh)(x)
    finally:
        distributed.destroy_process_group()


def test_mkldnn_tensors_are_refused():
    """torch would take the raw weight, or the channel stage alone."""
    conv = WSConv2d(8, 8, 3).eval()
    with pytest.raises(RuntimeError, match='(?s)to_mkldnn cannot.*wsbcn_mm.fold'):
        mkldnn.to_mkldnn(nn.Sequential(conv, nn.ReLU()))
    with pytest.raises(RuntimeError, match='to_mkldnn cannot'):
        mkldnn.to_mkldnn(nn.Sequential(norm().float().eval()))
    if torch.backends.mkldnn.is_available():
        x = X.float()
        folded = mkldnn.to_mkldnn(nn.Sequential(conv.to_plain()))
        torch.testing.assert_close(folded(x.to_mkldnn()).to_dense(), conv(x))


@pytest.mark.parametrize('training', [True, False])
def test_symbolic_traces_have_the_layers_as_leaves(training):
    class Own(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight, self.bias)

    def make():
        torch.manual_seed(0)
        convs = WSConv2d(8, 4, 3), standardized_copy(Own(4, 4, 1)), WSConvTranspose2d(4, 8, 3)
        return nn.Sequential(*convs, norm()).double().train(training)

    model = make()
    traced = torch.fx.symbolic_trace(make())
    assert [n.op for n in traced.graph.nodes] == ['placeholder', *['call_module'] * 4, 'output']
    same(copy.deepcopy(traced)(X), model(X))
    y = traced(X)
    same(dict(traced.named_buffers())['3.bn.running_mean'], model[3].bn.running_mean)
    y.pow(3).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_hooks_are_traced_once():
    """They are in the graph: what the graph calls then is the layer without them."""
    model = nn.Sequential(WSConv2d(8, 8, 3), norm(), norm()).double().eval()
    model[0].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    model[1].register_forward_hook(lambda layer, args, y: y * 3)
    model[2].bn.register_forward_pre_hook(lambda bn, args: (args[0] + 1,))
    model[2].bn.register_forward_hook(lambda bn, args, y: None)
    same(torch.fx.symbolic_trace(model)(X), model(X))


def test_a_trace_of_who_asks_for_the_standardized_weight():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = WSConv2d(8, 4, 3, bias=False)

        def forward(self, x):
            return nn.functional.conv2d(x, self.conv.standardized_weight())

    model = Asks().double()
    same(torch.fx.symbolic_trace(model)(X), model(X))


def test_functional_call_updates_the_buffers_it_was_given():
    layer, expected = norm(), norm()
    before = copy.deepcopy(layer.state_dict())
    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    y = torch.func.functional_call(layer, {**dict(layer.named_parameters()), **buffers}, (X,))
    same(y, expected(X))
    same(buffers['bn.running_mean'], expected.bn.running_mean)
    same(layer.state_dict(), before)


def test_training_in_inference_mode_updates():
    layer, expected = norm(), norm()
    with torch.inference_mode():
        y = layer(X)
    same(y.clone(), expected(X))
    same(layer.bn.running_var, expected.bn.running_var)
    layer(X).sum().backward()


@pytest.mark.parametrize('training', [True, False])
def test_traced_and_exported(training):
    layer = norm().train(training)
    expected = copy.deepcopy(layer)
    exported = torch.export.export(copy.deepcopy(layer), (X,)).module()
    traced = torch.jit.trace(copy.deepcopy(layer), X, check_trace=False)
    y = expected(X)
    same(exported(X), y)
    same(dict(exported.named_buffers())['bn.running_mean'], expected.bn.running_mean)
    if not training:  # tracing runs the layer once before
        same(traced(X), y)


@pytest.mark.parametrize('strict', [True, False])
def test_what_is_exported_under_autocast_runs_with_and_without_it(backend, strict):
    torch._dynamo.reset()
    model = nn.Sequential(WSConv2d(8, 8, 3, bias=False), norm().float(), WSConv2d(8, 8, 1)).eval()
    x = X.float()
    with torch.autocast('cpu', torch.bfloat16):
        program = torch.export.export(model, (x,), strict=strict).module()
        y, expected = program(x), model(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    # Plain torch calls note the dtypes that they convert from; strict torch 2.6 does not say that
    # it exports.
    if backend == 'eager' or (strict and not compat.HAS_IS_EXPORTING):
        with pytest.raises(RuntimeError, match='dtype|[Tt]ype'):
            program(x)
    else:
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize('training', [True, False])
def test_programs_take_inputs_in_other_layouts(backend, training):
    layer = norm().train(training)
    wide = torch.cat([X, X + 2], 3)
    layouts = wide[:, :, :, ::2], wide.transpose(2, 3), wide.to(memory_format=torch.channels_last)
    for x in layouts:
        one = torch.empty(x.shape, dtype=x.dtype).copy_(x)[:1]
        torch._dynamo.reset()
        program = torch.export.export(copy.deepcopy(layer), (X,)).module()
        if x.shape == X.shape:
            same(program(x), copy.deepcopy(layer)(x))
        if not training:
            with torch.no_grad():
                traced = torch.jit.trace(copy.deepcopy(layer), one, check_trace=False)
            same(traced(x), copy.deepcopy(layer)(x))


def test_layers_of_a_program_stay_apart_when_it_is_saved(tmp_path):
    torch._dynamo.reset()
    model = nn.Sequential(norm(), nn.Conv2d(8, 8, 1).double(), norm())
    torch.export.save(torch.export.export(model, (X,)), tmp_path / 'program.pt2')
    constants = torch.export.load(tmp_path / 'program.pt2').constants
    identities = [value for name, value in constants.items() if name.endswith('_identity')]
    assert len(identities) == 2
    assert len({identity.untyped_storage()._cdata for identity in identities}) == 2


@pytest.mark.parametrize('mode', ['estimate', 'batch', 'evaluation'])
def test_exported_programs_have_the_gradients_of_their_model(backend, mode):
    torch._dynamo.reset()
    model = nn.Sequential(
        WSConv2d(8, 8, 3),
        norm(mode='batch' if mode == 'batch' else 'estimate'),
        nn.ReLU(),
        WSConv2d(8, 4, 1, formula='std_eps'),
    )
    model = model.double().train(mode != 'evaluation')
    # torch 2.6 does not tell that it exports when it is strict.
    strictnesses = (False,) if backend == 'eager' and not compat.HAS_IS_EXPORTING else (False, True)
    programs = []
    for strict, recording in itertools.product(strictnesses, (False, True)):
        with torch.set_grad_enabled(recording):
            exported = torch.export.export(copy.deepcopy(model), (X,), strict=strict)
        programs.append(exported.module())

    def gradients_of(one, transform):
        x = X.clone().requires_grad_()
        names, parameters = zip(*sorted(one.named_parameters()))
        buffers = {name: value.clone() for name, value in one.named_buffers()}

        def loss(parameters, x, buffers):
            own = dict(zip(names, parameters)) | buffers
            return torch.func.functional_call(one, own, (x,)).sin().sum()

        if transform:
            first = torch.func.grad(loss, argnums=(0, 1))(parameters, x, buffers)
            return [*first[0], first[1]]
        inputs = [*parameters, x]
        first = torch.autograd.grad(loss(parameters, x, buffers), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [*first, *second]

    for transform in (False, True):
        expected = gradients_of(model, transform)
        for program in programs:
            found = gradients_of(program, transform)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for one in (model, *programs):
        one(X).square().sum().backward()
    for program in programs:
        for name, parameter in program.named_parameters():
            expected = model.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)
        for name, buffer in program.named_buffers():
            same(buffer, model.get_buffer(name))


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('decomposed', [True, False])
def test_exported_programs_in_checkpoints(use_reentrant, decomposed):
    model = nn.Sequential(norm(), norm(mode='batch'))
    exported = torch.export.export(copy.deepcopy(model), (X,), strict=False)
    program = (exported.run_decompositions() if decomposed else exported).module()
    x = X.clone().requires_grad_()
    checkpoint(program, x, use_reentrant=use_reentrant).square().sum().backward()
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        same(program.get_parameter(name).grad, parameter.grad)
    for name, buffer in model.named_buffers():
        same(program.get_buffer(name), buffer)


@pytest.mark.parametrize('frozen', [True, False])
def test_tangents_of_exported_programs(backend, frozen):
    model = nn.Sequential(WSConv2d(8, 8, 3).double(), norm()).eval().requires_grad_(not frozen)
    program = torch.export.export(model, (X,), strict=False).module()
    found = []
    for one in (model, program):
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(X, X.cos())
            found.append(torch.autograd.forward_ad.unpack_dual(one(x)).tangent)
    same(*found)


def test_a_trace_keeps_the_dtype_of_its_weights():
    traced = torch.jit.trace(WSConv2d(8, 4, 3).eval(), X.float(), check_trace=False)
    with pytest.raises(RuntimeError, match='expected scalar type Double but found Float'):
        traced.double()(X)


@pytest.mark.parametrize('optimize', [True, False])
@torch.no_grad()
def test_traces_are_frozen(backend, optimize):
    """The standardized weights are constants then."""
    model = nn.Sequential(WSConv2d(8, 8, 3), norm(), WSConvTranspose2d(8, 4, 3)).double().eval()
    standardize_once_per_forward(model)
    frozen = torch.jit.freeze(torch.jit.trace(model, X, check_trace=False))
    assert not any('standardize' in node.kind() for node in frozen.graph.nodes())
    if optimize:
        frozen = torch.jit.optimize_for_inference(frozen)
    for shift in range(3):  # the first runs are watched by the interpreter, and rewritten
        same(frozen(X + shift), model(X + shift))


def by_graph(model, x, quantization_aware=False):
    model, engine = model.train(quantization_aware), torch.backends.quantized.engine
    if quantization_aware:
        mapping = get_default_qat_qconfig_mapping(engine)
        prepared = quantize_fx.prepare_qat_fx(model, mapping, (x,))
    else:
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(engine), (x,))
    prepared(x)
    return quantize_fx.convert_fx(prepared.eval())


@pytest.mark.skipif(torch.backends.quantized.engine == 'none', reason='no quantized operators here')
@pytest.mark.parametrize(
    'quantize',
    [
        by_graph,
        lambda model, x: by_graph(model, x, quantization_aware=True),
        lambda model, x: quantize_dynamic(model.eval(), {nn.Linear}),
    ],
    ids=['prepare_fx', 'prepare_qat_fx', 'quantize_dynamic'],
)
def test_quantization_goes_around_the_layers(quantize):
    """What is behind them is quantized as it is without them, for what they give it."""
    torch.manual_seed(0)
    front = nn.Sequential(WSConv2d(8, 8, 3), norm().float().eval())
    front.requires_grad_(False)[1].momentum = 0  # evaluation and training: the same statistics
    tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 4))
    x = X.float()
    model = copy.deepcopy(nn.Sequential(*front, *tail))
    quantized, expected = quantize(model, x), quantize(copy.deepcopy(tail), front(x))
    kinds = [type(quantized.get_submodule(str(i))) for i in (0, 1)]
    assert kinds == [WSConv2d, BatchChannelNorm2d]
    assert 'quantized' in type(quantized.get_submodule('5')).__module__
    assert torch.equal(quantized(x), expected(front(x)))


@pytest.mark.skipif(torch.backends.quantized.engine == 'none', reason='no quantized operators here')
@pytest.mark.parametrize(
    'layer, error, words',
    [(norm(), TypeError, 'floating-point'), (WSConv2d(8, 4, 3), RuntimeError, 'c10::quint8')],
)
def test_a_quantized_tensor_is_refused(layer, error, words):
    model = torch.ao.quantization.QuantWrapper(copy.deepcopy(layer).float().eval())
    model.qconfig = get_default_qconfig(torch.backends.quantized.engine)
    prepared = prepare(model)
    prepared(X.float())
    with pytest.raises(error, match=words):
        convert(prepared)(X.float())


@pytest.mark.parametrize('layer', [norm(), WSConv2d(3, 4, 3), WSConvTranspose2d(3, 4, 3)])
def test_scripting_is_refused(layer):
    with pytest.raises(RuntimeError, match='script cannot take a'):
        torch.jit.script(nn.Sequential(nn.ReLU(), layer))


def test_an_accumulated_step_and_two_losses():
    layer, expected = norm(), norm()
    for x in (X, X + 1):
        layer(x).pow(3).sum().backward()
    losses = [expected(x).pow(3).sum() for x in (X, X + 1)]
    for loss in reversed(losses):
        loss.backward()
    same([p.grad for p in layer.parameters()], [p.grad for p in expected.parameters()])
