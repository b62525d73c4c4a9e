"""The train state, its specs on a mesh, and its initialization."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Key

from alexnet_jax import parallel
from alexnet_jax.config import Config
from alexnet_jax.lr_multipliers import frozen_layers, frozen_parameters
from alexnet_jax.model import AlexNet
from alexnet_jax.optimizer import make_optimizer

Leaf = TypeVar('Leaf')
LayerTree = dict[str, dict[str, Leaf]]  # {layer: {'kernel': ..., 'bias': ...}}
InitParams = Callable[[Key[Array, '']], tuple[LayerTree[Array], LayerTree[Array]]]


@dataclasses.dataclass(frozen=True)
class TrainState(Generic[Leaf]):
    """The state that a train step updates: a tree of arrays, or of their specs, or of their shapes.

    Attributes:
      step: number of steps taken, int32.
      params: parameters, float32.
      opt_state: state of the optimizer: velocities (float32) in the same tree as `params`.
      batch_stats: running means and variances of batch normalization (float32); empty without batch normalization.
      average: exponential moving average of `params` with train.ema_decay, in the same tree; empty without it.
    """

    step: Leaf
    params: LayerTree[Leaf]
    opt_state: optax.OptState
    batch_stats: LayerTree[Leaf]
    average: LayerTree[Leaf] = dataclasses.field(default_factory=dict)

    def for_inference(self) -> 'TrainState[Leaf]':
        """Returns the state whose `params` are the weights for inference: the average if there is one.

        All evaluations, predictions and exports use this state, which has no average of its own.
        """
        return dataclasses.replace(self, params=self.average or self.params, average={})


def _with_keys(state: TrainState[Leaf]) -> tuple[list[tuple[jax.tree_util.GetAttrKey, object]], None]:
    # The names of the leaves in checkpoints; `batch_stats` keeps the name `statistics` of version 0.1.
    children = {
        'step': state.step,
        'params': state.params,
        'opt_state': state.opt_state,
        'statistics': state.batch_stats,
    }
    if state.average:  # checkpoints without an average stay those of earlier versions
        children['average'] = state.average
    return [(jax.tree_util.GetAttrKey(name), child) for name, child in children.items()], None


jax.tree_util.register_pytree_with_keys(TrainState, _with_keys, lambda _, children: TrainState(*children))


def build_model(config: Config) -> tuple[nnx.GraphDef, InitParams]:
    """Returns the GraphDef for nnx.merge(graph, params, batch_stats), and a function key -> (params, batch_stats)."""

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
            frozen=frozen_layers(config),
        )

    def init_params(key):
        _, params, batch_stats = nnx.split(build(key), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)

    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, nnx.BatchStat)[0]
    return graph, init_params


def state_specs(config: Config, mesh: parallel.Mesh) -> TrainState[parallel.Spec]:
    """Returns the specs of a TrainState, from parallel.param_specs() and parallel.optimizer_specs()."""
    state = param_shapes(config)
    return TrainState(
        step=parallel.REPLICATED,
        params=parallel.param_specs(state.params, config.mesh.layout),
        opt_state=parallel.optimizer_specs(state.opt_state, mesh, config.mesh),
        batch_stats=parallel.param_specs(state.batch_stats, config.mesh.layout),
        average=parallel.param_specs(state.average, config.mesh.layout),
    )


def _initial_state(config: Config) -> TrainState[Array]:
    params, batch_stats = build_model(config)[1](jax.random.key(config.seed))
    opt_state = make_optimizer(config.optimizer, config.optimizer.learning_rate).init(params)
    return with_average(TrainState(jnp.zeros((), jnp.int32), params, opt_state, batch_stats), config)


def with_average(state: TrainState[Array], config: Config) -> TrainState[Array]:
    """Returns `state` with an average if train.ema_decay is not 0, and without one otherwise.

    A new average starts as a copy of the parameters. The average of frozen parameters is their value, also if an
    earlier part of the run trained them.
    """
    if not config.train.ema_decay:
        return dataclasses.replace(state, average={})
    if not state.average:
        return dataclasses.replace(state, average=jax.tree.map(jnp.copy, state.params))
    average = {layer: dict(leaves) for layer, leaves in state.average.items()}
    for layer, kind in frozen_parameters(config):
        average[layer][kind] = jnp.copy(state.params[layer][kind])
    return dataclasses.replace(state, average=average)


@lru_cache(1)
def param_shapes(config: Config) -> TrainState[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of _initial_state(); the cache saves 0.25 s in a run with five programs."""
    return jax.eval_shape(lambda: _initial_state(config))


def init_state(config: Config, mesh: parallel.Mesh) -> TrainState[Array]:
    """Returns the state before the first step, with the same values on every mesh."""
    out_shardings = parallel.shardings(mesh, state_specs(config, mesh))
    # Level 2 halves the compile time of this program, which runs once; the values and the run time are the same.
    options = {'xla_backend_optimization_level': '2'}
    return jax.jit(lambda: _initial_state(config), out_shardings=out_shardings, compiler_options=options)()


def abstract_state(config: Config, mesh: parallel.Mesh) -> TrainState[jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of init_state()."""
    shapes = param_shapes(config)
    shardings = parallel.shardings(mesh, state_specs(config, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
