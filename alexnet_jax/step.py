"""The compiled steps: training (augmentation, model, loss, update, metrics), evaluation, prediction, activations."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from ml_collections import FrozenConfigDict

from alexnet_jax import parallel
from alexnet_jax.augment import augment, example_keys, view
from alexnet_jax.model import AlexNet
from alexnet_jax.optimizer import make_optimizer

AUGMENTATION, DROPOUT = 1, 2  # `purpose` of example_keys()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a training step updates.

    Attributes:
      step: number of steps taken (int32).
      params: parameters (float32).
      opt_state: state of the optimizer: velocities (float32) in the same tree as `params`.
      statistics: running means and variances of batch normalization (float32); empty without batch normalization.
    """

    step: Any
    params: Any
    opt_state: Any
    statistics: Any


def network(config: Any) -> tuple[Any, Callable]:
    """Returns the GraphDef for nnx.merge(graph, params, statistics), and a function key -> (params, statistics)."""

    def build(key):
        data, rngs = config.data, nnx.Rngs(params=key)
        axes = parallel.batch_axes(config.mesh.layout)
        return AlexNet(
            config.model,
            crop_size=data.crop_size,
            channels=data.channels,
            rngs=rngs,
            statistics_axes=axes,
            remat=config.train.remat,
        )

    def initial(key):
        _, params, statistics = nnx.split(build(key), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)

    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, nnx.BatchStat)[0]
    return graph, initial


def state_specs(config: Any, mesh: parallel.Mesh) -> TrainState:
    """Returns the specs of a TrainState: parallel.param_specs(), parallel.optimizer_specs(); `step` is replicated."""
    state = _shapes(FrozenConfigDict(config))
    return TrainState(
        step=parallel.REPLICATED,
        params=parallel.param_specs(state.params, config.mesh.layout),
        opt_state=parallel.optimizer_specs(state.opt_state, mesh, config.mesh),
        statistics=parallel.param_specs(state.statistics, config.mesh.layout),
    )


def _initial_state(config: Any) -> TrainState:
    params, statistics = network(config)[1](jax.random.key(config.seed))
    opt_state = make_optimizer(config.optimizer, 0.0).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, statistics)


@lru_cache(1)
def _shapes(config: FrozenConfigDict) -> TrainState:
    """Returns the shapes and dtypes of _initial_state(); the cache saves 1/4 s in a run that compiles five programs."""
    return jax.eval_shape(lambda: _initial_state(config))


def init_state(config: Any, mesh: parallel.Mesh) -> TrainState:
    """Returns the state before the first step, with the same values on every mesh."""
    out_shardings = parallel.shardings(mesh, state_specs(config, mesh))
    # Level 2 halves the compile time of this program, which runs once; the values and the run time are the same.
    options = {'xla_backend_optimization_level': '2'}
    return jax.jit(lambda: _initial_state(config), out_shardings=out_shardings, compiler_options=options)()


def abstract_state(config: Any, mesh: parallel.Mesh) -> TrainState:
    """Returns the shapes, dtypes and shardings of init_state() as a tree of jax.ShapeDtypeStruct."""
    shapes = _shapes(FrozenConfigDict(config))
    shardings = parallel.shardings(mesh, state_specs(config, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _errors(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns top-1 and top-5 errors, (B,) each, 0.0 or 1.0; a tie with the correct class counts against it."""
    right = jnp.take_along_axis(scores, labels[:, None], -1)
    better = jnp.sum(~(scores < right), -1) - 1  # so NaN scores count as errors
    return (better >= 1).astype(jnp.float32), (better >= 5).astype(jnp.float32)


def local_gradients(
    config: Any, graph: Any, parameters: Any, statistics: Any, preprocessing: Any, rows: dict[str, jax.Array]
) -> tuple[Any, jax.Array, Any]:
    """Returns (gradients, sums, statistics) for this device's `rows` of a batch.

    gradients: summed over replicas and micro-batches, they are the gradients of the batch's mean loss.
    sums: (3,), the loss, top-1 error and top-5 error summed over `rows`.
    statistics: updated statistics of batch normalization.
    """
    number, labels, layout = rows['number'], rows['label'], config.mesh.layout
    keys = example_keys(config.seed, number, AUGMENTATION)
    crop_keys = example_keys(config.seed, number // config.data.crop_chunk, AUGMENTATION)
    images = augment(rows['image'], keys, crop_keys, preprocessing, config.data)
    dropout_keys = example_keys(config.seed, parallel.all_gather_example_ids(number, layout), DROPOUT)

    def share_of_loss(params):
        model = nnx.merge(graph, params, statistics)
        logits = model(images, dropout_keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        share = losses.sum() / (config.train.batch_size * parallel.loss_replication_factor(layout))
        return share, (losses, logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    gradients, (losses, logits, new_statistics) = jax.grad(share_of_loss, has_aux=True)(parameters)
    sums = jnp.stack([losses.sum(), *(error.sum() for error in _errors(logits, labels))])
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


def make_train_step(config: Any, mesh: parallel.Mesh) -> Any:
    """Returns the jitted step (state, batch, learning_rates, preprocessing) -> (state, metrics); donates `state`.

    batch: image (B, S, S, C) uint8, label (B,) int32, and number (B,) uint32: the count of images seen before this one.
    learning_rates: float32 scalars by layer and kernel or bias, see optimizer.learning_rates().
    preprocessing: see augment.preprocessing().
    metrics: loss, top1_error and top5_error of the batch under augmentation and dropout, float32 scalars.
    """
    graph, _ = network(config)
    batch_size, layout = config.train.batch_size, config.mesh.layout
    state, everywhere = state_specs(config, mesh), parallel.REPLICATED
    parameters = _shapes(FrozenConfigDict(config)).params
    specs, split = state.params, parallel.optimizer_specs(parameters, mesh, config.mesh)

    def train_step(state, batch, learning_rates, preprocessing):
        own = parallel.mark_device_varying(state.params, specs)
        gradients_of = partial(local_gradients, config, graph, own, state.statistics, preprocessing)
        gradients, sums, statistics = accumulate_gradients(gradients_of, batch, config.train.micro_batches, own)
        gradients = parallel.all_reduce_gradients(gradients, specs, split, config.mesh.gradient_dtype)
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


def make_eval_step(config: Any, mesh: parallel.Mesh, views: int) -> Any:
    """Returns the jitted step (state, batch, preprocessing) -> sums (4,) of loss, top-1 error, top-5 error, images.

    views: 1 (the center crop) or 10 (see augment.view()); the softmax outputs of the views are averaged (section 4.1).
    batch: image (B, S, S, C) uint8 and label (B,) int32; images with label -1 are padding and are not counted.
    """
    layout = config.mesh.layout

    def eval_step(state, batch, preprocessing):
        scores = _log_probabilities(config, state, batch['image'], preprocessing, views)
        counted = batch['label'] >= 0
        labels = jnp.maximum(batch['label'], 0)
        losses = -jnp.take_along_axis(scores, labels[:, None], -1)[:, 0]
        rows = jnp.stack([losses, *_errors(scores, labels), jnp.ones_like(losses)])
        return parallel.global_sum(jnp.where(counted[None], rows, 0.0).sum(-1), layout)

    return parallel.jit_shard_map(
        eval_step,
        mesh,
        in_specs=(state_specs(config, mesh), parallel.batch_spec(layout), parallel.REPLICATED),
        out_specs=parallel.REPLICATED,
    )


def make_layer_stats_fn(config: Any, mesh: parallel.Mesh) -> Any:
    """Returns the jitted step (state, images, preprocessing) -> {layer: float32 (5,)}, cuda-convnet's test-time report.

    The five values are mean |kernel|, mean |velocity of the kernel| (the last update), the same two for the bias, and
    the fraction of dead units (feature maps in a convolution): those that are 0 on the center crops of all `images`
    (B, S, S, C) uint8. The fraction is 0 for fc8.
    """
    graph, layout = network(config)[0], config.mesh.layout

    def layer_report(state, images, preprocessing):
        specs = state_specs(config, mesh)
        model = nnx.merge(graph, state.params, state.statistics)
        outputs = model.activations(view(images, preprocessing, config.data, 0))
        weights = mean_abs(state.params, specs.params)
        updates = mean_abs(state.opt_state[-1].trace, specs.opt_state[-1].trace)
        report = {}
        for name in weights:
            dead = parallel.dead_unit_fraction(outputs[name], name, layout) if name != 'fc8' else jnp.zeros(())
            sizes = [tree[name][kind] for kind in ('kernel', 'bias') for tree in (weights, updates)]
            report[name] = jnp.stack([*sizes, dead])
        return report

    rows = parallel.batch_spec(layout)
    return parallel.jit_shard_map(
        layer_report,
        mesh,
        in_specs=(state_specs(config, mesh), rows, parallel.REPLICATED),
        out_specs=parallel.REPLICATED,
    )


def mean_abs(tree: Any, specs: Any) -> Any:
    """Returns the mean absolute value of each leaf of `tree`, which is sharded according to `specs`."""
    sums = parallel.psum_over_shards(jax.tree.map(lambda leaf: jnp.sum(jnp.abs(leaf)), tree), specs)
    counts = parallel.psum_over_shards(jax.tree.map(lambda leaf: jnp.float32(leaf.size), tree), specs)
    return jax.tree.map(jnp.divide, sums, counts)


def make_predict_step(config: Any, mesh: parallel.Mesh, views: int) -> Any:
    """Returns the jitted step (state, images, preprocessing) -> log probabilities (B, num_classes) float32.

    The probabilities are the mean over `views`, see make_eval_step(). images: (B, S, S, C) uint8.
    """

    def predict_step(state, images, preprocessing):
        scores = _log_probabilities(config, state, images, preprocessing, views)
        return parallel.mark_replicated(scores, config.mesh.layout)

    rows = parallel.batch_spec(config.mesh.layout)
    return parallel.jit_shard_map(
        predict_step, mesh, in_specs=(state_specs(config, mesh), rows, parallel.REPLICATED), out_specs=rows
    )


def make_activation_fn(config: Any, mesh: parallel.Mesh, layer: str) -> Any:
    """Returns the jitted step (state, images, preprocessing) -> float32 output of `layer` for the center crop.

    The output is (B, H, W, C) after the nonlinearity and before normalization and pooling, with the feature maps of the
    first tower first; or (B, units), where fc8 gives logits. images: (B, S, S, C) uint8.
    """
    graph, layout = network(config)[0], config.mesh.layout

    def output_step(state, images, preprocessing):
        model = nnx.merge(graph, state.params, state.statistics)
        return model.activations(view(images, preprocessing, config.data, 0))[layer].astype(jnp.float32)

    rows = parallel.batch_spec(layout)
    return parallel.jit_shard_map(
        output_step,
        mesh,
        in_specs=(state_specs(config, mesh), rows, parallel.REPLICATED),
        out_specs=parallel.activation_spec(layer, 4 if layer.startswith('conv') else 2, layout),
    )


def _log_probabilities(config: Any, state: TrainState, images: Any, preprocessing: Any, views: int) -> jax.Array:
    """Returns the log of the mean softmax output over `views`, (B, num_classes) float32."""
    model = nnx.merge(network(config)[0], state.params, state.statistics)

    def one_view(index):
        return jax.nn.log_softmax(model(view(images, preprocessing, config.data, index)))

    scores = jax.lax.map(one_view, jnp.arange(views))
    return jax.nn.logsumexp(scores, 0) - jnp.log(views)
