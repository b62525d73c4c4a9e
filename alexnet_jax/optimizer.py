"""The paper's update rule (section 5), and LARS."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PyTree

from alexnet_jax.config import OptimizerConfig
from alexnet_jax.shapes import LAYERS

ReduceNorms = Callable[[PyTree[Float32[Array, '']]], PyTree[Float32[Array, '']]]


def make_optimizer(
    config: OptimizerConfig,
    learning_rate: float | PyTree[Float32[Array, '']],
    reduce_norms: ReduceNorms = lambda sums: sums,
) -> optax.GradientTransformation:
    """Builds the update v <- momentum * v - learning_rate * (gradient + weight_decay * w);  w <- w + v.

    The velocity includes the learning rate, as in weights.cu of the original program. After a decay of the learning
    rate, only momentum shrinks the old velocity, whereas optax.sgd would scale the velocity down at once.
    `layer_weight_decay` gives one weight decay per layer. Biases have no weight decay unless `decay_biases` is set.

    A `trust_coefficient` t other than 0 selects LARS (You, Gitman, Ginsburg 2017): as in optax.lars, the update of a
    kernel is scaled to the norm t * |w| and then multiplied by the learning rate.

    At a learning rate of 0, a parameter and its velocity keep their values, as in the original program.

    Args:
      config: `optimizer` of a configuration.
      learning_rate: one scalar per kernel and bias, see Schedule.learning_rate_tree(); or one scalar for all kernels,
        which `bias_lr_multiplier` scales for biases. Scalars may be traced, so that a new learning rate needs no
        recompilation.
      reduce_norms: function that all-reduces a tree of sums over shards of parameters to sums over whole parameters,
        see parallel.psum_over_shards(); LARS needs the function on a mesh.
    """
    decays = config.layer_weight_decay or (config.weight_decay,) * len(LAYERS)

    def decay(path, gradient, weights):
        if _is_bias(path) and not config.decay_biases:
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
        # The update reads the stored velocity `kept`, so that XLA updates the buffer in place.
        moved = jax.tree.map(lambda update, rate: jnp.where(rate > 0, update, 0.0), kept, each)
        return moved, optax.TraceState(kept)

    return optax.chain(
        optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(decay, updates, params)),
        scale_by_trust_ratio(config.trust_coefficient, reduce_norms),
        optax.GradientTransformation(velocity.init, apply_momentum),
    )


def _is_bias(path: jax.tree_util.KeyPath) -> bool:
    return path[-1].key == 'bias'


def scale_by_trust_ratio(coefficient: float, reduce_norms: ReduceNorms) -> optax.GradientTransformation:
    """Scales the update of each kernel to `coefficient` times the norm of the kernel.

    Updates of biases, and of kernels for which either norm is 0, stay unchanged. If `coefficient` is 0, all updates
    stay unchanged.
    """
    if not coefficient:
        return optax.identity()

    def norms(tree):
        return jax.tree.map(jnp.sqrt, reduce_norms(jax.tree.map(lambda leaf: jnp.sum(leaf * leaf), tree)))

    def scale(path, update, weight_norm, update_norm):
        ratio = jnp.where((weight_norm > 0) & (update_norm > 0), coefficient * weight_norm / update_norm, 1.0)
        return update if _is_bias(path) else update * ratio

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, norms(params), norms(updates))
    )
