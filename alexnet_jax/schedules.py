"""The learning-rate schedules of the paper and of later recipes, and the intervals of a run in train steps."""

import dataclasses
import math

from alexnet_jax.config import Config, OptimizerConfig, TrainConfig, duration_in_steps, total_steps
from alexnet_jax.lr_multipliers import KINDS, lr_multiplier
from alexnet_jax.shapes import LAYERS


@dataclasses.dataclass(frozen=True)
class PlateauState:
    """The state of the schedule 'plateau' in checkpoints; the defaults describe the state before any evaluation.

    Attributes:
      lowest_error: the lowest top-1 validation error so far (0 to 1).
      waited: number of evaluations since the last new lowest error or decay.
      decays_taken: number of decays so far.
    """

    lowest_error: float = 1.0
    waited: int = 0
    decays_taken: int = 0

    def update(self, error: float, config: OptimizerConfig) -> 'PlateauState':
        """Returns the state after an evaluation with the top-1 error `error`.

        As in section 5 of the paper, the learning rate decays when the error stops improving: after `patience`
        evaluations in a row without a new lowest error, and at most `max_decays` times.
        """
        if error < self.lowest_error:
            return dataclasses.replace(self, lowest_error=error, waited=0)
        waited = self.waited + 1
        if waited >= config.patience and self.decays_taken < config.max_decays:
            return dataclasses.replace(self, waited=0, decays_taken=self.decays_taken + 1)
        return dataclasses.replace(self, waited=waited)

    def is_exhausted(self, config: OptimizerConfig) -> bool:
        """Returns whether a further decay is due after `max_decays`; then the run ends with `stop_on_plateau`."""
        return self.waited >= config.patience and self.decays_taken >= config.max_decays


class Schedule:
    """The learning rates of a run as functions of the train step.

    Args:
      optimizer, train: groups of a configuration.
      examples: number of training images, which defines an epoch.
    """

    def __init__(self, optimizer: OptimizerConfig, train: TrainConfig, examples: int):
        def steps(duration: str) -> int:
            return duration_in_steps(str(duration), batch_size=train.batch_size, examples=examples)

        self.config = optimizer
        self.total_steps = total_steps(train, examples)
        self.warmup_steps = steps(optimizer.warmup)
        self.milestones = [steps(milestone) for milestone in optimizer.milestones]
        self.multipliers = {(name, kind): lr_multiplier(optimizer, (name, kind)) for name in LAYERS for kind in KINDS}
        self.overrides = [(name, steps(since), rate) for name, since, rate in optimizer.lr_overrides]

    def learning_rate(self, step: int, decays_taken: int) -> float:
        """Returns the learning rate of all kernels without an entry in `lr_multipliers` or `lr_overrides`.

        Args:
          step: the train step, counted from 0.
          decays_taken: see PlateauState; ignored unless the schedule is 'plateau'.
        """
        config, rate = self.config, self.config.learning_rate
        if config.schedule == 'steps':
            rate /= config.decay_factor ** sum(step >= milestone for milestone in self.milestones)
        elif config.schedule == 'plateau':
            rate /= config.decay_factor**decays_taken
        elif config.schedule == 'dexp':
            rate /= self._dexp_divisor(config.dexp_factor, config.dexp_parts, step)
        elif config.schedule == 'poly':
            rate *= max(0.0, 1 - step / self.total_steps) ** config.poly_power
        elif config.schedule == 'cosine':
            done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            rate *= (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2
        return rate * self._warmup(step)

    def learning_rate_tree(self, step: int, decays_taken: int) -> dict[str, dict[str, float]]:
        """Returns the learning rate of each layer's `kernel` and `bias`; see learning_rate() for the arguments.

        The learning rate of biases is `bias_lr_multiplier` times that of kernels or, unless `bias_schedule` is 'same',
        times that of `bias_schedule`, which starts at the same value. `lr_multipliers` multiplies the learning rates of
        the parameters that a pattern matches. From a given step on, `lr_overrides` replaces the learning rate of a
        single kernel or bias.
        """
        config = self.config
        kernel = bias = self.learning_rate(step, decays_taken)
        if config.bias_schedule != 'same':
            bias = config.learning_rate * self._warmup(step)
        if config.bias_schedule == 'dexp':
            bias /= self._dexp_divisor(config.bias_dexp_factor, config.bias_dexp_parts, step)
        scheduled = {'kernel': kernel, 'bias': bias * config.bias_lr_multiplier}
        rates = {
            name: {kind: rate * self.multipliers[name, kind] for kind, rate in scheduled.items()} for name in LAYERS
        }
        for name, first_step, rate in self.overrides:
            if step >= first_step:
                layer, kind = name.split('/')
                rates[layer][kind] = rate
        return rates

    def _dexp_divisor(self, factor: float, parts: int, step: int) -> float:
        """Returns cuda-convnet2's `dexp` divisor (lr.cu): geometric from 1 to `factor` in `parts` equal parts."""
        part = min(parts - 1, step * parts // max(self.total_steps, 1))
        return factor ** (part / (parts - 1))

    def _warmup(self, step: int) -> float:
        """Returns the factor of the linear warmup, at most 1."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


@dataclasses.dataclass(frozen=True)
class Intervals:
    """The intervals and times of logging, evaluation, checkpoints, stall checks and color augmentation, in steps.

    Attributes:
      log_every, eval_every, checkpoint_every: train.log_every, eval.every and checkpoint.every of a configuration.
      stall_after: the step from which the loss is compared with that of random guessing.
      color_augmentation_until: the step at which color augmentation ends; infinity if it never ends.
    """

    log_every: int
    eval_every: int
    checkpoint_every: int
    stall_after: int
    color_augmentation_until: float

    @classmethod
    def from_config(cls, config: Config, examples: int) -> 'Intervals':
        """Converts the durations of `config` for a training set of `examples` images."""

        def steps(duration: str) -> int:
            return duration_in_steps(duration, batch_size=config.train.batch_size, examples=examples)

        color_end = config.data.color_augmentation_until
        return cls(
            log_every=steps(config.train.log_every),
            eval_every=steps(config.eval.every),
            checkpoint_every=steps(config.checkpoint.every),
            stall_after=steps(config.train.stall_after),
            color_augmentation_until=math.inf if color_end is None else steps(color_end),
        )
