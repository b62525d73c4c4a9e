"""The state before the first step of a run that starts from the weights of train.init."""

import dataclasses
import hashlib

import jax
import numpy as np
from jaxtyping import Array

from alexnet_jax import parallel
from alexnet_jax.config import Config, ConfigError
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef, with_overrides
from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.workdir import (
    CheckpointError,
    read_dataset_statistics,
    resolve_written,
    statistics_belong_to,
    with_settings_of_weights,
)
from alexnet_jax.training.checkpoint_reader import resolve_step, restore
from alexnet_jax.training.init_source import describe_fit, misfits, open_source, order_of_classes, read_file
from alexnet_jax.training.state import TrainState, abstract_state, init_state, with_average
from alexnet_jax.weights.weight_files import NetworkWeights
from alexnet_jax.weights.weight_layouts import Parameters


def read_initial_weights(init: str) -> NetworkWeights:
    """Returns the weights that `init`, the value of train.init, names: of a run, a file or a folder. Collective.

    Raises ConfigError on all processes: the weights cannot be read, or differ between the processes.
    """
    weights: NetworkWeights | None = None
    problem = ''
    source: str | CheckpointRef = ''
    try:
        source = open_source(init)
        if isinstance(source, str):
            weights = read_file(source)
        else:
            resolve_step(source)
    except (ConfigError, CheckpointError) as error:
        problem = str(error)
    problem = distributed.first_error_on_any_process(problem)
    if not problem and not isinstance(source, str):
        try:
            weights = _read_run(source)  # a collective, which all processes reach
        except (ConfigError, CheckpointError) as error:
            problem = str(error)
        problem = distributed.first_error_on_any_process(problem)
    read_file.cache_clear()
    if problem or weights is None:
        raise ConfigError(problem if problem.startswith('config.') else f'config.train.init: {problem}')
    distributed.assert_equal_across_processes({'the weights of config.train.init': _digest(weights)})
    return weights


def _read_run(ref: CheckpointRef) -> NetworkWeights:
    """Returns the weights of a checkpoint, which each process restores on one of its devices. Collective.

    Raises ConfigError or CheckpointError: the checkpoint or dataset_statistics.npz cannot be read.
    """
    config = with_overrides(ref.config, {'mesh.layout': 'data', 'mesh.data': 1, 'mesh.model': 1})
    restored = restore(ref, abstract_state(config, parallel.local_mesh()))
    assert restored.state is not None
    if restored.config is not None:
        config = with_settings_of_weights(ref.config, resolve_written(restored.config), ref.name)
    statistics, class_names = read_dataset_statistics(ref.workdir, config)
    if not statistics_belong_to(ref.workdir, statistics, restored.run_state.statistics_digest):
        raise ConfigError(f'{ref.name}: dataset_statistics.npz is of another run; copy that of this run again')
    state = restored.state.for_inference()
    params, batch_stats = jax.device_get((state.params, state.batch_stats))
    return NetworkWeights(config, params, batch_stats, statistics, class_names)


def _digest(weights: NetworkWeights) -> str:
    digest = hashlib.sha256()
    for array in jax.tree.leaves((weights.params, weights.batch_stats, weights.statistics)):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def init_state_from(
    weights: NetworkWeights, config: Config, mesh: parallel.Mesh, class_names: list[str]
) -> TrainState[Array]:
    """Returns the state before the first step, with the layers of `weights` that fit the network of `config`.

    The other layers have the values of init_state(), and the velocities are 0. The log says which layers are taken. The
    values are the same on every mesh.

    Args:
      weights: the weights.
      config: the resolved configuration of the run.
      mesh: the mesh of the run.
      class_names: the class names of the data, one per label.
    """
    taken, init = fitting_layers(weights, config, class_names), config.train.init
    names = [name for name in taken if not name.endswith('_norm')]
    log(f'{init}: the weights of {", ".join(names)} are taken' if names else f'{init}: no weights are taken')
    state = init_state(config, mesh)

    def place(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> Array:
        value = taken.get(path[0].key, {}).get(path[1].key)
        if value is None:
            return leaf
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    params, batch_stats = (jax.tree_util.tree_map_with_path(place, each) for each in (state.params, state.batch_stats))
    return with_average(dataclasses.replace(state, params=params, batch_stats=batch_stats, average={}), config)


def fitting_layers(weights: NetworkWeights, config: Config, class_names: list[str]) -> Parameters:
    """Returns the arrays of `weights` that a network of `config` for `class_names` takes; logs what it does not take.

    The result has the kernels and biases by layer, and the statistics of batch normalization, such as conv1_norm. For
    fc8 see order_of_classes().
    """
    for line in describe_fit(weights, config, class_names):
        log(line)
    unfit = misfits(weights.config, config)
    taken = {name: layer for name, layer in weights.params.items() if name not in unfit}
    taken |= {name: norm for name, norm in weights.batch_stats.items() if name.removesuffix('_norm') in taken}
    if 'fc8' in taken:
        order = order_of_classes(weights.class_names, class_names)[0]
        if order is None:
            del taken['fc8']
        else:
            taken['fc8'] = {kind: array[..., order] for kind, array in taken['fc8'].items()}
    return taken
