"""Prepared stores, and input pipelines that read batches from a store with Grain, without TensorFlow.

The order of the images is a pure function of the seed and the position in the sequence, for any number of processes.
The complete state of an input pipeline is therefore the number of steps.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import simplejpeg
from etils import epath

from alexnet_jax.config import ConfigError
from alexnet_jax.monitor import log_error

Batch = dict[str, np.ndarray]
SETTINGS = ('source', 'image_size', 'channels', 'encoding', 'validation_fraction', 'class_names')
DESCRIPTION = (
    'prepared.json'  # file in a store: settings, source fingerprint, image counts, and sizes of the store's files
)
KEPT = 1 << 28  # maximum bytes of images of a split that is cached in memory


class DatasetError(RuntimeError):
    """Raised if data could not be prepared or are corrupt. The message is one line with the cause and the remedy."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A prepared data set, written by `prepare`.

    Attributes:
      train, validation: see Split.
      statistics: statistics of the training images, see shards.statistics().
      class_names: one name per label.
      fingerprint: sha256 of settings, source fingerprint, image counts and file sizes.
    """

    train: Any
    validation: Any
    statistics: dict[str, np.ndarray]
    class_names: list[str]
    fingerprint: str


class Split:
    """Random access to {'image': (S, S, C) uint8, 'label': int32}, or None for a record that is corrupt on disk.

    Every record has a checksum. A corrupt record is logged and counted once. A split of at most 256 MiB caches images
    in memory after the first read, because reading is most of the cost of a batch.

    Args:
      records: random access to serialized tf.train.Examples.
      shape: (S, S, C).
      encoding: encoding of the image in a record, 'raw' or 'jpeg'.
      name: name in messages.
      max_bad: maximum fraction of corrupt records; beyond it, access to a record raises DatasetError.
    """

    def __init__(self, records: Any, shape: tuple[int, ...], encoding: str, name: str, max_bad: float):
        from tensorflow_datasets.proto import tf_example_pb2

        # Parses the protobuf directly: the further steps of TFDS take twice as long as parsing, with the GIL held.
        self.parse = tf_example_pb2.Example.FromString
        self.records, self.shape, self.encoding, self.name, self.max_bad = records, shape, encoding, name, max_bad
        self.keeps = len(records) * math.prod(shape) <= KEPT
        self.kept = np.zeros(len(records), bool)
        self.images = np.empty((len(records) if self.keeps else 0, *shape), np.uint8)
        self.labels = np.empty(len(records), np.int32)
        self.damaged: set[int] = set()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def damage(self) -> np.ndarray:
        """Returns a mask (N,) bool of the records that this process found corrupt."""
        found = np.zeros(len(self), bool)
        found[list(self.damaged)] = True
        return found

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.kept[index]:
            return {'image': self.images[index], 'label': self.labels[index]}
        if index in self.damaged:
            return None
        try:
            features = self.parse(self.records[index]).features.feature
            content = features['image'].bytes_list.value[0]
            if self.encoding == 'raw':
                image = np.frombuffer(content, np.uint8).reshape(self.shape)
            else:
                image = simplejpeg.decode_jpeg(content, 'GRAY' if self.shape[-1] == 1 else 'RGB')
            example = {'image': image, 'label': np.int32(features['label'].int64_list.value[0])}
            if self.keeps:
                self.images[index], self.labels[index] = image, example['label']
                self.kept[index] = True
        except MemoryError:
            raise
        except Exception as error:  # ArrayRecord, protobuf and the decoder raise different types
            self._count(index, error)
            return None
        return example

    def from_memory(self, indices: np.ndarray) -> Batch | None:
        """Returns the cached images and labels at `indices` (B,), or None if some are not cached.

        The cost is a fourth of the cost of single accesses.
        """
        if not self.kept[indices].all():
            return None
        images = _empty((len(indices), *self.shape))
        np.take(self.images, indices, 0, out=images, mode='clip')  # other modes are slower with `out`
        return {'image': images, 'label': self.labels[indices]}

    def _count(self, index: int, error: Exception) -> None:
        with self.lock:
            if index in self.damaged:
                return
            self.damaged.add(index)
        what = (str(error).splitlines() or [type(error).__name__])[0][:200]
        log_error(f'record {index} of {self.name} is damaged and left out: {what}')
        if len(self.damaged) > self.max_bad * len(self):
            raise DatasetError(
                f'{len(self.damaged)} of {len(self)} records of {self.name} are damaged, more than data.max_bad='
                f'{self.max_bad:g} allows: copy the store again or remove it, and it will be made anew'
            ) from None


def dataset_dir(data_dir: str, settings: Any) -> str:
    """Returns the path of the prepared store. `settings` is `data` of a configuration or prepare.Settings."""
    root = data_dir if '://' in data_dir else os.path.abspath(os.path.expanduser(data_dir))
    name = re.sub(r'\W+', '_', settings.source.removeprefix('tfds:')).strip('_')
    kind = '_grey' * (settings.channels == 1) + '_jpeg' * (settings.encoding == 'jpeg')
    return os.path.join(root, 'prepared', f'{name}_{settings.image_size}px{kind}')


def describe(directory: str, settings: Any) -> dict[str, Any]:
    """Returns the settings, fingerprint, image counts and file sizes of the store in `directory`.

    Raises ConfigError: `directory` is no complete store, or the store has other settings than `settings`.
    """
    try:
        made = json.loads((epath.Path(directory) / DESCRIPTION).read_text())
        made = {name: made[name] for name in ('fingerprint', 'images', 'files', *SETTINGS)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'config.data.data_dir: {directory} is no whole store, or of an older version ({error}); remove it, and it'
            ' will be made again'
        ) from None
    for name in SETTINGS:
        wanted = list(settings.class_names or made[name]) if name == 'class_names' else getattr(settings, name)
        if made[name] not in (wanted, None):
            raise ConfigError(
                f'config.data.{name}: {wanted!r}, but {directory} was prepared with {made[name]!r}: give that, remove'
                ' the folder, or name another data_dir'
            )
    return made


def open_store(directory: str, settings: Any) -> Store:
    """Opens the store in `directory`: a path, or a URL such as gs://... that TFDS and ArrayRecord can read.

    Raises ConfigError: the store is incomplete or has other settings than `settings`, `data` of a configuration.
    """
    made = describe(directory, settings)
    folder = epath.Path(directory)
    for name, size in made['files'].items():
        path = folder / name
        if not path.exists() or path.stat().length != size:
            there = f'{path.stat().length} bytes' if path.exists() else 'missing'
            raise ConfigError(
                f'config.data.data_dir: {path} is {there}, not {size} bytes; copy the store again, or remove it'
            )
    statistics = _statistics(folder / 'statistics.npz')
    import tensorflow_datasets as tfds

    shape = (made['image_size'], made['image_size'], made['channels'])
    builder = tfds.builder_from_directory(directory)
    splits = {}
    for name in ('train', 'validation'):
        records = builder.as_data_source(name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        splits[name] = Split(records, shape, made['encoding'], f'{name} in {directory}', settings.max_bad)
    fingerprint = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    return Store(**splits, statistics=statistics, class_names=made['class_names'], fingerprint=fingerprint)


def _statistics(path: Any) -> dict[str, np.ndarray]:
    try:
        with path.open('rb') as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f'config.data.data_dir: {path} is damaged ({error}); copy the store again, or remove it'
        ) from None


def spread(split: Any, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Returns about `count` pairs (number, record), evenly spaced over a Split, without corrupt records."""
    numbers = dict.fromkeys(np.linspace(0, len(split) - 1, count).astype(int).tolist())
    return [(number, example) for number in numbers if (example := split[number]) is not None]


def training_batches(
    source: Any, *, seed: int, batch_size: int, first_step: int, threads: int, share: int = 0, shares: int = 1
) -> Iterator[Batch]:
    """Yields endless batches from step `first_step` on, restricted to shard `share` of `shares` equal shards per batch.

    Every epoch is a new permutation of all images. A batch may span two epochs, so every epoch visits all images. The
    next intact record of the store replaces a corrupt record.

    Args:
      source: see Split.
      seed: seed of the permutations.
      batch_size: global batch size over all shards.
      first_step: number of batches to skip.
      threads: number of reader threads; an in-memory split uses none.
      share: index of this shard.
      shares: number of shards of a batch.

    Yields:
      image (B, S, S, C) uint8, label (B,) int32 and number (B,) uint32, where B is batch_size // shares and `number` is
      the number of images before this one since step 0.
    """
    import grain

    rows, whole = batch_size // shares, _Whole(source)

    @functools.lru_cache(2)  # a batch takes a fifth of the time of grain's shuffle()
    def order(epoch):
        return np.random.default_rng((seed, epoch)).permutation(len(source))

    def batch(part):
        numbers = np.arange(part * rows, (part + 1) * rows)
        epochs, places = np.divmod(numbers, len(source))
        indices = np.concatenate([order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()])
        found = source.from_memory(indices) or _filled(whole, indices)
        return found | {'number': numbers.astype(np.uint32)}

    batches = iter(
        grain.MapDataset.range(sys.maxsize)[share::shares].map(batch).to_iter_dataset(_reading(source, threads))
    )
    batches.set_state({'next_index': first_step})
    return batches


def validation_batches(
    source: Any, *, batch_size: int, threads: int, share: int = 0, shares: int = 1, first_batch: int = 0
) -> Iterator[Batch]:
    """Yields every image once, in order, restricted to shard `share` of `shares` equal shards per batch.

    Black images with label -1 pad the last batch and replace corrupt records. `first_batch` is the number of batches to
    skip.

    Yields:
      image (B, S, S, C) uint8 and label (B,) int32, where B is batch_size // shares.
    """
    import grain

    padded = _Padded(source, batch_size)
    return iter(
        grain.MapDataset.range(len(padded))
        .batch(batch_size // shares)[first_batch * shares + share :: shares]
        .map(lambda indices: _filled(padded, indices))
        .to_iter_dataset(_reading(source, threads))
    )


def _reading(source: Any, threads: int) -> Any:
    """Returns Grain's options to read a Split: no threads for an in-memory split, where they would wait for the GIL."""
    import grain

    threads = 0 if source.keeps else threads
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _filled(source: Any, indices: Sequence[int] | np.ndarray) -> Batch:
    """Copies the images at `indices` into one array: three times as fast as np.stack."""
    labels = np.empty(len(indices), np.int32)
    for row, index in enumerate(np.asarray(indices).tolist()):
        example = source[index]
        if row == 0:
            images = _empty((len(indices), *example['image'].shape))
        images[row], labels[row] = example['image'], example['label']
    return {'image': images, 'label': labels}


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an empty uint8 array aligned to 64 bytes, which JAX's CPU backend uses without a copy."""
    size = math.prod(shape)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)


class _Whole:
    """`source` with each corrupt record replaced by the next intact record."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for other in range(index, index + len(self.source)):
            example = self.source[other % len(self.source)]
            if example is not None:
                return example
        raise DatasetError('not one record can be read: copy the store again or remove it, and it will be made anew')


class _Padded:
    """`source` padded to a multiple of `batch_size` with black images, label -1, also in place of corrupt records."""

    def __init__(self, source: Any, batch_size: int):
        self.source = source
        self.length = -(-len(source) // batch_size) * batch_size
        self.blank = {'image': np.zeros_like(_Whole(source)[0]['image']), 'label': np.int32(-1)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index] if index < len(self.source) else None
        return self.blank if example is None else example
