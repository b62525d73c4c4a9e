"""Runs the compiled inference steps of a network on any number of pictures."""

import difflib
import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree
from PIL import Image

from alexnet_jax import parallel
from alexnet_jax.config import Config, ConfigError
from alexnet_jax.inference.pictures import prepare_picture
from alexnet_jax.shapes import layer_specs
from alexnet_jax.training.eval_step import make_activation_fn, make_predict_step

if TYPE_CHECKING:
    from alexnet_jax.inference.trained_model import TrainedModel

SMALL_BATCH = 8  # images per batch where less than half of eval.batch_size is left
Pictures = Sequence[str | Image.Image | np.ndarray]  # see list_pictures()


def predict_log_probabilities(network: 'TrainedModel', pictures: Pictures, views: int) -> np.ndarray:
    """Returns the log probabilities of `pictures`, float32 (N, classes), see make_predict_step()."""
    return _run(network, _predict_step(network.config, network.mesh, views), pictures)


def layer_outputs(network: 'TrainedModel', pictures: Pictures, layers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the outputs of `layers` for `pictures` by name, float32, see make_activation_fn()."""
    outputs = _run(network, _activation_step(network.config, network.mesh, tuple(sorted(layers))), pictures)
    return {layer: outputs[layer] for layer in layers}


# The same networks and layers use the same compiled programs again.
_predict_step = functools.lru_cache(8)(make_predict_step)


@functools.lru_cache(8)
def _activation_step(config: Config, mesh: parallel.Mesh, layers: tuple[str, ...]) -> Any:
    return make_activation_fn(config, mesh, layers)


def _run(network: 'TrainedModel', step: Any, pictures: Pictures) -> PyTree[np.ndarray]:
    """Returns the outputs of `step` for all `pictures`, of which one batch at a time is read and prepared.

    Zeros pad the batches, so that there are two sizes of batches.

    Raises UnreadableImage: see prepare_picture().
    """
    small, large = network.batch_size(SMALL_BATCH), network.batch_size(network.config.eval.batch_size)
    data, preprocessing, outputs = network.config.data, network.preprocessing, []
    for start, size in _batches(len(pictures), small, large):
        part = pictures[start : start + size]
        batch = np.zeros((size, data.image_size, data.image_size, data.channels), np.uint8)
        for row, picture in enumerate(part):
            batch[row] = prepare_picture(picture, start + row, data)
        rows = step(network.state, parallel.make_global_batch(network.sharding, batch), preprocessing)
        count = len(part)
        outputs.append(jax.tree.map(lambda each, count=count: np.asarray(each)[:count], rows))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def _batches(count: int, small: int, large: int) -> Iterator[tuple[int, int]]:
    """Yields the start and the size of each batch of `count` images: `large`, and `small` if less than half is left."""
    start = 0
    while start < count:
        size = large if 2 * (count - start) >= large else small
        yield start, size
        start += size


def as_integer(value: object) -> int | None:
    """Returns `value` as an int if it is an integer of Python or NumPy and not a bool, otherwise None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_layers(layers: object, config: Config) -> tuple[str, ...]:
    """Returns `layers`, one name or several. Raises ConfigError: a layer is unknown, or there is none."""
    known = [spec.name for spec in layer_specs(config.model)]
    is_several = isinstance(layers, Iterable) and not isinstance(layers, str | bytes)
    names: tuple[str, ...] = tuple(layers) if is_several else (layers,)  # type: ignore[arg-type,assignment]
    if not names:
        raise ConfigError(f'layers: {layers!r}: give at least one of {", ".join(known)}')
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name).lower(), known, 1, 0.0)[0]
            raise ConfigError(
                f'layers: {name!r} is not a layer of this network, which has {", ".join(known)};'
                f' the nearest is {near!r}'
            )
    return tuple(dict.fromkeys(names))
