"""What a BCN layer does with an input: the update of the statistics, and who has them when.

`norm` has the layers themselves. A forward pass in training takes one of these ways:

- usual: one call of the compiled extension (`ForwardPasses._forward_usual`);
- once: the same in Python, where an average is kept;
- again: what activation checkpointing repeats, without an update;
- over ranks: with the statistics of all processes;
- transformed, compiled: inside torch.func and torch.compile.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm import backends, compat, distributed
from wsbcn_mm.backends import autograd, cpu, synchronised
from wsbcn_mm.backends.carriers import Affine, Rate, Running
from wsbcn_mm.checks import check_floating, check_groups, checked_rate
from wsbcn_mm.layers import averages, channel_stage, compiled, recomputation, transformed

Remembered = tuple[Tensor, Tensor, averages.Average | None]
"""What a layer knows of its updates beside the buffers."""


class ForwardPasses(nn.GroupNorm):
    """The forward passes of `wsbcn_mm.layers.norm.BatchChannelNorm`, which makes what they use."""

    bn: Any  # a ChannelStage, or what hosts replace BatchNorms by
    batch_weight: nn.Parameter
    batch_bias: nn.Parameter
    mode: str
    sync: str | None
    _bn_class: type[_BatchNorm]
    _stage_class: type[channel_stage.ChannelStage]
    _dims: tuple[int, ...]
    _counts: Tensor | None
    _steps: Tensor  # see `averages.rate_of_next`; where the counts are, and as they are
    _identity: Tensor
    _average: averages.Average | None

    @property
    @abstractmethod
    def counts(self) -> Tensor:
        """See `wsbcn_mm.layers.norm.BatchChannelNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input``; see the class for shapes and what each mode does."""
        bn = self._modules['bn']
        assert bn is not None
        if bn._forward_pre_hooks or bn._forward_hooks:
            if compat.is_traced_by_fx(input):
                return compat.call_as_leaf(self, input)
            return channel_stage.call_with_hooks(self, self._forward, input)
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            output = self._forward_usual(input)
            if output is not None:
                return output
        return self._forward_checked(input)

    def _forward_usual(self, input: Tensor) -> Tensor | None:
        """What `_forward_checked` does where nothing is unusual, in one call; None elsewhere.

        Every line here is paid once per layer and step, and takes as long as a part of a small map.
        """
        bn = self._modules['bn']
        entries = cpu.entries
        if entries is None or type(bn) is not self._stage_class or backends.forced() is not None:
            return None
        if compat.compiles_backward_passes():
            return None
        rate = None
        if bn.training:
            rate = bn.momentum
            # An average; ranks that wait. (Of what may be a repetition the extension knows.)
            if type(rate) is not float or rate == 1 or self._average is not None:
                return None
            if self.sync == 'forward' or not bn.track_running_stats:
                return None
        parameters, buffers = self._parameters, bn._buffers
        try:
            mean, var = buffers['running_mean'], buffers['running_var']
            tracked = buffers['num_batches_tracked']
            batch_weight, batch_bias = parameters['batch_weight'], parameters['batch_bias']
            weight, bias = parameters['weight'], parameters['bias']
        except KeyError:  # somebody keeps them elsewhere: parametrized, pruned, replicated
            return None
        if tracked is None:
            return None
        from_batch = rate is not None and self.mode == 'batch'
        dims = self._dims
        output: Tensor | None = entries.batch_channel_norm(  # no stars: they copy all arguments
            input,
            self.num_groups,
            mean,
            var,
            self._counts,
            tracked if rate is not None else None,
            batch_weight,
            batch_bias,
            weight,
            bias,
            rate,
            self.eps,
            from_batch,
            dims[0],
            dims[-1],
        )
        return output

    def _forward_checked(self, input: Tensor) -> Tensor:
        bn = self.bn
        mean, var = getattr(bn, 'running_mean', None), getattr(bn, 'running_var', None)
        if not self._fits(input, mean):
            if compat.is_traced_by_fx(input):
                return compat.call_as_leaf(self, input)
            self._refuse(input)
        assert mean is not None and var is not None
        if self.num_groups < 1 or self.num_channels % self.num_groups:  # set since it was made
            check_groups(self.num_channels, self.num_groups)
        # norm_eval and frozen stages call eval() on BatchNorm instances only: the child obeys. What
        # hosts replace BatchNorms by to freeze them (FrozenBatchNorm2d) has nothing to update with.
        if not bn.training or not hasattr(bn, 'momentum'):
            return self._normalize(input, Running(mean, var), None)
        if bn.num_batches_tracked is None:
            raise RuntimeError(
                f'{type(self).__name__}: its child bn has no counter of updates\n'
                '  num_batches_tracked must be a 0-d int64 tensor, as BatchNorm makes it\n'
                '  got None'
            )
        if not bn.track_running_stats:
            return self._forward_untracked(input, Running(mean, var))
        if not torch.compiler.is_compiling() and compat.in_transform():
            return self._forward_transformed(input, Running(mean, var))
        running = Running(mean, var, self.counts)
        if self.sync == 'forward' or self.mode == 'batch':
            ranks = self.ranks()
            if ranks is not None:
                # Also with an empty input: the other ranks wait for this one's share.
                return self._forward_over_ranks(input, running, ranks)
        # Batch mode does not update from a single value per channel.
        if input.numel() // self.num_channels <= (1 if self.mode == 'batch' else 0):
            return self._normalize(input, running, 0.0)
        if torch.compiler.is_compiling():
            return self._forward_compiled(input, running)
        run = recomputation.of(self._identity)
        if run is None:
            return self._forward_once(input, running)
        use = run.recall()
        if use is not None:
            return self._forward_again(input, running, use)
        output = self._forward_once(input, running)
        if run.is_recorded:
            run.remember(self._use(running))
        return output

    def _forward_once(self, input: Tensor, running: Running) -> Tensor:
        """Updates the running statistics, and normalises."""
        rate = self._rate()
        if self.mode == 'batch':
            if self.bn.momentum is not None:
                return self._normalize(input, running, rate)
            averages.update_from_batch(input, running, rate, self._steps)
            return self._normalize(input, _copy_of(running), 0.0)
        average = self._average_now(rate)
        if average is False:
            self.forget_average()
            return self._normalize(input, running, rate)
        self._update_average(input, running, rate, distributed.ALONE, average)
        # With the new estimates as constants: what evaluation does.
        return self._normalize(input, running, None)

    def _forward_again(self, input: Tensor, running: Running, use: recomputation.Use) -> Tensor:
        """The same result as in the run that checkpointing repeats; the estimates stay."""
        if use.mean is not None and use.var is not None:
            return self._normalize(input, Running(use.mean, use.var), None)
        # Rate 0 keeps the copies, the statistics of the batch are computed again.
        return self._normalize(input, _copy_of(running), 0.0)

    def _forward_untracked(self, input: Tensor, running: Running) -> Tensor:
        """As in training, without an update: ``bn.track_running_stats`` was set to False."""
        ranks = self.ranks() if self.mode == 'batch' else None
        if ranks is not None:
            running = _copy_of(Running(running.mean, running.var, self.counts))
            return synchronised.batch_norm_over_ranks(
                input, self.num_groups, running, self._affine(), 0.0, self.eps, ranks
            )
        return self._normalize(input, _copy_of(running), 0.0)

    def _forward_transformed(self, input: Tensor, running: Running) -> Tensor:
        """Inside a transform of torch.func, which lets a function edit what it was given alone."""
        momentum, tracked = self._momentum(), self.bn.num_batches_tracked
        plain = momentum is not None and not self.averages and self.ranks() is None
        transformed.check_buffers((*running[:2], tracked), plain, type(self).__name__)
        tracked.add_(1)
        return self._normalize(input, running, momentum)

    def _forward_compiled(self, input: Tensor, running: Running) -> Tensor:
        """What to update is decided when the compiled code runs; see `compiled.observe`."""
        from_batch, tracked = self.mode == 'batch', self.bn.num_batches_tracked
        assert tracked is not None
        mean, var = compiled.observe(
            input,
            # Not _replace, which torch.compile cannot look into on torch 2.6.
            Running(running.mean, running.var, running.counts, tracked),
            self._steps,
            self._momentum(),
            from_batch,
            self._identity,
        )
        use = recomputation.Use() if from_batch else recomputation.Use(mean, var)
        return self._forward_again(input, running, use)

    def _use(self, running: Running) -> recomputation.Use:
        """What a repetition of this run must see."""
        if self.mode == 'batch':
            return recomputation.Use()
        return recomputation.Use(running.mean.clone(), running.var.clone())

    def _momentum(self) -> float | Tensor | None:
        momentum: float | Tensor | None = self.bn.momentum
        # What a child was replaced by takes anything. A 0-d tensor is what a schedule sets
        # in compiled code, where every new number would be compiled anew.
        if momentum is not None and not isinstance(self.bn, channel_stage.ChannelStage):
            momentum = checked_rate(momentum)
        if not isinstance(momentum, Tensor) or torch.compiler.is_compiling():
            return momentum
        # One that a device holds is not looked into.
        return checked_rate(float(momentum)) if momentum.device.type == 'cpu' else momentum

    def _rate(self) -> float | Tensor:
        """Counts an update; the weight of its observation: what users set as momentum."""
        momentum, tracked = self._momentum(), self.bn.num_batches_tracked
        assert tracked is not None
        if momentum is None:
            return averages.rate_of_next(self._steps, tracked)
        tracked.add_(1)
        return momentum

    @property
    def averages(self) -> bool:
        """Whether the estimates of this layer are averages of inputs with the same weight.

        They are with ``momentum='cumulative'``, and with 1, which hosts set to average themselves.
        """
        momentum = self._momentum()
        return self.mode == 'estimate' and (momentum is None or (momentum == 1) is True)

    def note_inputs_of_others(self, taken_in: Tensor) -> None:
        """Counts an input of another rank, in the channels (C,) that it is now a part of."""
        averages.note_of_others(self._steps, self.bn.num_batches_tracked, taken_in)

    def forget_average(self) -> None:
        """Lets a host's average, with ``momentum=1``, begin with the next input."""
        self._average = None

    @torch.no_grad()
    def begin_anew(self, loaded: bool) -> None:
        """Lets averages begin anew: somebody has set the running statistics.

        Args:
            loaded: From a state dict, which may be the one that was put aside a moment ago: what
                they are to be synchronised with stays. Else they were reset.
        """
        self.forget_average()
        counts, tracked = self._counts, self.bn.num_batches_tracked
        if counts is None or tracked is None or counts.device != tracked.device:
            return  # they are made when they are needed
        if compat.is_fake(counts) != compat.is_fake(tracked):
            return
        if not loaded:
            counts[0].zero_()
        averages.begin_together(self._steps, tracked)

    def remembered(self) -> Remembered:
        """A copy of what is not in the buffers; for `remember`."""
        return self.counts.clone(), self._steps.clone(), self._average

    @torch.no_grad()
    def remember(self, remembered: Remembered) -> None:
        """Puts back what `remembered` gave, after a trial."""
        self.counts.copy_(remembered[0])
        self._steps.copy_(remembered[1])
        self._average = remembered[2]

    def _average_now(self, rate: float | Tensor) -> bool | Tensor:
        """`averages`; where only the device knows it, a 0-d tensor."""
        return self.bn.momentum is None or rate == 1

    def _update_average(
        self,
        input: Tensor,
        running: Running,
        rate: float | Tensor,
        ranks: synchronised.Ranks,
        average: bool | Tensor,
    ) -> None:
        taken_in = synchronised.update_estimates(input, running, rate, ranks, average)
        if self.bn.momentum is None:
            averages.note(self._steps, taken_in)
        elif average is True:
            self._average = averages.add_share(running, taken_in, self._average)

    def ranks(self) -> distributed.Ranks | None:
        """Those whose samples the statistics are of, where there are others than this one."""
        converted = self.mode == 'batch' and isinstance(self.bn, nn.SyncBatchNorm)
        if not converted and self.sync != 'forward':
            return None
        group: Any = self.bn.process_group if converted else None
        return distributed.Ranks(group) if distributed.world_size(group) > 1 else None

    def _affine(self) -> Affine:
        return Affine(self.batch_weight, self.batch_bias, self.weight, self.bias)

    def _normalize(self, input: Tensor, running: Running, rate: Rate) -> Tensor:
        # Not through `functional`: its checks were made when the layer was, and take as long as a
        # small map.
        return autograd.batch_channel_norm(
            input, self.num_groups, running, self._affine(), rate, self.eps, self.mode
        )

    @compat.not_compiled
    def _forward_over_ranks(
        self, input: Tensor, running: Running, ranks: distributed.Ranks
    ) -> Tensor:
        """As in one process with the samples of all ranks."""
        run = recomputation.of(self._identity)
        use = None if run is None else run.recall()
        if self.mode == 'batch':
            rate = self._rate() if use is None else 0.0
            if use is not None:  # the statistics of the batch are computed again, the buffers stay
                running = _copy_of(running)
            left_out = self.counts[1].clone()
            output = synchronised.batch_norm_over_ranks(
                input, self.num_groups, running, self._affine(), rate, self.eps, ranks
            )
            if use is None and self.bn.momentum is None:
                averages.note(self._steps, self.counts[1] == left_out)
        elif use is not None:
            output = self._forward_again(input, running, use)
        else:
            rate = self._rate()
            average = self._average_now(rate)
            if average is False:
                self.forget_average()
            self._update_average(input, running, rate, ranks, average)
            # With the new estimates as constants: what evaluation does.
            output = self._normalize(input, running, None)
        if run is not None and use is None and run.is_recorded:
            run.remember(self._use(running))
        return output

    def _fits(self, input: Tensor, mean: Tensor | None) -> bool:
        if not isinstance(input, Tensor) or not input.is_floating_point() or mean is None:
            return False
        shape = input.shape
        return (
            len(shape) in self._dims
            and shape[1] == self.num_channels
            and input.device == mean.device
        )

    def _refuse(self, input: Tensor) -> None:
        check_floating(input, 'input')
        name, mean = type(self).__name__, getattr(self.bn, 'running_mean', None)
        if not hasattr(self.bn, 'running_mean'):
            raise RuntimeError(
                f'{name}: its child bn was replaced by a {type(self.bn).__name__}, which has no '
                'running statistics\n  it must stay a BatchNorm: to freeze it, call bn.eval(); to '
                'take the layer out, replace the layer'
            )
        if mean is None:
            raise RuntimeError(
                f'{name}: its child bn has no running statistics (track_running_stats=False)\n'
                "  they are a part of this layer; mode='batch' trains with those of the batch"
            )
        if len(input.shape) in self._dims and input.shape[1] == self.num_channels:
            raise RuntimeError(
                f'{name}: the input is on {input.device}, the running statistics on {mean.device}\n'
                '  move the layer or the input; a layer made on the meta device has no values '
                'before to_empty(), or load_state_dict(assign=True), and loading'
            )
        expected = ' or '.join(f'{d}-d' for d in self._dims)
        raise ValueError(
            f'{name} expects a {expected} input (N, {self.num_channels}, ...)\n'
            f'  got shape {tuple(input.shape)}'
        )


def _copy_of(running: Running) -> Running:
    counts = None if running.counts is None else running.counts.clone()
    return Running(running.mean.clone(), running.var.clone(), counts)
