"""Logs the measures of `wsbcn_mm.diagnostics` while a Runner trains."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from wsbcn_mm.diagnostics import (
    ActivationObserver,
    EstimateObserver,
    WeightGradientObserver,
    estimate_gaps,
    singularities,
)
from wsbcn_mm.openmmlab.compat import unwrapped


@HOOKS.register_module()
class DiagnosticsHook(Hook):
    """Writes singularities, weight gradients and estimate gaps to the Runner's visualizer.

    They reach scalars.json and, where the config has its backend, TensorBoard. The passes that the
    Runner makes anyway are watched; none is added. Every ``interval`` iterations, of that
    iteration's images (on several processes: those of the first):

    - ``diagnostics/dead_channels``, ``stat_spread``, ``singularity_distance``, ``sigma_mu``,
      ``sigma_sigma``: means over the ReLUs;
    - ``diagnostics/weight_gradient``, the norm over all convolutions, and
      ``weight_gradient_ratio``, the mean over WS convolutions of ``|dL/dw|`` against its bound
      (with AMP the norm is that of the scaled loss).

    At every validation, of all its images: ``diagnostics/mean_gap``, ``std_gap``, ``drift_share``,
    means over the layers with running statistics.

    In a config::

        custom_imports = dict(imports=['wsbcn_mm'])
        custom_hooks = [dict(type='DiagnosticsHook', interval=50)]

    Args:
        interval: Iterations between measurements, >= 1. A watched iteration costs about twice as
            much as another.
        per_layer: Also write every layer's numbers: ``diagnostics/<layer>/<measure>``.

    Raises:
        ValueError: an interval below 1.
    """

    # Before what logs and zeroes.
    priority = 'NORMAL'

    def __init__(self, interval: int = 50, per_layer: bool = False) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be an integer >= 1\n  got {interval!r}')
        self.interval, self.per_layer = interval, per_layer
        self._activations: ActivationObserver | None = None
        self._gradients: WeightGradientObserver | None = None
        self._estimates: EstimateObserver | None = None

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Starts watching, where it is time."""
        if self.every_n_train_iters(runner, self.interval):
            model = unwrapped(runner.model)
            self._activations = ActivationObserver(model).__enter__()
            self._gradients = WeightGradientObserver(model).__enter__()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Stops watching and writes."""
        if self._activations is None or self._gradients is None:
            return
        self._gradients.__exit__(None, None, None)
        self._activations.__exit__(None, None, None)
        activations, gradients = self._activations.layers(), self._gradients.layers()
        self._activations = self._gradients = None
        values = singularities(activations) if activations else {}
        if gradients:
            values['weight_gradient'] = sum(g.norm**2 for g in gradients.values()) ** 0.5
        ratios = [g.ratio for g in gradients.values() if g.ratio is not None]
        if ratios:
            values['weight_gradient_ratio'] = sum(ratios) / len(ratios)
        if self.per_layer:
            for name, layer in activations.items():
                for measure in ('dead_channels', 'stat_spread', 'singularity_distance'):
                    values[f'{name}/{measure}'] = getattr(layer, measure)
            for name, gradient in gradients.items():
                values[f'{name}/weight_gradient'] = gradient.norm
        self._write(runner, values, runner.iter + 1)

    def before_val_epoch(self, runner) -> None:
        """Starts watching what the layers with running statistics see."""
        self._estimates = EstimateObserver(unwrapped(runner.model)).__enter__()

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Compares and writes."""
        assert self._estimates is not None  # before_val_epoch ran
        self._estimates.__exit__(None, None, None)
        layers, self._estimates = self._estimates.layers(), None
        if not layers:
            return
        values = estimate_gaps(layers)
        if self.per_layer:
            for name, layer in layers.items():
                values[f'{name}/mean_gap'] = layer.mean_gap.mean().item()
                values[f'{name}/drift_share'] = layer.drift_share
        self._write(runner, values, runner.iter)

    @staticmethod
    def _write(runner, values: dict[str, float], step: int) -> None:
        named = {f'diagnostics/{name}': value for name, value in values.items()}
        runner.visualizer.add_scalars(named, step=step)

    def every_n_train_iters(self, runner, n: int) -> bool:
        """Every n-th iteration, the first included: the start tells most."""
        return runner.iter == 0 or super().every_n_train_iters(runner, n)
