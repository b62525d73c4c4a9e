"""Features of a whole training set, and the nearest training images of the right half of the paper's figure 4.

The features of an image are the outputs of the last hidden layer (fc7, 4096 numbers, section 6.1) for the center crop;
the distance is Euclidean. The features are computed once and stored on disk in the run's folder; a killed computation
resumes at the last saved batch. Memory holds one batch of images or one block of features at a time.
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int64, UInt8

from alexnet_jax import parallel
from alexnet_jax.config import Config, ConfigError
from alexnet_jax.data import loader
from alexnet_jax.data.dataset import PreparedDataset
from alexnet_jax.inference.trained_model import TrainedModel
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.runtime.files import read_json, write_json
from alexnet_jax.shapes import LayerShape, layer_table
from alexnet_jax.training.eval_step import make_activation_fn

BLOCK = 4096  # rows of features on a device at a time
SAVE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class FeatureIndex:
    """The features of the training images.

    Attributes:
      features: memory map of a file, in the order of the data set; NaN for corrupt records.
      layer: name of the layer whose outputs are the features.
    """

    features: Float32[np.ndarray, 'n units']
    layer: str


def hidden_layer(config: Config) -> LayerShape:
    """Returns the last layer before the logits: fc7 in AlexNet."""
    return layer_table(config.model, config.data.crop_size, config.data.channels)[-2]


def build_or_load_index(model: TrainedModel, prepared: PreparedDataset) -> FeatureIndex:
    """Returns the features of all training images, after the computation of missing features.

    The folder is WORKDIR/features/LAYER_WEIGHTS_DATASET/, where WEIGHTS and DATASET are the first 16 digits of
    `model.digest` and of `prepared.fingerprint`.

    Raises:
      ConfigError: the files cannot be written or read or do not fit on the disk, or another process is computing them.
      DatasetError: too many records of the data set are corrupt.
    """
    hidden, images = hidden_layer(model.config), len(prepared.train)
    layer, units = hidden.name, math.prod(hidden.output)
    root = os.path.join(model.workdir, 'features')
    folder = os.path.join(root, f'{layer}_{model.digest[:16]}_{prepared.fingerprint[:16]}')
    path, state = os.path.join(folder, 'features.npy'), os.path.join(folder, 'state.json')
    shape = (images, units)
    if (read_json(state) or {}).get('done') == images:
        return FeatureIndex(_read(path, shape, 'r'), layer)
    others = {*os.listdir(root)} - {os.path.basename(folder)} if os.path.isdir(root) else set()
    if others:
        log(f'{root}: {", ".join(sorted(others))} belong to other weights or images and may be removed')
    with _exclusive_lock(folder):
        _compute(model, prepared, layer, path, state, shape)
    return FeatureIndex(_read(path, shape, 'r'), layer)


def _compute(
    model: TrainedModel, prepared: PreparedDataset, layer: str, path: str, state: str, shape: tuple[int, int]
) -> None:
    """Writes the missing features to the file `path`, and the number of finished images to the JSON file `state`."""
    images, units = shape
    done = (read_json(state) or {}).get('done', 0)
    if not isinstance(done, int) or not 0 <= done <= images:
        done = 0  # the file is corrupt
    features = _read(path, shape, 'r+') if done else _new(path, shape)
    batch_size = model.batch_size(images)
    output_step = make_activation_fn(model.config, model.mesh, layer)
    preprocessing, corrupt = model.preprocessing, np.full(units, np.nan, np.float32)
    first_batch = done // batch_size
    progress = ProgressBar(f'features of {layer}', images, 'images', done=first_batch * batch_size)
    batches = loader.validation_batches(
        prepared.train, batch_size=batch_size, threads=model.config.data.reader_threads, first_batch=first_batch
    )
    saved = time.monotonic()
    for number, batch in enumerate(batches, first_batch):
        rows = parallel.make_global_batch(model.sharding, batch['image'])
        found = np.asarray(output_step(model.state, rows, preprocessing)).reshape(batch_size, units)
        start, stop = number * batch_size, min((number + 1) * batch_size, images)
        features[start:stop] = np.where(batch['label'][:, None] >= 0, found, corrupt)[: stop - start]
        progress.update(stop - start)
        if stop == images or time.monotonic() - saved > SAVE_SECONDS:
            features.flush()
            write_json(state, {'done': stop})
            saved = time.monotonic()
    progress.close()


@contextlib.contextmanager
def _exclusive_lock(folder: str) -> Iterator[None]:
    """Creates `folder` and holds an exclusive lock on it.

    Raises ConfigError: the folder cannot be written, or another process holds the lock.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, 'lock'), 'w')  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f'{folder} cannot be written ({error.strerror}); the features are stored there') from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f'{folder}: another process is computing these features; wait for it') from None
        yield


def _new(path: str, shape: tuple[int, int]) -> np.memmap:
    needed, free = 4 * shape[0] * shape[1], shutil.disk_usage(os.path.dirname(path)).free
    if needed > free:
        raise ConfigError(
            f'{path}: {needed / 1e9:.1f} GB of features, and {free / 1e9:.1f} GB are free; free some space'
        )
    return np.lib.format.open_memmap(path, 'w+', np.float32, shape)


def _read(path: str, shape: tuple[int, int], mode: Literal['r', 'r+']) -> np.memmap:
    """Returns the file as a memory map. Raises ConfigError: the file is unreadable or has another shape."""
    try:
        features = np.load(path, mmap_mode=mode)
        if features.shape != shape:
            raise ValueError(f'its shape is {features.shape}, not {shape}')
        return features
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path} is unusable ({error}); remove {os.path.dirname(path)} to compute it again') from None


def extract_features(
    model: TrainedModel, index: FeatureIndex, images: Sequence[UInt8[np.ndarray, 's s c']]
) -> Float32[np.ndarray, 'q units']:
    """Returns the features of `images`.

    The batch size is that of the index, so that a training image is at a distance of exactly 0 from itself.
    """
    output_step = make_activation_fn(model.config, model.mesh, index.layer)
    rows = model.predict_batches(output_step, images, model.batch_size(len(index.features)))
    return np.stack([row.reshape(-1) for row in rows])


@jax.jit
def _distances(block: Float32[Array, 'n units'], query: Float32[Array, ' units']) -> Float32[Array, ' n']:
    """Returns the Euclidean distances. Unlike |a|^2 - 2ab + |b|^2, this formula gives exactly 0 for equal rows."""
    return jnp.sqrt(jnp.sum(jnp.square(block - query[None]), -1))


def nearest_neighbors(
    index: FeatureIndex, queries: Float32[np.ndarray, 'q units'], count: int
) -> tuple[Int64[np.ndarray, 'q count'], Float32[np.ndarray, 'q count']]:
    """Returns the row numbers and distances of the `count` features nearest to each query, nearest first.

    Equal distances are in row order. Corrupt records come last, with an infinite distance.
    """
    blocks: list[list[np.ndarray]] = [[] for _ in queries]
    for start in range(0, len(index.features), BLOCK):
        block = jnp.asarray(index.features[start : start + BLOCK])
        for query, of_query in zip(queries, blocks, strict=True):
            of_query.append(np.asarray(_distances(block, query)))
    distances = np.stack([np.concatenate(of_query) for of_query in blocks])
    distances = np.where(np.isnan(distances), np.inf, distances)
    order = np.argsort(distances, -1, kind='stable')[:, :count]
    return order, np.take_along_axis(distances, order, -1)
