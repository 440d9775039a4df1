"""What torch offers for several processes around a model, and the same training by each."""

import contextlib
from itertools import product

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.estimates import synchronize_estimates
from wsbcn_mm.layers.standardization import standardize_once_per_forward
from wsbcn_mm.recalibration import recalibrate

CHANNELS, STEPS = 8, 5


class Net(nn.Module):
    """Two blocks, the second norm used twice per step."""

    def __init__(self, mode='estimate', sync='step', dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = WSConv2d(3, CHANNELS, 3), WSConv2d(CHANNELS, CHANNELS, 3)
        make = lambda: BatchChannelNorm2d(CHANNELS, 2, momentum=0.1, mode=mode, sync=sync)  # noqa: E731
        self.norm1, self.norm2 = make(), make()
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.batch_weight)
            nn.init.normal_(norm.batch_bias)
            nn.init.normal_(norm.weight)
        self.to(dtype)

    def forward(self, x):
        x = self.conv2(self.norm1(self.conv1(x)).relu())
        return self.norm2(x) + self.norm2(0.5 * x - 3)


def images(step, dtype=torch.float64):
    g = torch.Generator().manual_seed(step)
    return (torch.randn(2, 3, 9, 8, generator=g) * (step + 1) + step).to(dtype)


def cotangent(step, dtype=torch.float64):
    g = torch.Generator().manual_seed(99 + step)
    return torch.randn(2, CHANNELS, 5, 4, generator=g).to(dtype)


def fully_sharded(net):
    """FSDP2, every layer for itself."""
    mesh = init_device_mesh('cpu', (2,))
    for child in net.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def data_parallel(**settings):
    return lambda net: nn.parallel.DistributedDataParallel(net, **settings)


def with_hook(net):
    model = nn.parallel.DistributedDataParallel(net)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    return model


def stepping_by_itself(net):
    """The optimizer runs in the backward pass, bucket by bucket."""
    model = nn.parallel.DistributedDataParallel(net)
    model._register_fused_optim(torch.optim.SGD, lr=0.01)
    return model


def flat(**settings):
    return lambda net: FullyShardedDataParallel(net, device_id=torch.device('cpu'), **settings)


WRAPPERS = {
    'DDP': data_parallel(),
    'DDP, buffers apart': data_parallel(broadcast_buffers=False),
    'DDP, static graph': data_parallel(static_graph=True),
    'DDP, unused': data_parallel(find_unused_parameters=True),
    'DDP, buckets': data_parallel(gradient_as_bucket_view=True),
    'DDP, hook': with_hook,
    'DDP, join': data_parallel(),
    'DDP, optimizer inside': stepping_by_itself,
    'averaged models': lambda net: net,
    'ZeRO': data_parallel(),
    'FSDP1': flat(),
    'FSDP1, own parameters': flat(use_orig_params=True),
    'FSDP1, units': flat(
        use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({WSConv2d, BatchChannelNorm2d})
    ),
    'FSDP2': fully_sharded,
}


def whole(model):
    """The state dict, with what is spread over ranks put together; copies."""
    with contextlib.ExitStack() as stack:
        if isinstance(model, FullyShardedDataParallel):
            kind = torch.distributed.fsdp.StateDictType.FULL_STATE_DICT
            config = FullStateDictConfig(rank0_only=False)
            stack.enter_context(FullyShardedDataParallel.state_dict_type(model, kind, config))
        state = model.state_dict()
    return {
        key.removeprefix('module.'): value.full_tensor().clone()
        if hasattr(value, 'full_tensor')
        else value.detach().clone()
        for key, value in state.items()
    }


def optimizer_of(name, net):
    if name == 'ZeRO':
        zero = torch.distributed.optim.ZeroRedundancyOptimizer
        return zero(net.parameters(), torch.optim.SGD, lr=0.01)
    return torch.optim.SGD(net.parameters(), 0.01)


def case_wrappers(rank):
    """The state dict after some steps, by name and with or without scopes."""
    results = {}
    for (name, wrap), scopes in product(WRAPPERS.items(), (False, True)):
        net = Net()
        model = wrap(net)
        if scopes:
            standardize_once_per_forward(net)
        optimizer = optimizer_of(name, net)
        with model.join() if name == 'DDP, join' else contextlib.nullcontext():
            for step in range(STEPS):
                part = slice(rank, rank + 1)
                optimizer.zero_grad()
                loss = (model(images(step)[part]) * cotangent(step)[part]).sum()
                (2 * loss).backward()  # they take the mean over the ranks, `train` the sum
                if name != 'DDP, optimizer inside':
                    optimizer.step()
                if name == 'averaged models':
                    PeriodicModelAverager(1, warmup_steps=0).average_parameters(net.parameters())
                synchronize_estimates(net)
        results[name, scopes] = whole(model)
    return results


def case_recalibrated(rank):
    """A model whose parameters are spread over the ranks, each with two images."""
    net = fully_sharded(Net())
    mine = [images(step)[rank : rank + 1] for step in range(2)]
    done = recalibrate(net, mine, passes=3, tolerance=0)
    try:
        refused = recalibrate(net, mine, keep_function=True)
    except RuntimeError as error:
        refused = str(error)
    return done.samples, whole(net), refused


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(WSConv2d(3, 4, 3, bias=False).double() for _ in 'ab')

    def forward(self, x):
        return [head(x).square().mean() for head in self.heads]


def case_two_losses(rank):
    """One pass in a scope, two losses: gradients with one wrapper around all and one per part."""
    results = {}
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    for parts in (False, True):
        net = TwoHeads()
        weights = [head.weight for head in net.heads]
        if parts:
            net.heads = nn.ModuleList(map(nn.parallel.DistributedDataParallel, net.heads))
        standardize_once_per_forward(net)
        model = net if parts else nn.parallel.DistributedDataParallel(net)
        for loss in model(x[rank][None]):
            loss.backward()
        results[parts] = [weight.grad for weight in weights]
    return results
