"""Several processes: two ranks with one image each are one process with both.

All cases run in one pair of gloo processes; the tests read what they found.
"""

from itertools import product

import pytest
import torch
from torch import nn

from tests.ranks import in_two_ranks
from tests.wrappers import (
    CHANNELS,
    STEPS,
    WRAPPERS,
    Net,
    TwoHeads,
    case_recalibrated,
    case_two_losses,
    case_wrappers,
    cotangent,
    images,
)
from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    reference,
)
from wsbcn_mm.estimates import skipped_updates, synchronize_estimates
from wsbcn_mm.recalibration import recalibrate


def train(net, mine, world, dtype=torch.float64, after=lambda net: None):
    """Steps of plain SGD over this rank's images; gradients summed over ranks as DDP would."""
    optimizer, outputs = torch.optim.SGD(net.parameters(), 0.01), []
    for step in range(STEPS):
        x = images(step, dtype)[mine].requires_grad_()
        y = net(x)
        optimizer.zero_grad()
        (y * cotangent(step, dtype)[mine]).sum().backward()
        if world > 1:
            for p in net.parameters():
                torch.distributed.all_reduce(p.grad)
        optimizer.step()
        after(net)
        outputs.append((y.detach(), x.grad))
    return dict(
        outputs=torch.cat([y for y, _ in outputs]),
        grad_x=torch.cat([g for _, g in outputs]),
        state={name: value.detach() for name, value in net.state_dict().items()},
    )


def norm_alone(mode='estimate', sync='step'):
    return BatchChannelNorm1d(4, 2, momentum=0.3, mode=mode, sync=sync).double()


def share(rank, name):
    """What a rank holds of (N, 4, L) inputs, by case."""
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(7)).double() * 3 + 2
    cut = dict(uneven=(2, 6), empty=(0, 6), nothing=(0, 0))[name]
    return x[: cut[0]] if rank == 0 else x[cut[0] : cut[1]]


def case_nets(rank):
    results = {}
    for dtype in (torch.float64, torch.float32):
        for mode in ('estimate', 'batch'):
            net = Net(mode, 'forward', dtype)
            results[f'forward/{mode}/{dtype}'] = train(net, slice(rank, rank + 1), 2, dtype)
        net = Net('estimate', 'step', dtype)
        results[f'step/{dtype}'] = train(
            net, slice(rank, rank + 1), 2, dtype, after=synchronize_estimates
        )
    net = Net('estimate', None)
    results['none'] = train(net, slice(rank, rank + 1), 2)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(Net('batch', 'step'))
    results['converted'] = train(converted, slice(rank, rank + 1), 2)
    return results


def case_norms(rank):
    results = {}
    for name in ('uneven', 'empty', 'nothing'):
        for sync in ('step', 'forward'):
            for mode in ('estimate', 'batch'):
                norm = norm_alone(mode, sync)
                x = share(rank, name).requires_grad_()
                y = norm(x)
                (y * torch.arange(1.0, 6)).sum().backward()
                if sync == 'step':
                    synchronize_estimates(norm)
                results[f'{name}/{sync}/{mode}'] = dict(
                    y=y.detach(),
                    grad_x=x.grad,
                    counts=norm.counts.clone(),
                    mean=norm.bn.running_mean,
                    var=norm.bn.running_var,
                    grads=[p.grad for p in norm.parameters()],
                )
    return results


def case_damaged(rank):
    """Rank 1 gets an overflow in one channel."""
    results = {}
    for sync in ('step', 'forward'):
        norm = norm_alone(sync=sync)
        x = share(rank, 'uneven')
        if rank == 1:
            x[0, 2, 0] = torch.inf
        norm(x)
        synchronize_estimates(norm)
        results[sync] = dict(
            mean=norm.bn.running_mean, var=norm.bn.running_var, skipped=skipped_updates(norm)
        )
    return results


def case_calls(rank):
    """Which collectives run, and how many bytes they carry."""
    calls = []
    for name in ('all_reduce', 'all_gather'):
        original = getattr(torch.distributed, name)

        def counted(*args, _original=original, _name=name, **kwargs):
            first = args[0]
            size = first.numel() if _name == 'all_reduce' else sum(p.numel() for p in first)
            calls.append((_name, size))
            return _original(*args, **kwargs)

        setattr(torch.distributed, name, counted)
    results = {}
    x = images(0, torch.float32)[rank : rank + 1]
    for name, net in {
        'step': Net(sync='step', dtype=torch.float32),
        'forward': Net(sync='forward', dtype=torch.float32),
        'batch': Net('batch', 'forward', torch.float32),
        'none': Net(sync=None, dtype=torch.float32),
        'frozen': Net(sync='step', dtype=torch.float32).eval(),
    }.items():
        calls.clear()
        y = net(x)
        forward = list(calls)
        calls.clear()
        y.square().sum().backward()
        backward = list(calls)
        calls.clear()
        size = synchronize_estimates(net)
        results[name] = dict(forward=forward, backward=backward, after=list(calls), bytes=size)
    return results


def case_checkpointing(rank):
    """Activation checkpointing runs the forward pass twice: one update, the same gradients."""
    results = {}
    for mode in ('estimate', 'batch'):
        for kind in (None, False, True):
            net = Net(mode, 'forward')
            x = images(1)[rank : rank + 1].requires_grad_()
            run = torch.utils.checkpoint.checkpoint
            y = net(x) if kind is None else run(net, x, use_reentrant=kind)
            (y * cotangent(1)[rank : rank + 1]).sum().backward()
            results[f'{mode}/{kind}'] = dict(
                grads=[x.grad, *(p.grad for p in net.parameters())], state=net.state_dict()
            )
    return results


def case_average(rank):
    """Five steps of the average over all samples, with means of the ranks that lie far apart."""
    results = {}
    for sync, uneven in product(('step', 'forward'), (None, 0, 1)):
        norm = BatchChannelNorm1d(4, 2, momentum='cumulative', sync=sync).double()
        for step in range(STEPS):
            x = far_apart(step)[rank : rank + 1]
            if rank == uneven and step < 2:  # no image, or an overflow, of one rank alone
                x = x[:0] if step == 0 or sync == 'forward' else x / 0
            for buffer in norm.buffers():  # as DistributedDataParallel does
                torch.distributed.broadcast(buffer, 0)
            norm(x)
            synchronize_estimates(norm)
        results[sync, uneven] = norm.bn.running_mean, norm.bn.running_var
    return results


def far_apart(step):
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(step)).double()
    return x + 10 * step + torch.tensor([0.0, 20.0]).view(2, 1, 1)


def case_data_parallel(rank):
    """DistributedDataParallel; an overflow on rank 1 alone, in the second of three steps."""
    results = {}
    for broadcast in (True, False):
        norm = norm_alone()
        model = nn.parallel.DistributedDataParallel(norm, broadcast_buffers=broadcast)
        for step in range(3):
            x = share(rank, 'uneven')
            if rank == 1 and step == 1:
                x[0, 2, 0] = torch.inf
            model(x)[:, 0].sum().backward()
            synchronize_estimates(norm)
        results[broadcast] = skipped_updates(norm), norm.bn.running_mean
    return results


def case_hooks(rank):
    """What the forward hooks of the child of a norm get."""
    results = {}
    for mode, sync in product(('estimate', 'batch'), ('step', 'forward')):
        norm, seen = norm_alone(mode, sync), []
        norm.bn.register_forward_hook(lambda bn, args, y, seen=seen: seen.append(y))
        try:
            norm(share(rank, 'uneven'))
        except RuntimeError as error:
            seen.append(str(error))
        results[mode, sync] = seen
    return results


def case_compiled(rank):
    def outputs(mode):
        nets = Net(mode, 'forward'), torch.compile(Net(mode, 'forward'), backend='eager')
        return [train(net, slice(rank, rank + 1), 2)['outputs'] for net in nets]

    return {mode: outputs(mode) for mode in ('estimate', 'batch')}


def case_groups(rank):
    """Each rank alone in a group, both in another, and no group said."""
    alone = [torch.distributed.new_group([other]) for other in (0, 1)][rank]
    groups = dict(alone=alone, both=torch.distributed.new_group([0, 1]), default=None)
    results = {}
    for name, group in groups.items():
        norm = norm_alone()
        norm(share(rank, 'uneven'))
        own = norm.bn.running_mean.clone(), norm.bn.running_var.clone()
        size = synchronize_estimates(norm, group)
        state = norm.bn.running_mean, norm.bn.running_var
        results[name] = dict(own=own, state=state, bytes=size)
    return results


CASES = (
    case_two_losses,
    case_groups,
    case_compiled,
    case_wrappers,
    case_recalibrated,
    case_hooks,
    case_nets,
    case_norms,
    case_damaged,
    case_checkpointing,
    case_average,
    case_data_parallel,
    case_calls,
)


def all_cases(rank):
    torch.distributed.init_process_group('gloo')
    return {case.__name__: case(rank) for case in CASES}


@pytest.fixture(scope='module')
def ranks():
    """What each of the two ranks found, by case."""
    return in_two_ranks(all_cases)


def interleaved(a, b):
    return torch.stack([a, b], 1).flatten(0, 1)


def assert_same(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_forward_two_ranks_are_one_process(ranks, mode, dtype, tolerance):
    """Outputs, gradients, parameters after five steps, and running statistics."""
    first, second = (rank['case_nets'][f'forward/{mode}/{dtype}'] for rank in ranks)
    expected = train(Net(mode, 'forward', dtype), slice(None), 1, dtype)
    assert_same(interleaved(first['outputs'], second['outputs']), expected['outputs'], tolerance)
    scale = expected['grad_x'].abs().max()
    found = interleaved(first['grad_x'], second['grad_x'])
    assert_same(found / scale, expected['grad_x'] / scale, tolerance)
    assert_same(first['state'], expected['state'], tolerance)
    assert_same(first['state'], second['state'], 0)


def test_a_bn_converted_to_sync_batch_norm_is_the_same_as_forward(ranks):
    """OpenMMLab's ``cfg.sync_bn``; also on the CPU, where torch's SyncBatchNorm cannot run."""
    first, second = (rank['case_nets']['converted'] for rank in ranks)
    expected = train(Net('batch'), slice(None), 1)
    assert_same(interleaved(first['outputs'], second['outputs']), expected['outputs'], 1e-12)
    assert_same(first['state'], expected['state'], 1e-12)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_step_makes_the_estimates_the_same_bits(ranks, dtype):
    first, second = (rank['case_nets'][f'step/{dtype}']['state'] for rank in ranks)
    assert_same(first, second, 0)
    first, second = (rank['case_nets']['none']['state'] for rank in ranks)
    assert not torch.equal(first['norm1.bn.running_mean'], second['norm1.bn.running_mean'])


def test_estimates_are_the_same_in_a_group_of_ranks(ranks):
    first, second = (rank['case_groups'] for rank in ranks)
    for found in (first, second):
        assert_same(found['alone']['state'], found['alone']['own'], 0)
        assert found['alone']['bytes'] == 0 < found['both']['bytes']
        assert_same(found['both'], found['default'], 0)
    assert_same(first['both']['state'], second['both']['state'], 0)
    assert not torch.equal(first['alone']['state'][0], second['alone']['state'][0])


def test_the_mean_of_the_ranks_updates_is_the_update_with_the_global_batch(ranks):
    """Algebra: the second moment is taken around the common old mean, so that it is linear."""
    x = share(0, 'uneven'), share(1, 'uneven')
    zero, one = torch.zeros(4).double(), torch.ones(4).double()
    expected = reference.update_estimates(torch.cat(x), zero, one, 0.3)
    updates = [reference.update_estimates(part, zero, one, 0.3) for part in x]
    for i in (0, 1):
        weighted = (2 * updates[0][i] + 4 * updates[1][i]) / 6
        assert_same(weighted, expected[i], 1e-14)
    for rank in ranks:
        found = rank['case_norms']['uneven/step/estimate']
        assert_same((found['mean'], found['var']), expected, 1e-14)


@pytest.mark.parametrize('sync', ['step', 'forward'])
@pytest.mark.parametrize('name', ['uneven', 'empty'])
def test_unequal_and_empty_shares_of_the_estimate_mode(ranks, name, sync):
    norm = norm_alone()
    x = torch.cat([share(0, name), share(1, name)]).requires_grad_()
    y = norm(x)
    (y * torch.arange(1.0, 6)).sum().backward()
    found = [rank['case_norms'][f'{name}/{sync}/estimate'] for rank in ranks]
    for one in found:
        assert_same(one['mean'], norm.bn.running_mean, 1e-14)
        assert_same(one['var'], norm.bn.running_var, 1e-14)
        assert not one['counts'][1].any()
    if sync == 'forward':
        assert_same(torch.cat([one['y'] for one in found]), y.detach(), 1e-12)
        assert_same(torch.cat([one['grad_x'] for one in found]), x.grad, 1e-12)
        for i, p in enumerate(norm.parameters()):
            assert_same(sum(one['grads'][i] for one in found), p.grad, 1e-12)


@pytest.mark.parametrize('name', ['uneven', 'empty'])
def test_unequal_and_empty_shares_of_the_batch_mode(ranks, name):
    norm = norm_alone('batch')
    x = torch.cat([share(0, name), share(1, name)]).requires_grad_()
    y = norm(x)
    (y * torch.arange(1.0, 6)).sum().backward()
    found = [rank['case_norms'][f'{name}/forward/batch'] for rank in ranks]
    assert_same(torch.cat([one['y'] for one in found]), y.detach(), 1e-12)
    assert_same(torch.cat([one['grad_x'] for one in found]), x.grad, 1e-12)
    for i, p in enumerate(norm.parameters()):
        assert_same(sum(one['grads'][i] for one in found), p.grad, 1e-12)
    for one in found:
        assert_same(one['mean'], norm.bn.running_mean, 1e-14)
        assert_same(one['var'], norm.bn.running_var, 1e-14)


@pytest.mark.parametrize('sync', ['step', 'forward'])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_no_sample_on_any_rank_changes_nothing(ranks, mode, sync):
    for rank in ranks:
        found = rank['case_norms'][f'nothing/{sync}/{mode}']
        assert (found['mean'] == 0).all()
        assert (found['var'] == 1).all()
        assert found['y'].shape == (0, 4, 5)


def test_an_overflow_on_one_rank_poisons_none(ranks):
    """``'step'``: the other rank's update counts alone in that channel."""
    zero, one = torch.zeros(4).double(), torch.ones(4).double()
    both = torch.cat([share(0, 'uneven'), share(1, 'uneven')])
    expected = reference.update_estimates(both, zero, one, 0.3)
    alone = reference.update_estimates(share(0, 'uneven'), zero, one, 0.3)
    others = [0, 1, 3]
    for rank, result in enumerate(ranks):
        for sync, kept in (('step', alone), ('forward', (zero, one))):
            found = result['case_damaged'][sync]
            for i, name in enumerate(('mean', 'var')):
                assert_same(found[name][others], expected[i][others], 1e-14)
                assert_same(found[name][2], kept[i][2], 1e-14)
            assert found['skipped'] == ({'': 1} if rank == 1 or sync == 'forward' else {})


@pytest.mark.parametrize('sync', ['step', 'forward'])
@pytest.mark.parametrize('uneven', [None, 0, 1])
def test_an_average_over_ranks_is_that_of_all_samples(ranks, sync, uneven):
    """Every step with the same weight, also those in which a rank took nothing in."""
    steps = [far_apart(step) for step in range(STEPS)]
    if uneven is not None:  # the samples of the other rank alone, twice
        steps[:2] = [x[[1 - uneven]].repeat(2, 1, 1) for x in steps[:2]]
    x = torch.cat(steps)
    expected = x.mean((0, 2)), x.var((0, 2), correction=0)
    for rank in ranks:
        assert_same(rank['case_average'][sync, uneven], expected, 1e-12)


@pytest.mark.parametrize('broadcast', [True, False])
def test_data_parallel_keeps_the_counts_of_each_rank(ranks, broadcast):
    """Not a buffer: DDP would overwrite rank 1's with rank 0's."""
    (first, mean), (second, other) = (rank['case_data_parallel'][broadcast] for rank in ranks)
    assert first == {}
    assert second == {'': 1}
    assert_same(mean, other, 0)


@pytest.mark.parametrize('name', WRAPPERS)
@pytest.mark.parametrize('scopes', [False, True])
def test_wrappers_train_as_a_loop_that_sums_gradients(ranks, name, scopes):
    for rank in ranks:
        expected = rank['case_nets']['step/torch.float64']['state']
        assert_same(rank['case_wrappers'][name, scopes], expected, 1e-12)


def test_losses_of_one_pass_are_reduced_one_by_one(ranks):
    net = TwoHeads()
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    sum(net(x)).backward()
    for rank in ranks:
        for found in rank['case_two_losses'].values():
            assert_same(found, [head.weight.grad for head in net.heads], 1e-12)


def test_hooks_of_the_child_are_refused_in_a_batch_over_ranks(ranks):
    for rank in ranks:
        for case, (seen,) in rank['case_hooks'].items():
            refused = isinstance(seen, str) and 'the batch lies on several processes' in seen
            assert refused == (case == ('batch', 'forward'))


def test_a_sharded_model_is_recalibrated(ranks):
    """By the statistics of all samples; what spreads over ranks is not taken for a scale."""
    net = Net()
    batches = [x[None] for step in range(2) for x in images(step)]
    done = recalibrate(net, batches, passes=3, tolerance=0)
    for rank in ranks:
        samples, state, refused = rank['case_recalibrated']
        assert samples == done.samples
        assert_same(state, net.state_dict(), 1e-9)
        assert 'DTensor' in refused


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_compiled_code_over_ranks(ranks, mode):
    for rank in ranks:
        assert_same(*rank['case_compiled'][mode], 1e-12)


def test_collectives(ranks):
    """``'step'``: one for the model; ``'forward'``: one per use of a layer, none in backward."""
    found = ranks[0]['case_calls']
    assert found['step'] == dict(
        forward=[],
        backward=[],
        after=[('all_reduce', 2 * 3 * CHANNELS)],
        bytes=2 * 3 * CHANNELS * 4,
    )
    one = ('all_reduce', 2 * CHANNELS + 1)
    assert found['forward'] == dict(forward=[one] * 3, backward=[], after=[], bytes=0)
    gather, back = ('all_gather', 2 * (2 * CHANNELS + 1)), ('all_reduce', 2 * CHANNELS)
    assert found['batch'] == dict(forward=[gather] * 3, backward=[back] * 3, after=[], bytes=0)
    for name in ('none', 'frozen'):
        assert found[name] == dict(forward=[], backward=[], after=[], bytes=0)


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('kind', [False, True])
def test_activation_checkpointing_over_ranks(ranks, mode, kind):
    for rank in ranks:
        found = rank['case_checkpointing']
        assert_same(found[f'{mode}/{kind}']['state'], found[f'{mode}/None']['state'], 0)
        assert_same(found[f'{mode}/{kind}']['grads'], found[f'{mode}/None']['grads'], 1e-12)


@pytest.mark.parametrize('sync', [None, 'step', 'forward'])
def test_without_a_process_group_nothing_is_shared(sync):
    a, b = Net(sync=sync), Net(sync=None)
    assert_same(a(images(0)), b(images(0)), 0)
    assert synchronize_estimates(a) == 0
    assert_same(a.state_dict(), b.state_dict(), 0)
    assert not (a.norm1.counts[0].any() and sync == 'step')  # counted anew from here


def test_a_wrong_sync_is_named():
    with pytest.raises(ValueError, match="sync must be one of None, 'step', 'forward'"):
        BatchChannelNorm2d(8, 2, sync='always')
