"""The compiled steps: training (augmentation, model, loss, update, metrics), evaluation, prediction, activations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from alexnet_jax import parallel
from alexnet_jax.augment import augment, example_keys
from alexnet_jax.config import Config
from alexnet_jax.optimizer import make_optimizer
from alexnet_jax.training.eval_step import topk_errors
from alexnet_jax.training.state import TrainState, build_model, param_shapes, state_specs

AUGMENTATION, DROPOUT = 1, 2  # `purpose` of example_keys()


def local_gradients(
    config: Config, graph: Any, parameters: Any, statistics: Any, preprocessing: Any, rows: dict[str, jax.Array]
) -> tuple[Any, jax.Array, Any]:
    """Returns (gradients, sums, statistics) for this device's `rows` of a batch.

    gradients: summed over replicas and micro-batches, they are the gradients of the batch's mean loss.
    sums: (3,), the loss, top-1 error and top-5 error summed over `rows`.
    statistics: updated statistics of batch normalization.
    """
    number, labels, layout = rows['example_id'], rows['label'], config.mesh.layout
    keys = example_keys(config.seed, number, AUGMENTATION)
    crop_keys = example_keys(config.seed, number // config.data.crop_group_size, AUGMENTATION)
    images = augment(rows['image'], keys, crop_keys, preprocessing, config.data)
    dropout_keys = example_keys(config.seed, parallel.all_gather_example_ids(number, layout), DROPOUT)

    def share_of_loss(params):
        model = nnx.merge(graph, params, statistics)
        logits = model(images, dropout_keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        share = losses.sum() / (config.train.batch_size * parallel.loss_replication_factor(layout))
        return share, (losses, logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    gradients, (losses, logits, new_statistics) = jax.grad(share_of_loss, has_aux=True)(parameters)
    sums = jnp.stack([losses.sum(), *(error.sum() for error in topk_errors(logits, labels))])
    return gradients, sums, new_statistics


def accumulate_gradients(
    gradients_of: Callable, batch: dict[str, jax.Array], count: int, parameters: Any
) -> tuple[Any, Any, Any]:
    """Gradient accumulation: runs `gradients_of` on `count` equal micro-batches of `batch` in sequence.

    Args:
      gradients_of: local_gradients() as a function of the rows.
      parameters: tree with the shapes and dtypes of the gradients.

    Returns:
      The sum of the gradients, the sum of the metric sums, and the mean of the batch normalization statistics (each
      micro-batch is normalized by its own statistics).
    """
    if count == 1:
        return gradients_of(batch)

    def add(gradients, rows):
        # Without the barrier, a CPU starts all micro-batches at once and holds the activations of all.
        rows, gradients = lax.optimization_barrier((rows, gradients))
        more, sums, statistics = gradients_of(rows)
        return jax.tree.map(jnp.add, gradients, more), (sums, statistics)

    parts = jax.tree.map(lambda rows: rows.reshape(count, -1, *rows.shape[1:]), batch)
    unroll = jax.default_backend() == 'cpu'  # XLA's CPU backend runs a loop body on one core
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    gradients, (sums, statistics) = lax.scan(add, zeros, parts, unroll=unroll)
    return gradients, sums.sum(0), jax.tree.map(lambda x: x.mean(0), statistics)


def make_train_step(config: Config, mesh: parallel.Mesh) -> Any:
    """Returns the jitted step (state, batch, learning_rates, preprocessing) -> (state, metrics); donates `state`.

    batch: image (B, S, S, C) uint8, label (B,) int32, and number (B,) uint32: the count of images seen before this one.
    learning_rates: float32 scalars by layer and kernel or bias, see optimizer.learning_rates().
    preprocessing: see augment.preprocessing().
    metrics: loss, top1_error and top5_error of the batch under augmentation and dropout, float32 scalars.
    """
    graph, _ = build_model(config)
    batch_size, layout = config.train.batch_size, config.mesh.layout
    state, everywhere = state_specs(config, mesh), parallel.REPLICATED
    parameters = param_shapes(config).params
    specs, split = state.params, parallel.optimizer_specs(parameters, mesh, config.mesh)

    def train_step(state, batch, learning_rates, preprocessing):
        own = parallel.mark_device_varying(state.params, specs)
        gradients_of = partial(local_gradients, config, graph, own, state.statistics, preprocessing)
        gradients, sums, statistics = accumulate_gradients(gradients_of, batch, config.train.grad_accum_steps, own)
        gradients = parallel.all_reduce_gradients(gradients, specs, split, config.mesh.grad_allreduce_dtype)
        rates = {layer: learning_rates[layer] for layer in gradients}
        optimizer = make_optimizer(config.optimizer, rates, partial(parallel.psum_over_shards, split=split))
        weights = parallel.local_shards(state.params, split)
        updates, opt_state = optimizer.update(gradients, state.opt_state, weights)
        params = parallel.all_gather_shards(optax.apply_updates(weights, updates), split)
        means = parallel.global_sum(sums, layout) / batch_size
        metrics = {'loss': means[0], 'top1_error': means[1], 'top5_error': means[2]}
        return TrainState(state.step + 1, params, opt_state, statistics), metrics

    return parallel.jit_shard_map(
        train_step,
        mesh,
        in_specs=(state, parallel.batch_spec(layout), everywhere, everywhere),
        out_specs=(state, everywhere),
        donate_argnums=(0,),
    )
