"""The compiled steps without an update: evaluation, prediction, activations and layer statistics.

Evaluation, prediction and activations take the state TrainState.for_inference().
"""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32, PyTree, UInt8

from alexnet_jax import parallel
from alexnet_jax.augment import PreprocessParams, eval_crop
from alexnet_jax.config import Config
from alexnet_jax.lr_multipliers import frozen_parameters
from alexnet_jax.training.state import TrainState, build_model, state_specs

Images = UInt8[Array, 'b s s c']


class EvalBatch(TypedDict):
    """A validation batch on the devices; images with label -1 are padding."""

    image: Images
    label: Int32[Array, ' b']


EvalStep = parallel.JittedFunction[[TrainState, EvalBatch, PreprocessParams], Float32[Array, '4']]
LayerStatsFn = parallel.JittedFunction[[TrainState, Images, PreprocessParams], dict[str, Float32[Array, '5']]]
PredictStep = parallel.JittedFunction[[TrainState, Images, PreprocessParams], Float32[Array, 'b classes']]
ActivationFn = parallel.JittedFunction[[TrainState, Images, PreprocessParams], Any]  # see make_activation_fn()


def topk_errors(
    scores: Float32[Array, 'b classes'], labels: Int32[Array, ' b']
) -> tuple[Float32[Array, ' b'], Float32[Array, ' b']]:
    """Returns top-1 and top-5 errors, 0.0 or 1.0; a class that ties with the correct class ranks above it."""
    right = jnp.take_along_axis(scores, labels[:, None], -1)
    better = jnp.sum(~(scores < right), -1) - 1  # so NaN scores count as errors
    return (better >= 1).astype(jnp.float32), (better >= 5).astype(jnp.float32)


def make_eval_step(config: Config, mesh: parallel.Mesh, views: int) -> EvalStep:
    """Returns the jitted step (state, batch, preprocessing) -> sums of loss, top-1 error, top-5 error, images.

    The softmax outputs are averaged over 1 view (the center crop) or 10 (see augment.eval_crop(); section 4.1).
    Images with label -1 are padding and are not counted.
    """
    layout = config.mesh.layout

    def eval_step(state, batch, preprocessing):
        scores = _log_probabilities(config, state, batch['image'], preprocessing, views)
        counted = batch['label'] >= 0
        labels = jnp.maximum(batch['label'], 0)
        losses = -jnp.take_along_axis(scores, labels[:, None], -1)[:, 0]
        rows = jnp.stack([losses, *topk_errors(scores, labels), jnp.ones_like(losses)])
        return parallel.global_sum(jnp.where(counted[None], rows, 0.0).sum(-1), layout)

    return parallel.jit_shard_map(
        eval_step,
        mesh,
        in_specs=(state_specs(config, mesh).for_inference(), parallel.batch_spec(layout), parallel.REPLICATED),
        out_specs=parallel.REPLICATED,
    )


def make_layer_stats_fn(config: Config, mesh: parallel.Mesh) -> LayerStatsFn:
    """Returns the jitted step (state, images, preprocessing) -> five values per layer, as cuda-convnet reports them.

    The values are the mean absolute kernel and the mean absolute velocity of the kernel (the last update), the same two
    for the bias, and the fraction of dead units (in convolutions, feature maps), which are 0 for the center crops of
    all `images`. The fraction is 0 for fc8.
    """
    graph, layout = build_model(config)[0], config.mesh.layout

    def layer_stats(state, images, preprocessing):
        specs = state_specs(config, mesh)
        model = nnx.merge(graph, state.params, state.batch_stats)
        outputs = model.activations(eval_crop(images, preprocessing, config.data, 0))
        weights = mean_abs(state.params, specs.params)
        updates = mean_abs(state.opt_state[-1].trace, specs.opt_state[-1].trace)
        for layer, kind in frozen_parameters(config):
            updates[layer][kind] = jnp.zeros(())  # the velocity may be that of the time before the parameter was frozen
        stats = {}
        for name in weights:
            dead = parallel.dead_unit_fraction(outputs[name], name, layout) if name != 'fc8' else jnp.zeros(())
            sizes = [tree[name][kind] for kind in ('kernel', 'bias') for tree in (weights, updates)]
            stats[name] = jnp.stack([*sizes, dead])
        return stats

    rows = parallel.batch_spec(layout)
    return parallel.jit_shard_map(
        layer_stats,
        mesh,
        in_specs=(state_specs(config, mesh), rows, parallel.REPLICATED),
        out_specs=parallel.REPLICATED,
    )


def mean_abs(tree: PyTree[Array], specs: PyTree[parallel.Spec]) -> PyTree[Float32[Array, '']]:
    """Returns the mean absolute value of each leaf of `tree`, which is sharded according to `specs`."""
    sums = parallel.psum_over_shards(jax.tree.map(lambda leaf: jnp.sum(jnp.abs(leaf)), tree), specs)
    counts = parallel.psum_over_shards(jax.tree.map(lambda leaf: jnp.float32(leaf.size), tree), specs)
    return jax.tree.map(jnp.divide, sums, counts)


def make_predict_step(
    config: Config, mesh: parallel.Mesh, views: int, ranked: Bool[np.ndarray, ' classes'] | None = None
) -> PredictStep:
    """Returns the jitted step (state, images, preprocessing) -> log probabilities.

    The probabilities are the mean over `views`, see make_eval_step(). If `ranked` is given, the softmax of each view is
    over the logits of the classes with the value True, and the probabilities of the other classes are 0.
    """

    def predict_step(state, images, preprocessing):
        scores = _log_probabilities(config, state, images, preprocessing, views, ranked)
        return parallel.mark_replicated(scores, config.mesh.layout)

    rows = parallel.batch_spec(config.mesh.layout)
    return parallel.jit_shard_map(
        predict_step,
        mesh,
        in_specs=(state_specs(config, mesh).for_inference(), rows, parallel.REPLICATED),
        out_specs=rows,
    )


def make_activation_fn(config: Config, mesh: parallel.Mesh, layers: str | tuple[str, ...]) -> ActivationFn:
    """Returns the jitted step (state, images, preprocessing) -> outputs of `layers` for the center crop.

    The output of a layer is (B, H, W, C), with the feature maps of the first tower first, or (B, units); fc8 returns
    the logits. See AlexNet.activations(). The result for one name is the output of that layer, and for a tuple of names
    the outputs by name, from one forward pass.
    """
    graph, layout = build_model(config)[0], config.mesh.layout
    names = (layers,) if isinstance(layers, str) else layers

    def activation_step(state, images, preprocessing):
        model = nnx.merge(graph, state.params, state.batch_stats)
        every = model.activations(eval_crop(images, preprocessing, config.data, 0))
        outputs = {name: every[name].astype(jnp.float32) for name in names}
        return outputs[layers] if isinstance(layers, str) else outputs

    rows = parallel.batch_spec(layout)
    specs = {name: parallel.activation_spec(name, 4 if name.startswith('conv') else 2, layout) for name in names}
    return parallel.jit_shard_map(
        activation_step,
        mesh,
        in_specs=(state_specs(config, mesh).for_inference(), rows, parallel.REPLICATED),
        out_specs=specs[layers] if isinstance(layers, str) else specs,
    )


def _log_probabilities(
    config: Config,
    state: TrainState,
    images: Images,
    preprocessing: PreprocessParams,
    views: int,
    ranked: Bool[np.ndarray, ' classes'] | None = None,
) -> Float32[Array, 'b classes']:
    """Returns the log of the mean softmax output over `views`, of the classes in `ranked` if it is not None."""
    model = nnx.merge(build_model(config)[0], state.params, state.batch_stats)

    def one_view(index):
        logits = model(eval_crop(images, preprocessing, config.data, index))
        return jax.nn.log_softmax(logits if ranked is None else jnp.where(ranked[None], logits, -jnp.inf))

    scores = jax.lax.map(one_view, jnp.arange(views))
    return jax.nn.logsumexp(scores, 0) - jnp.log(views)
