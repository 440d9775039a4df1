"""A small network of our layers, and how it is trained: over the launcher and over plain torch."""

import torch
from torch import nn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d


class Network(nn.Module):
    """Convolutions of which one is used twice."""

    def __init__(self, mode: str = 'estimate') -> None:
        super().__init__()
        self.first, self.shared = WSConv2d(3, 8, 3), WSConv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([BatchChannelNorm2d(8, 4, mode=mode) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip((self.first, self.shared, self.shared), self.norms):
            x = norm(layer(x)).relu_()
        return x


def train(model, steps):
    """A step for each input; then what the model makes of the first in evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x in steps:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model(steps[0])
