"""Runs the compiled inference steps of a network on any number of images."""

import difflib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree, UInt8

from alexnet_jax import parallel
from alexnet_jax.config import Config, ConfigError
from alexnet_jax.shapes import layer_specs
from alexnet_jax.training.eval_step import make_activation_fn, make_predict_step

if TYPE_CHECKING:
    from alexnet_jax.inference.trained_model import TrainedModel

SMALL_BATCH = 8  # images per batch where less than half of eval.batch_size is left


def predict_log_probabilities(network: 'TrainedModel', images: np.ndarray, views: int) -> np.ndarray:
    """Returns the log probabilities of `images`, float32 (N, classes), see make_predict_step()."""
    return _run(network, _predict_step(network.config, network.mesh, views), images)


def layer_outputs(network: 'TrainedModel', images: np.ndarray, layers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the outputs of `layers` for `images` by name, float32, see make_activation_fn()."""
    return _run(network, _activation_step(network.config, network.mesh, layers), images)


# The same networks and layers use the same compiled programs again.
_predict_step = functools.lru_cache(8)(make_predict_step)


@functools.lru_cache(8)
def _activation_step(config: Config, mesh: parallel.Mesh, layers: tuple[str, ...]) -> Any:
    return make_activation_fn(config, mesh, layers)


def _run(network: 'TrainedModel', step: Any, images: UInt8[np.ndarray, 'n s s c']) -> PyTree[np.ndarray]:
    """Returns the outputs of `step` for all `images`. Zeros pad the batches, so that there are two sizes of batches."""
    small, large = network.batch_size(SMALL_BATCH), network.batch_size(network.config.eval.batch_size)
    preprocessing, outputs = network.preprocessing, []
    for start, size in _batches(len(images), small, large):
        batch = images[start : start + size]
        count = len(batch)
        if count < size:
            batch = np.concatenate([batch, np.zeros((size - count, *batch.shape[1:]), np.uint8)])
        rows = step(network.state, parallel.make_global_batch(network.sharding, batch), preprocessing)
        outputs.append(jax.tree.map(lambda each, count=count: np.asarray(each)[:count], rows))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def _batches(count: int, small: int, large: int) -> Iterator[tuple[int, int]]:
    """Yields the start and the size of each batch of `count` images: `large`, and `small` if less than half is left."""
    start = 0
    while start < count:
        size = large if 2 * (count - start) >= large else small
        yield start, size
        start += size


def check_layers(layers: object, config: Config) -> tuple[str, ...]:
    """Returns `layers`, one name or several. Raises ConfigError: a layer is unknown, or there is none."""
    known = [spec.name for spec in layer_specs(config.model)]
    names = (layers,) if isinstance(layers, str) else tuple(layers) if isinstance(layers, Sequence) else ()
    if not names:
        raise ConfigError(f'layers: {layers!r}: give at least one of {", ".join(known)}')
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.0)[0]
            raise ConfigError(
                f'layers: {name!r} is not a layer of this network, which has {", ".join(known)};'
                f' the nearest is {near!r}'
            )
    return tuple(dict.fromkeys(names))
