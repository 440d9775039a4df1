"""Why a network trains well or badly, as plain numbers: singularities, estimates, smoothness.

Three observers attach to a model, watch the forward and backward passes that run anyway, and change
nothing::

    with ActivationObserver(model) as activations, EstimateObserver(model) as estimates:
        for batch in data:
            model(batch)
    print(singularities(activations), estimate_gaps(estimates))

`smoothness` asks for the loss at other points, and puts everything back.

- **Elimination singularities** (arXiv 1911.09738): a channel that its ReLU switches off for every
  input is out of the network for good. BatchNorm keeps channels away from that by construction;
  GroupNorm does not; WS and BCN should. `ActivationObserver` watches the input of every ReLU.
- **Gap of the estimates**: running statistics stand for those of the data when the model is used.
  `EstimateObserver` compares the two, layer by layer.
- **Smoothness** (Santurkar et al., arXiv 1805.11604): how the loss and its gradient change along
  the step that is taken. `WeightGradientObserver` holds the gradient of each raw weight against the
  bound that WS gives.

The papers give no formula for the distance to singularities; ours are `stat_spread` and
`singularity_distance` of `ActivationStatistics`, named and defined there.
"""

from wsbcn_mm.diagnostics.activations import (
    RELUS,
    ActivationObserver,
    ActivationStatistics,
    singularities,
)
from wsbcn_mm.diagnostics.estimates import (
    DRIFT_MEAN,
    DRIFT_STD,
    EstimateObserver,
    EstimateStatistics,
    estimate_gaps,
)
from wsbcn_mm.diagnostics.gradients import (
    Smoothness,
    WeightGradient,
    WeightGradientObserver,
    smoothness,
)

__all__ = [
    'DRIFT_MEAN',
    'DRIFT_STD',
    'RELUS',
    'ActivationObserver',
    'ActivationStatistics',
    'EstimateObserver',
    'EstimateStatistics',
    'Smoothness',
    'WeightGradient',
    'WeightGradientObserver',
    'estimate_gaps',
    'singularities',
    'smoothness',
]
