"""The paper's update rule (section 5) and its learning-rate schedules."""

from typing import Any

import jax
import optax

from alexnet_jax.config import duration_in_steps, total_steps


def make_optimizer(config: Any, learning_rate: jax.Array | float) -> optax.GradientTransformation:
    """v <- momentum * v - learning_rate * (gradient + weight_decay * w);  w <- w + v.

    The rate stands inside the velocity: after a drop the old velocity fades out at its old size (weights.cu of the
    original program), where optax.sgd would shrink it at once. Biases do not decay; their rate is
    `bias_lr_multiplier` times the other's.

    Args:
      config: `optimizer` of a configuration.
      learning_rate: float32 scalar, may be traced: a new rate needs no new compilation.
    """

    def is_kernel(parameters):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)

    def is_bias(parameters):
        return jax.tree.map(lambda leaf: leaf.ndim == 1, parameters)

    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=is_kernel),
        optax.masked(optax.scale(config.bias_lr_multiplier), is_bias),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(config.momentum),
    )


def scheduled_rate(config: Any, step: int, examples: int, drops_taken: int) -> float:
    """The learning rate of step `step` (counted from 0).

    Args:
      config: the whole configuration.
      examples: images in the training set, which epochs are counted by.
      drops_taken: of schedule 'plateau', see Plateau.
    """
    optimizer, batch_size = config.optimizer, config.train.batch_size
    rate = optimizer.learning_rate
    if optimizer.schedule == 'steps':
        at = [duration_in_steps(str(drop), batch_size=batch_size, examples=examples) for drop in optimizer.drops]
        rate /= optimizer.divisor ** sum(step >= drop for drop in at)
    elif optimizer.schedule == 'plateau':
        rate /= optimizer.divisor**drops_taken
    elif optimizer.schedule == 'poly':
        rate *= max(0.0, 1 - step / total_steps(config, examples)) ** optimizer.power
    warmup = duration_in_steps(str(optimizer.warmup), batch_size=batch_size, examples=examples)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


def plateau_start() -> dict[str, float]:
    """State of the schedule 'plateau' before the first evaluation; plain numbers, kept in the checkpoint."""
    return {'lowest_error': 1.0, 'waited': 0, 'drops_taken': 0}


def plateau_next(state: dict[str, float], error: float, config: Any) -> dict[str, float]:
    """State after an evaluation with `error` (0 to 1): the paper's rule, divide when the error stopped improving.

    A drop follows `patience` evaluations in a row without a new lowest error, at most `max_drops` times.
    """
    if error < state['lowest_error']:
        return state | {'lowest_error': error, 'waited': 0}
    waited = state['waited'] + 1
    if waited >= config.patience and state['drops_taken'] < config.max_drops:
        return state | {'waited': 0, 'drops_taken': state['drops_taken'] + 1}
    return state | {'waited': waited}
