"""The obvious ways to write the layers, each of which a host trap breaks; see test_traps.py."""

import torch
import torch.nn.functional as F
from torch import nn


class WrapperBCN(nn.Module):
    """A module that holds two affine norms: neither a BatchNorm nor a GroupNorm for the host."""

    _abbr_ = 'wrapper'

    def __init__(self, num_features, num_groups=2, eps=1e-5):
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features, eps)
        self.gn = nn.GroupNorm(num_groups, num_features, eps)

    def forward(self, x):
        return self.gn(self.bn(x))


class SubclassBCN(nn.BatchNorm2d):
    """A BatchNorm with a second stage behind it: the host takes it for a BatchNorm."""

    def __init__(self, num_features, num_groups=2, eps=1e-5):
        super().__init__(num_features, eps)
        self.num_groups = num_groups

    def forward(self, x):
        return F.group_norm(super().forward(x), self.num_groups, eps=self.eps)


class BatchEstimateNorm(nn.Module):
    """Home-made estimates in plain buffers, in the manner of the authors' release; no `_abbr_`."""

    def __init__(self, num_features, num_groups=2, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean += 0.1 * (x.mean((0, 2, 3)) - self.running_mean)
                self.running_var += 0.1 * (x.var((0, 2, 3), correction=0) - self.running_var)
        channel = (1, -1, 1, 1)
        std = (self.running_var + self.eps).sqrt()
        x = (x - self.running_mean.view(channel)) / std.view(channel)
        shape = x.shape
        x = x.view(1, shape[0] * self.num_groups, -1)
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        x = ((x - mean) / (var + self.eps).sqrt()).view(shape)
        return x * self.weight.view(channel) + self.bias.view(channel)
