"""The paper's update rule (section 5), and the learning-rate schedules of the paper and of later recipes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alexnet_jax.config import duration_in_steps, total_steps
from alexnet_jax.shapes import LAYERS


def make_optimizer(
    config: Any, learning_rate: Any, reduce_norms: Callable[[Any], Any] = lambda sums: sums
) -> optax.GradientTransformation:
    """Builds the update v <- momentum * v - learning_rate * (gradient + weight_decay * w);  w <- w + v.

    The velocity includes the learning rate, as in weights.cu of the original program: after a drop the old velocity
    decays by momentum alone, whereas optax.sgd would scale it down at once. `weight_decays` gives one weight decay per
    layer. Biases have no weight decay unless `bias_decay` is set.

    A `trust_coefficient` t other than 0 selects LARS (You, Gitman, Ginsburg 2017): the update of a kernel is scaled to
    the norm t * |w| before it is multiplied by the learning rate, as in optax.lars.

    At a learning rate of 0 a parameter and its velocity keep their values, as in the original program.

    Args:
      config: `optimizer` of a configuration.
      learning_rate: a tree of float32 scalars with the structure of the parameters, see learning_rates(); or one scalar
        for all kernels, which `bias_lr_multiplier` scales for biases. It may be traced, so that a new learning rate
        needs no recompilation.
      reduce_norms: all-reduces sums over kernel shards (a tree of scalars with the structure of the parameters) to sums
        over whole kernels; LARS needs it on a mesh, see parallel.psum_over_shards().
    """
    decays = config.weight_decays or (config.weight_decay,) * len(LAYERS)

    def decay(path, gradient, weights):
        if _is_bias(path) and not config.bias_decay:
            return gradient
        layer = path[-2].key if len(path) > 1 else None
        return gradient + (decays[LAYERS.index(layer)] if layer in LAYERS else config.weight_decay) * weights

    def rates(updates):
        if isinstance(learning_rate, dict):
            return learning_rate
        return jax.tree_util.tree_map_with_path(
            lambda path, _: learning_rate * (config.bias_lr_multiplier if _is_bias(path) else 1.0), updates
        )

    velocity = optax.trace(config.momentum)

    def apply_momentum(updates, state, _=None):
        each = rates(updates)
        scaled = jax.tree.map(lambda update, rate: -rate * update, updates, each)
        _, new_state = velocity.update(scaled, state)
        kept = jax.tree.map(lambda new, old, rate: jnp.where(rate > 0, new, old), new_state.trace, state.trace, each)
        # Reads the stored velocity `kept`, so that XLA updates the buffer in place instead of copying it.
        moved = jax.tree.map(lambda update, rate: jnp.where(rate > 0, update, 0.0), kept, each)
        return moved, optax.TraceState(kept)

    return optax.chain(
        optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(decay, updates, params)),
        optax.stateless(
            lambda updates, params: scale_by_trust_ratio(updates, params, config.trust_coefficient, reduce_norms)
        ),
        optax.GradientTransformation(velocity.init, apply_momentum),
    )


def _is_bias(path: Any) -> bool:
    return path[-1].key == 'bias'


def scale_by_trust_ratio(updates: Any, params: Any, coefficient: float, reduce_norms: Callable[[Any], Any]) -> Any:
    """Scales the update of each kernel to `coefficient` times the norm of the kernel.

    Biases, and kernels where either norm is 0, keep their updates; so do all parameters if `coefficient` is 0.
    """
    if not coefficient:
        return updates

    def norms(tree):
        return jax.tree.map(jnp.sqrt, reduce_norms(jax.tree.map(lambda leaf: jnp.sum(leaf * leaf), tree)))

    def scaled(path, update, weight_norm, update_norm):
        ratio = jnp.where((weight_norm > 0) & (update_norm > 0), coefficient * weight_norm / update_norm, 1.0)
        return update if _is_bias(path) else update * ratio

    return jax.tree_util.tree_map_with_path(scaled, updates, norms(params), norms(updates))


def scheduled_rate(config: Any, step: int, examples: int, drops_taken: int) -> float:
    """Returns the learning rate of all kernels without an entry in `layer_rates` at `step`, counted from 0.

    Args:
      config: the whole configuration.
      examples: number of training images, which defines an epoch.
      drops_taken: number of drops so far of the schedule 'plateau', see plateau_next().
    """
    optimizer, batch_size = config.optimizer, config.train.batch_size
    rate = optimizer.learning_rate
    if optimizer.schedule == 'steps':
        at = [duration_in_steps(str(drop), batch_size=batch_size, examples=examples) for drop in optimizer.drops]
        rate /= optimizer.divisor ** sum(step >= drop for drop in at)
    elif optimizer.schedule == 'plateau':
        rate /= optimizer.divisor**drops_taken
    elif optimizer.schedule == 'dexp':
        rate /= _dexp_divisor(optimizer.dexp_factor, optimizer.dexp_parts, step, total_steps(config, examples))
    elif optimizer.schedule == 'poly':
        rate *= max(0.0, 1 - step / total_steps(config, examples)) ** optimizer.power
    return rate * _warmed_up(config, step, examples)


def _dexp_divisor(factor: float, parts: int, step: int, total: int) -> float:
    """Returns cuda-convnet2's `dexp` divisor (lr.cu): from 1 to `factor` in `parts` equally long, geometric steps."""
    part = min(parts - 1, step * parts // max(total, 1))
    return factor ** (part / (parts - 1))


def _warmed_up(config: Any, step: int, examples: int) -> float:
    warmup = str(config.optimizer.warmup)
    steps = duration_in_steps(warmup, batch_size=config.train.batch_size, examples=examples)
    return min(1.0, (step + 1) / steps) if steps else 1.0


def learning_rates(config: Any, step: int, examples: int, drops_taken: int) -> dict[str, dict[str, float]]:
    """Returns the learning rate of each layer's `kernel` and `bias` at `step`; see scheduled_rate() for the arguments.

    The learning rate of biases is `bias_lr_multiplier` times the scheduled one, or times that of a `bias_schedule` with
    the same initial value. `layer_rates` overrides single kernels or biases from a given time on.
    """
    optimizer, batch_size = config.optimizer, config.train.batch_size
    kernel = bias = scheduled_rate(config, step, examples, drops_taken)
    if optimizer.bias_schedule != 'same':
        bias = optimizer.learning_rate * _warmed_up(config, step, examples)
    if optimizer.bias_schedule == 'dexp':
        total = total_steps(config, examples)
        bias /= _dexp_divisor(optimizer.bias_dexp_factor, optimizer.bias_dexp_parts, step, total)
    rates = {name: {'kernel': kernel, 'bias': bias * optimizer.bias_lr_multiplier} for name in LAYERS}
    for name, since, rate in optimizer.layer_rates:
        if step >= duration_in_steps(str(since), batch_size=batch_size, examples=examples):
            layer, kind = name.split('/')
            rates[layer][kind] = rate
    return rates


def plateau_init() -> dict[str, float]:
    """Returns the state of the schedule 'plateau' before the first evaluation: plain numbers, saved in checkpoints."""
    return {'lowest_error': 1.0, 'waited': 0, 'drops_taken': 0}


def plateau_next(state: dict[str, float], error: float, config: Any) -> dict[str, float]:
    """Returns the state after an evaluation with top-1 `error` (0 to 1), by the paper's rule: drop on a plateau.

    A drop follows `patience` evaluations in a row without a new lowest error, at most `max_drops` times. `config` is
    `optimizer` of a configuration.
    """
    if error < state['lowest_error']:
        return state | {'lowest_error': error, 'waited': 0}
    waited = state['waited'] + 1
    if waited >= config.patience and state['drops_taken'] < config.max_drops:
        return state | {'waited': 0, 'drops_taken': state['drops_taken'] + 1}
    return state | {'waited': waited}
