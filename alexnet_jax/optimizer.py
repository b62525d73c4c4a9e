"""The paper's update rule (section 5), its learning-rate schedules, and those of later recipes."""

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
    """v <- momentum * v - learning_rate * (gradient + weight_decay * w);  w <- w + v.

    The rate stands inside the velocity: after a drop the old velocity fades out at its old size (weights.cu of the
    original program), where optax.sgd would shrink it at once. Biases do not decay unless `bias_decay` says so.

    With a `trust_coefficient` t (LARS: You, Gitman, Ginsburg 2017) what is multiplied with a kernel's rate is scaled to
    the size t * |w| first, as optax.lars does.

    At a rate of 0 a parameter stands still and its velocity stays as it is, as in the original program.

    Args:
      config: `optimizer` of a configuration.
      learning_rate: a tree of float32 scalars like the parameters, see learning_rates(); or one scalar for all kernels,
        and for biases `bias_lr_multiplier` times it. May be traced: a new rate needs no new compilation.
      reduce_norms: makes sums over a device's shares of kernels (a tree of scalars like the parameters) sums over whole
        kernels; needed by LARS on a mesh, see parallel.psum_over_shards().
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
        # Of the velocity as it is stored: so the compiler updates it in place, where it would copy it first.
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
    """Kernels' updates scaled to `coefficient` times the norm of the kernel; biases' and those of zeros as they are."""
    if not coefficient:
        return updates

    def norms(tree):
        return jax.tree.map(jnp.sqrt, reduce_norms(jax.tree.map(lambda leaf: jnp.sum(leaf * leaf), tree)))

    def scaled(path, update, weight_norm, update_norm):
        ratio = jnp.where((weight_norm > 0) & (update_norm > 0), coefficient * weight_norm / update_norm, 1.0)
        return update if _is_bias(path) else update * ratio

    return jax.tree_util.tree_map_with_path(scaled, updates, norms(params), norms(updates))


def scheduled_rate(config: Any, step: int, examples: int, drops_taken: int) -> float:
    """The learning rate of step `step` (counted from 0): of kernels, where `layer_rates` does not give another.

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
    elif optimizer.schedule == 'dexp':
        rate /= _dexp_divisor(optimizer.dexp_factor, optimizer.dexp_parts, step, total_steps(config, examples))
    elif optimizer.schedule == 'poly':
        rate *= max(0.0, 1 - step / total_steps(config, examples)) ** optimizer.power
    return rate * _warmed_up(config, step, examples)


def _dexp_divisor(factor: float, parts: int, step: int, total: int) -> float:
    """cuda-convnet2's `dexp` (lr.cu): in `parts` equal parts of the run from 1 to `factor`, each by the same factor."""
    part = min(parts - 1, step * parts // max(total, 1))
    return factor ** (part / (parts - 1))


def _warmed_up(config: Any, step: int, examples: int) -> float:
    warmup = str(config.optimizer.warmup)
    steps = duration_in_steps(warmup, batch_size=config.train.batch_size, examples=examples)
    return min(1.0, (step + 1) / steps) if steps else 1.0


def learning_rates(config: Any, step: int, examples: int, drops_taken: int) -> dict[str, dict[str, float]]:
    """The rate of each layer's `kernel` and `bias` at `step`; arguments as those of scheduled_rate().

    Biases take `bias_lr_multiplier` times the scheduled rate, or by `bias_schedule` times one of their own that begins
    alike. `layer_rates` gives single kernels or biases another rate from some time on.
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
