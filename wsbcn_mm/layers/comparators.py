"""What Weight Standardization is compared with in studies: other weights, other norms.

Not for products: these are the ablations of the WS paper (arXiv 1903.10520) and the methods it
names. `tools/study` uses them; the names for configs are in `wsbcn_mm.openmmlab.registry`.

Every convolution here derives from `WeightStandardized` and replaces what is done to the weight, so
that fusing, plain copies and scopes of a forward pass work as they do for WS. Instance
normalisation needs nothing of ours: ``dict(type='IN', affine=True)`` in mmcv.
"""

from typing import Any

import torch
from torch import Tensor, nn

from wsbcn_mm.layers import WeightStandardized


class WeightStandardizationAblation(WeightStandardized):
    """What the convolutions of this module share; a mixin in front of nn.Conv2d."""

    formula: str | None  # type: ignore[assignment]

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, eps=eps, **kwargs)
        self.__dict__['formula'] = None  # none of those of WS, which alone can be set

    def standardize(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """What the class does to a weight, in place of WS."""
        # float16 and bfloat16 are computed in float32, as WS is.
        rows = weight.flatten(1)
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        return self.transform(rows, self.eps).view_as(weight).to(dtype)

    def transform(self, rows: Tensor, eps: float) -> Tensor:
        """What replaces WS.

        Args:
            rows: The weight as (O, fan-in).
            eps: Added in the denominator, where there is one.

        Returns:
            The weight that convolves, in the same shape.
        """
        raise NotImplementedError


class WSMeanOnlyConv2d(WeightStandardizationAblation, nn.Conv2d):
    """Conv2d whose filters have their mean taken away: the first half of WS.

    ``w_hat = w - mean(w)`` over the fan-in of each output channel (ablation in arXiv 1903.10520).

    Args:
        *args, **kwargs: Those of `torch.nn.Conv2d`.
        eps: Not used; accepted so that all ablations share a signature.
    """

    def transform(self, rows: Tensor, eps: float) -> Tensor:
        """``rows - mean``; see the class."""
        return rows - rows.mean(1, keepdim=True)


class WSStdOnlyConv2d(WeightStandardizationAblation, nn.Conv2d):
    """Conv2d whose filters are divided by their deviation, the mean kept: the other half of WS.

    ``w_hat = w / sqrt(var(w) + eps)``, biased variance around the mean (ablation in arXiv
    1903.10520).

    Args:
        *args, **kwargs: Those of `torch.nn.Conv2d`.
        eps: Added to the variance, >= 0.
    """

    def transform(self, rows: Tensor, eps: float) -> Tensor:
        """``rows / sqrt(var + eps)``; see the class."""
        return rows / (rows.var(1, unbiased=False, keepdim=True) + eps).sqrt()


class _WithGain(WeightStandardizationAblation):
    """Adds a learnable gain per output channel, initially 1."""

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, eps=eps, **kwargs)
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, 0, 0, 0]))

    def standardized_weight(self) -> Tensor:
        """The normalised weight times the gain; scopes know the weight only."""
        weight = super().standardized_weight()
        return weight * self.gain.to(weight.dtype).view(-1, 1, 1, 1)


class WeightNormConv2d(_WithGain, nn.Conv2d):
    """Conv2d with Weight Normalization (Salimans and Kingma, arXiv 1602.07868).

    ``w_hat = gain w / sqrt(sum(w²) + eps)``, one gain per output channel. The gain starts at 1, not
    at the norm of the weight (hosts initialise weights after construction); a norm follows anyway.

    Args:
        *args, **kwargs: Those of `torch.nn.Conv2d`.
        eps: Added in the root, >= 0.
    """

    def transform(self, rows: Tensor, eps: float) -> Tensor:
        """``rows / norm``; see the class."""
        return rows / (rows.square().sum(1, keepdim=True) + eps).sqrt()


class CenteredWeightNormConv2d(_WithGain, nn.Conv2d):
    """Conv2d with Centered Weight Normalization (Huang et al., ICCV 2017).

    ``w_hat = gain (w - mean) / sqrt(sum((w - mean)²) + eps)``: zero mean, unit norm, one learnable
    gain per output channel, initially 1. WS differs by a factor sqrt(fan-in) and has no gain.

    Args:
        *args, **kwargs: Those of `torch.nn.Conv2d`.
        eps: Added in the root, >= 0.
    """

    def transform(self, rows: Tensor, eps: float) -> Tensor:
        """``(rows - mean) / norm``; see the class."""
        rows = rows - rows.mean(1, keepdim=True)
        return rows / (rows.square().sum(1, keepdim=True) + eps).sqrt()


class SampleLayerNorm(nn.GroupNorm):
    """Layer Normalization of convolutional networks: over all channels and positions of a sample.

    GroupNorm with one group; scale and shift per channel. (mmcv's ``LN`` normalises the last axis.)

    Args:
        num_channels: C.
        eps: Added to the variance.
        affine: With scale and shift (C,).
    """

    _abbr_ = 'ln'

    def __init__(self, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(1, num_channels, eps, affine)
