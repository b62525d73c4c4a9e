"""One training step and one evaluation step as device code: augment, model, loss, update, metrics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from alexnet_jax import parallel
from alexnet_jax.augment import augment, example_keys, view
from alexnet_jax.model import AlexNet
from alexnet_jax.optimizer import make_optimizer

AUGMENTATION, DROPOUT = 1, 2  # purposes of random keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: parameters and velocities (float32, same tree) and the number of steps taken (int32)."""

    step: Any
    params: Any
    opt_state: Any


def _network(config: Any) -> tuple[Any, Callable]:
    """The module's definition without its parameters, and a function of a key that makes those."""

    def build(key):
        data, rngs = config.data, nnx.Rngs(params=key)
        return AlexNet(config.model, crop_size=data.crop_size, channels=data.channels, rngs=rngs)

    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))[0]
    return graph, lambda key: nnx.to_pure_dict(nnx.state(build(key), nnx.Param))


def state_specs(config: Any, mesh: parallel.Mesh) -> TrainState:
    """How a TrainState lies on the mesh: see parallel.parameter_specs() and update_specs(); the step everywhere."""
    state = jax.eval_shape(lambda: _initial_state(config))
    return TrainState(
        step=parallel.EVERYWHERE,
        params=parallel.parameter_specs(state.params, config.mesh.layout),
        opt_state=parallel.update_specs(state.opt_state, mesh, config.mesh),
    )


def _initial_state(config: Any) -> TrainState:
    params = _network(config)[1](jax.random.key(config.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config.optimizer, 0.0).init(params))


def init_state(config: Any, mesh: parallel.Mesh) -> TrainState:
    """The state before the first step; the same numbers on every mesh."""
    out_shardings = parallel.shardings(mesh, state_specs(config, mesh))
    # Level 1 compiles in a fifth of the time and gives the same numbers, which are drawn only once.
    options = {'xla_backend_optimization_level': '1'}
    return jax.jit(lambda: _initial_state(config), out_shardings=out_shardings, compiler_options=options)()


def abstract_state(config: Any, mesh: parallel.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of init_state(), without its numbers."""
    shapes = jax.eval_shape(lambda: _initial_state(config))
    shardings = parallel.shardings(mesh, state_specs(config, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _errors(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Top-1 and top-5 errors (B,) as 0.0 or 1.0: how many classes score at least as well as the right one."""
    right = jnp.take_along_axis(scores, labels[:, None], -1)
    better = jnp.sum(~(scores < right), -1) - 1  # a score that is not a number counts as an error
    return (better >= 1).astype(jnp.float32), (better >= 5).astype(jnp.float32)


def make_train_step(config: Any, mesh: parallel.Mesh) -> Any:
    """The compiled step (state, batch, learning_rate, preprocessing) -> (state, metrics); `state` is donated.

    batch: image (B, S, S, C) uint8, label (B,) int32 and number (B,) uint32, the count of images seen before it.
    learning_rate: float32 scalar. preprocessing: see augment.preprocessing().
    metrics: loss, top1_error and top5_error of the batch under augmentation and dropout, float32 scalars.
    """
    graph, build = _network(config)
    batch_size, layout = config.train.batch_size, config.mesh.layout
    parameters = jax.eval_shape(build, jax.random.key(0))
    specs, split = parallel.parameter_specs(parameters, layout), parallel.update_specs(parameters, mesh, config.mesh)

    def train_step(state, batch, learning_rate, preprocessing):
        number, labels = batch['number'], batch['label']
        keys = example_keys(config.seed, number, AUGMENTATION)
        window_keys = example_keys(config.seed, number // config.data.crop_chunk, AUGMENTATION)
        images = augment(batch['image'], keys, window_keys, preprocessing, config.data)
        dropout_keys = example_keys(config.seed, parallel.dense_examples(number, layout), DROPOUT)

        def share_of_loss(params):
            logits = nnx.merge(graph, params)(images, dropout_keys)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.sum() / (batch_size * parallel.copies_of_loss(layout)), (losses, logits)

        own = parallel.own_copies(state.params, specs)
        gradients, (losses, logits) = jax.grad(share_of_loss, has_aux=True)(own)
        gradients = parallel.sum_gradients(gradients, specs, split, config.mesh.gradient_dtype)
        optimizer = make_optimizer(config.optimizer, learning_rate)
        weights = parallel.own_shares(state.params, split)
        updates, opt_state = optimizer.update(gradients, state.opt_state, weights)
        params = parallel.gather_shares(optax.apply_updates(weights, updates), split)
        sums = jnp.stack([losses.sum(), *(error.sum() for error in _errors(logits, labels))])
        means = parallel.sum_over_examples(sums, layout) / batch_size
        metrics = {'loss': means[0], 'top1_error': means[1], 'top5_error': means[2]}
        return TrainState(state.step + 1, params, opt_state), metrics

    state, everywhere = state_specs(config, mesh), parallel.EVERYWHERE
    return parallel.compile_on_mesh(
        train_step,
        mesh,
        in_specs=(state, parallel.batch_spec(layout), everywhere, everywhere),
        out_specs=(state, everywhere),
        donate_argnums=(0,),
    )


def make_eval_step(config: Any, mesh: parallel.Mesh, views: int) -> Any:
    """The compiled evaluation (params, batch, preprocessing) -> sums (4,): loss, top-1 and top-5 errors, images.

    views: 1, the centre, or 10 (see augment.view), whose softmax outputs are averaged (section 4.1).
    batch: image (B, S, S, C) uint8 and label (B,) int32; images labelled -1 are padding and not counted.
    """
    graph, layout = _network(config)[0], config.mesh.layout

    def eval_step(params, batch, preprocessing):
        model = nnx.merge(graph, params)

        def log_probabilities(index):
            return jax.nn.log_softmax(model(view(batch['image'], preprocessing, config.data.crop_size, index)))

        scores = jax.lax.map(log_probabilities, jnp.arange(views))
        scores = jax.nn.logsumexp(scores, 0) - jnp.log(views)
        counted = batch['label'] >= 0
        labels = jnp.maximum(batch['label'], 0)
        losses = -jnp.take_along_axis(scores, labels[:, None], -1)[:, 0]
        rows = jnp.stack([losses, *_errors(scores, labels), jnp.ones_like(losses)])
        return parallel.sum_over_examples(jnp.where(counted[None], rows, 0.0).sum(-1), layout)

    return parallel.compile_on_mesh(
        eval_step,
        mesh,
        in_specs=(state_specs(config, mesh).params, parallel.batch_spec(layout), parallel.EVERYWHERE),
        out_specs=parallel.EVERYWHERE,
    )
