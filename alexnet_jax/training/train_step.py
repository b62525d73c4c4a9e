"""The compiled train step: augmentation, model, loss, gradients, update and metrics."""

import enum
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Integer, UInt32

from alexnet_jax import parallel, shapes
from alexnet_jax.augment import PreprocessParams, augment, example_keys
from alexnet_jax.config import Config
from alexnet_jax.layers import materialize, platform
from alexnet_jax.lr_multipliers import frozen_layers, frozen_parameters
from alexnet_jax.model import matmul_precision
from alexnet_jax.optimizer import make_optimizer
from alexnet_jax.training.eval_step import EvalBatch, topk_errors
from alexnet_jax.training.mixing import mix_pairs, smoothed_losses, swap_pairs
from alexnet_jax.training.state import LayerTree, Leaf, TrainState, build_model, param_shapes, state_specs


class TrainBatch(EvalBatch):
    """A training batch on the devices; `example_id` is the number of images before this one since step 0."""

    example_id: UInt32[Array, ' b']


Metrics = dict[str, Float32[Array, '']]  # loss, top1_error, top5_error
LearningRates = Mapping[str, Mapping[str, Float32[Array | np.float32, '']]]  # by layer, and kernel or bias
TrainStep = parallel.JittedFunction[
    [TrainState[Array], TrainBatch, LearningRates, PreprocessParams], tuple[TrainState[Array], Metrics]
]
# Gradients, metric sums (loss, top-1 error, top-5 error) and running statistics of batch normalization.
GradientsAndSums = tuple[LayerTree[Array], Float32[Array, '3'], LayerTree[Array]]


class RngStream(enum.IntEnum):
    """The `purpose` of example_keys(): independent random numbers of the same example."""

    AUGMENTATION = 1
    DROPOUT = 2
    MIXING = 3


def split_frozen(config: Config, tree: LayerTree[Leaf]) -> tuple[LayerTree[Leaf], LayerTree[Leaf]]:
    """Returns the parts of `tree` with the parameters that are trained, and with those that are frozen.

    A part has only the layers of which it has a parameter; see frozen_parameters().
    """
    frozen = frozen_parameters(config)
    parts: tuple[LayerTree[Leaf], LayerTree[Leaf]] = {}, {}
    for layer, leaves in tree.items():
        for kind, leaf in leaves.items():
            parts[(layer, kind) in frozen].setdefault(layer, {})[kind] = leaf
    return parts


def merge_parts(part: LayerTree[Leaf], other: LayerTree[Leaf]) -> LayerTree[Leaf]:
    """Returns the tree of which split_frozen() returned the two parts."""
    return {layer: part.get(layer, {}) | other.get(layer, {}) for layer in part | other}


def with_velocities(opt_state: optax.OptState, velocities: LayerTree[Array]) -> optax.OptState:
    """Returns the state of the optimizer with other velocities; see make_optimizer()."""
    return (*opt_state[:-1], opt_state[-1]._replace(trace=velocities))


def local_gradients(
    config: Config,
    graph: nnx.GraphDef,
    params: LayerTree[Array],
    batch_stats: LayerTree[Array],
    preprocessing: PreprocessParams,
    rows: TrainBatch,
) -> GradientsAndSums:
    """Returns (gradients, sums, batch_stats) for this device's `rows` of a batch.

    gradients: local gradients of the parameters that are not frozen (see split_frozen()); their sum over replicas and
      micro-batches is the gradient of the batch's mean loss. The loss of an image is its cross entropy, times
      `preprocessing['class_weights']` of its label if there are any. The loss of a mixed image is the mean of the
      losses of both labels with the factors of mix_pairs().
    sums: the loss, top-1 error and top-5 error, summed over `rows`; the errors of a mixed image are those of the label
      with the larger factor.
    batch_stats: updated running statistics of batch normalization.
    """
    example_ids, labels, layout, train = rows['example_id'], rows['label'], config.mesh.layout, config.train
    keys = example_keys(config.seed, example_ids, RngStream.AUGMENTATION)
    crop_keys = example_keys(config.seed, example_ids // config.data.crop_group_size, RngStream.AUGMENTATION)
    images = augment(rows['image'], keys, crop_keys, preprocessing, config.data)
    if ('conv1', 'kernel') in frozen_parameters(config) and platform() == 'cpu':
        images = materialize(images)  # otherwise XLA augments again for each row of a window; see cpu.convolution()
    dropout_keys = example_keys(config.seed, parallel.all_gather_example_ids(example_ids, layout), RngStream.DROPOUT)
    is_mixed, partner_labels = bool(train.mixup or train.cutmix), labels
    if is_mixed:
        images, factors = mix_pairs(images, example_keys(config.seed, example_ids, RngStream.MIXING), train)
        partner_labels = swap_pairs(labels)

    def losses_of(logits, labels):
        losses = smoothed_losses(logits, labels, train.label_smoothing)
        return losses * preprocessing['class_weights'][labels] if 'class_weights' in preprocessing else losses

    trained, frozen = split_frozen(config, params)

    def local_loss(trained):
        model = nnx.merge(graph, merge_parts(trained, frozen), batch_stats)
        logits = model(images, dropout_keys)
        losses = losses_of(logits, labels)
        if is_mixed:
            losses = factors * losses + (1 - factors) * losses_of(logits, partner_labels)
        loss = losses.sum() / (train.batch_size * parallel.loss_replication_factor(layout))
        return loss, (losses, logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    with matmul_precision(config.model):
        gradients, (losses, logits, new_batch_stats) = jax.grad(local_loss, has_aux=True)(trained)
    counted = jnp.where(factors >= 0.5, labels, partner_labels) if is_mixed else labels
    sums = jnp.stack([losses.sum(), *(error.sum() for error in topk_errors(logits, counted))])
    return gradients, sums, new_batch_stats


def accumulate_gradients(
    gradients_of: Callable[[TrainBatch], GradientsAndSums], batch: TrainBatch, count: int, params: LayerTree[Array]
) -> GradientsAndSums:
    """Accumulates the gradients of equal micro-batches, which run in sequence.

    Args:
      gradients_of: local_gradients() as a function of the rows.
      batch: this device's rows of a batch.
      count: number of micro-batches.
      params: tree with the shapes and dtypes of the gradients.

    Returns:
      The sum of the gradients, the sum of the metric sums, and the mean of the running statistics of batch
      normalization (each micro-batch is normalized by its own mean and variance).
    """
    if count == 1:
        return gradients_of(batch)

    def add(gradients, rows):
        # Without the barrier, XLA for CPUs starts all micro-batches at once and holds the activations of all.
        rows, gradients = lax.optimization_barrier((rows, gradients))
        more, sums, batch_stats = gradients_of(rows)
        return jax.tree.map(jnp.add, gradients, more), (sums, batch_stats)

    micro_batches = jax.tree.map(lambda rows: rows.reshape(count, -1, *rows.shape[1:]), batch)
    unroll = platform() == 'cpu'  # XLA's CPU backend runs a loop body on one core
    zeros = jax.tree.map(jnp.zeros_like, params)
    gradients, (sums, batch_stats) = lax.scan(add, zeros, micro_batches, unroll=unroll)
    return gradients, sums.sum(0), jax.tree.map(lambda x: x.mean(0), batch_stats)


def balanced_class_weights(class_counts: Integer[np.ndarray, ' classes']) -> Float32[np.ndarray, ' classes']:
    """Returns images / (classes * images of the class) for each class, in float32.

    Only classes with images count, so the mean weight of the images is 1. The weight of a class without images is 0.
    """
    counts = class_counts.astype(np.float64)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0).astype(np.float32)


def make_train_step(config: Config, mesh: parallel.Mesh) -> TrainStep:
    """Returns the jitted TrainStep: (state, batch, learning_rates, preprocessing) -> (state, metrics); donates `state`.

    learning_rates: see Schedule.learning_rate_tree().
    preprocessing: see augment.make_preprocess_params().
    metrics: loss, top1_error and top5_error of the batch under augmentation and dropout.
    """
    graph, _ = build_model(config)
    batch_size, layout = config.train.batch_size, config.mesh.layout
    state_spec, replicated = state_specs(config, mesh), parallel.REPLICATED
    split = partial(split_frozen, config)
    param_specs, _ = split(state_spec.params)
    optimizer_specs, _ = split(parallel.optimizer_specs(param_shapes(config).params, mesh, config.mesh))
    reduce_norms = partial(parallel.psum_over_shards, split=optimizer_specs)
    # The mean over micro-batches would round the statistics that frozen layers keep.
    kept_stats = {f'{layer}_norm' for layer in frozen_layers(config)}

    def train_step(state, batch, learning_rates, preprocessing):
        params = parallel.mark_device_varying(state.params, state_spec.params)
        gradients_of = partial(local_gradients, config, graph, params, state.batch_stats, preprocessing)
        gradients, sums, batch_stats = accumulate_gradients(
            gradients_of, batch, config.train.grad_accum_steps, split(params)[0]
        )
        dtypes = {
            layer: {kind: shapes.grad_allreduce_dtype(config, layer, kind, platform()) for kind in leaves}
            for layer, leaves in gradients.items()
        }
        gradients = parallel.all_reduce_gradients(gradients, param_specs, optimizer_specs, dtypes)
        rates, _ = split({layer: learning_rates[layer] for layer in state.params})
        optimizer = make_optimizer(config.optimizer, rates, reduce_norms)
        (weights, frozen), (velocities, kept_velocities) = split(state.params), split(state.opt_state[-1].trace)
        shards = parallel.local_shards(weights, optimizer_specs)
        updates, opt_state = optimizer.update(gradients, with_velocities(state.opt_state, velocities), shards)
        weights = parallel.all_gather_shards(optax.apply_updates(shards, updates), optimizer_specs)
        opt_state = with_velocities(opt_state, merge_parts(opt_state[-1].trace, kept_velocities))
        batch_stats |= {name: stats for name, stats in state.batch_stats.items() if name in kept_stats}
        means = parallel.global_sum(sums, layout) / batch_size
        metrics = {'loss': means[0], 'top1_error': means[1], 'top5_error': means[2]}
        average, kept_average = split(state.average)
        average = optax.incremental_update(weights, average, 1 - config.train.ema_decay) if average else {}
        params, average = merge_parts(weights, frozen), merge_parts(average, kept_average)
        return TrainState(state.step + 1, params, opt_state, batch_stats, average), metrics

    return parallel.jit_shard_map(
        train_step,
        mesh,
        in_specs=(state_spec, parallel.batch_spec(layout), replicated, replicated),
        out_specs=(state_spec, replicated),
        donate_argnums=(0,),
        only_gradients=mesh.shape['model'] == 1 and not (config.mesh.shard_optimizer or state_spec.batch_stats),
    )
