"""One order of arguments, from the layer to the kernel: signatures and schemas."""

import inspect

import pytest
import torch

from wsbcn_mm import functional
from wsbcn_mm.backends import (
    autograd,
    cpu,
    dispatched,
    eager,
    ops,
    running,
    schemas,
    synchronised,
)

ORDER = ('x', 'num_groups', 'running', 'affine', 'rate', 'eps')
FUNCTIONS = [
    function
    for module in (autograd, synchronised, running, dispatched, eager, ops.Kernels)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and not name.startswith('_')
    if function.__module__.startswith('wsbcn_mm.backends')
]


def schema_names(operator):
    return [a.name for a in getattr(torch.ops.wsbcn_mm, operator).default._schema.arguments]


@pytest.mark.parametrize('function', FUNCTIONS, ids=lambda f: f'{f.__module__}.{f.__qualname__}')
def test_arguments_come_in_one_order(function):
    names = [name for name in inspect.signature(function).parameters if name in ORDER]
    assert names == [name for name in ORDER if name in names]


@pytest.mark.parametrize('name', ops.OPERATORS)
def test_backends_and_schema_say_the_same(name):
    wanted = inspect.signature(getattr(ops.Kernels, name), eval_str=True)
    arguments = list(wanted.parameters.values())[1:]  # without self
    for module in (dispatched, eager):
        actual = inspect.signature(getattr(module, name), eval_str=True)
        assert list(actual.parameters.values()) == [
            a.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for a in arguments
        ]
        assert actual.return_annotation == wanted.return_annotation
    assert ops.flat_names(getattr(ops.Kernels, name)) == schema_names(name)


@pytest.mark.parametrize(
    'function, operator',
    [
        (running.update_estimates, 'update_estimates'),
        (autograd.normalize_twice, 'normalize_twice'),
        (autograd.standardize_twice, 'standardize_twice'),
        (autograd.weight_standardize, 'weight_standardize'),
    ],
)
def test_other_operators_have_the_names_of_their_functions(function, operator):
    assert ops.flat_names(function) == schema_names(operator)


@pytest.mark.parametrize('name', schemas.DIFFERENTIATED)
def test_what_a_compiler_writes_down_has_derivatives(name):
    """C++ and Python name the same operators."""
    there = torch._C._dispatch_has_kernel_for_dispatch_key
    for key in ('Autograd', ops.TRANSFORMED):
        assert there(f'wsbcn_mm::{name}', key)
    if cpu.unavailable() is None:
        twin = f'wsbcn_mm::{name}_differentiated'
        assert there(twin, 'CompositeImplicitAutograd')
        assert schema_names(f'{name}_differentiated') == schema_names(name)


def test_the_whole_operation_too():
    inner = ops.flat_names(autograd.batch_channel_norm)
    assert schema_names('batch_channel_norm') == [*inner[:-1], 'from_batch'] and inner[-1] == 'mode'
    # Users say momentum, and training and mode where we say rate.
    names = dict(input='x', momentum='rate')
    public = [names.get(n, n) for n in inspect.signature(functional.batch_channel_norm).parameters]
    both = {n for n in public if n in inner} - {'mode'}
    assert [n for n in public if n in both] == [n for n in inner if n in both] and len(both) == 10
    assert public[-2:] == ['rate', 'eps']


def test_carriers_are_put_together_and_taken_apart():
    def function(x: int, rate: ops.Rate, running: ops.Running, eps: float):
        return x, (rate, running), eps

    tensor = torch.zeros(())
    function = ops.flattened(function)
    assert function(1, 0.5, None, 2, 3, 4, 5, 1e-5) == (1, 0.5, ops.Running(2, 3, 4, 5), 1e-5)
    assert function(1, None, tensor, 2, 3, None, None, 1e-5)[1] is tensor
    assert function(1, None, None, 2, 3, None, None, 1e-5)[1] is None
