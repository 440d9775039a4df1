"""Folding for inference: what is constant in evaluation is computed once.

In evaluation the standardized weight of a WS convolution is a constant, and BCN's batch stage is an
affine map per channel with constants. Behind a convolution both go into its weight and bias:

    BCN(conv(x, w)) = GN(a (conv(x, w) + bias - mu) + b) = GN(conv(x, a w) + a (bias - mu) + b)

with ``a = batch_weight / sqrt(running_var + eps)`` and ``b = batch_bias``. What remains is a plain
torch convolution and a plain `nn.GroupNorm`, whose scale and shift per group are written out per
channel. The map acts on the convolution's output, so its padding does not matter; in front of a
convolution (pre-activation order) it would, and nothing is folded there.

Which norm follows which convolution is not guessed from names: the model runs once, and every
operation that reads a convolution's output is watched. A pair is folded when every output of the
convolution goes to that norm and nowhere else, and every input of the norm comes from there.
"""

from wsbcn_mm.folding.evidence import Run
from wsbcn_mm.folding.plan import Fold, Plan, fold, plan

__all__ = ['Fold', 'Plan', 'Run', 'fold', 'plan']
