"""The fixtures do what they say: memory that torch hands out uninitialised is NaN, in C++ too."""

import pytest
import torch

from wsbcn_mm import backends, batch_channel_norm, weight_standardize


def test_memory_is_poisoned(poisoned_memory):
    x = torch.zeros(2, 3)
    for fresh in (
        torch.empty(5),
        torch.empty_like(x),
        x.new_empty(4),
        torch.empty_strided((2,), (3,)),
    ):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def allocated_and_filled(run) -> tuple[int, int]:
    """How many tensors torch allocated without values while `run` ran, and how many it filled."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = [event.name for event in profile.events()]
    made = {'aten::empty', 'aten::empty_strided'}
    return sum(n in made for n in names), names.count('aten::fill_')


@pytest.mark.parametrize('function', ['batch_channel_norm', 'weight_standardize'])
def test_what_the_compiled_kernels_allocate_is_poisoned(function, request):
    if backends.BACKENDS['cpu'].unavailable():
        pytest.skip('no compiled kernels')
    x, mean, var, weight = torch.randn(2, 4, 5, 5), torch.zeros(4), torch.ones(4), torch.randn(4, 9)

    def run() -> None:
        with backends.use_backend('cpu'), torch.no_grad():
            if function == 'batch_channel_norm':
                batch_channel_norm(x, 2, mean, var, training=True)
            else:
                weight_standardize(weight)

    made, filled = allocated_and_filled(run)
    assert made > 0 and filled == 0
    request.getfixturevalue('poisoned_memory')
    made, filled = allocated_and_filled(run)
    assert made > 0 and filled == made
