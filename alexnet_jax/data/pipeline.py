"""Prepared stores and the batches read from them with Grain, without TensorFlow.

Which image comes when is a pure function of the seed and of how many images came before it, whatever the number of
processes, so the whole state of the input is the number of steps taken.
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
DESCRIPTION = 'prepared.json'  # in a store: what it was made of, and the sizes of its files
KEPT = 1 << 28  # bytes of images: a split of no more stays in memory


class DatasetError(RuntimeError):
    """Data that could not be made or are damaged: one line with the cause and what to do."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A data set as `prepare` wrote it.

    Attributes:
      train, validation: see Split.
      statistics: of the training images, see shards.statistics().
      class_names: one a label.
      fingerprint: the same for the same images.
    """

    train: Any
    validation: Any
    statistics: dict[str, np.ndarray]
    class_names: list[str]
    fingerprint: str


class Split:
    """Random access to {'image': (S, S, C) uint8, 'label': int32}; None for a record that is damaged on disk.

    Every record has a checksum. A damaged one is named and counted once. Of a split of at most 256 MB an image stays in
    memory once it was read, for reading is the most of what a batch costs.

    Args:
      records: random access to serialised tf.train.Examples.
      shape: (S, S, C).
      encoding: of the image in a record, 'raw' or 'jpeg'.
      name: shown.
      max_bad: share of the records that may be damaged.

    Raises DatasetError, when a record is asked for: there are more.
    """

    def __init__(self, records: Any, shape: tuple[int, ...], encoding: str, name: str, max_bad: float):
        from tensorflow_datasets.proto import tf_example_pb2

        # The message itself: what TFDS does with it besides takes twice as long, with the interpreter's lock held.
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
        """Which records (N,) bool were found to be damaged since the process was started."""
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
        except Exception as error:  # of ArrayRecord, protobuf and the decoder, each its own kinds
            self._count(index, error)
            return None
        return example

    def from_memory(self, indices: np.ndarray) -> Batch | None:
        """The images and labels at `indices` (B,), at a fourth of the cost of one by one; None: some are not there."""
        if not self.kept[indices].all():
            return None
        images = _empty((len(indices), *self.shape))
        np.take(self.images, indices, 0, out=images, mode='clip')  # as fast as without `out`, which other modes are not
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
    """Where the prepared store lies; `settings`: `data` of a configuration, or prepare.Settings."""
    root = data_dir if '://' in data_dir else os.path.abspath(os.path.expanduser(data_dir))
    name = re.sub(r'\W+', '_', settings.source.removeprefix('tfds:')).strip('_')
    kind = '_grey' * (settings.channels == 1) + '_jpeg' * (settings.encoding == 'jpeg')
    return os.path.join(root, 'prepared', f'{name}_{settings.image_size}px{kind}')


def describe(directory: str, settings: Any) -> dict[str, Any]:
    """What the store in `directory` was made of. Raises ConfigError: it is no store, or not that of `settings`."""
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
    """The store in `directory`, on a disk or, as gs://..., wherever TFDS and ArrayRecord can read.

    Raises ConfigError: it is no whole store, or not that of `settings`, `data` of a configuration.
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
    """About `count` records of a Split with their numbers, evenly spread over it, without damaged ones."""
    numbers = dict.fromkeys(np.linspace(0, len(split) - 1, count).astype(int).tolist())
    return [(number, example) for number in numbers if (example := split[number]) is not None]


def training_batches(
    source: Any, *, seed: int, batch_size: int, first_step: int, threads: int, share: int = 0, shares: int = 1
) -> Iterator[Batch]:
    """Endless batches from step `first_step` on: of each the rows of part number `share` of the `shares` equal ones.

    Every epoch is a new permutation of all images; a batch may end one epoch and begin the next, so none is left out.
    In the place of a damaged record stands the next one of the store that is whole.

    Args:
      source: see Split.

    Yields:
      image (B, S, S, C) uint8, label (B,) int32 and number (B,) uint32, the count of images given out before this one
      since step 0; B is batch_size // shares.
    """
    import grain

    rows, whole = batch_size // shares, _Whole(source)

    @functools.lru_cache(2)  # grain's own shuffle() works out each index by itself: a fifth of the time for a batch
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
    """Every image once, in order, in batches filled up with black images labelled -1; of each the rows of `share`.

    A damaged record is such a black image too. `first_batch`: how many batches are passed over.

    Yields:
      image (B, S, S, C) uint8 and label (B,) int32; B is batch_size // shares.
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
    """How Grain reads a Split: what stays in memory in the caller's thread, others would only wait for its lock."""
    import grain

    threads = 0 if source.keeps else threads
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _filled(source: Any, indices: Sequence[int] | np.ndarray) -> Batch:
    """The images at `indices` in one array: three times as fast as to read them all and stack them."""
    labels = np.empty(len(indices), np.int32)
    for row, index in enumerate(np.asarray(indices).tolist()):
        example = source[index]
        if row == 0:
            images = _empty((len(indices), *example['image'].shape))
        images[row], labels[row] = example['image'], example['label']
    return {'image': images, 'label': labels}


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array of uint8 that begins at a multiple of 64 bytes: a CPU's device takes it as it is, copies others."""
    size = math.prod(shape)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)


class _Whole:
    """`source` with the next whole record in the place of each damaged one."""

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
    """`source` lengthened to a multiple of `batch_size`."""

    def __init__(self, source: Any, batch_size: int):
        self.source = source
        self.length = -(-len(source) // batch_size) * batch_size
        self.blank = {'image': np.zeros_like(_Whole(source)[0]['image']), 'label': np.int32(-1)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index] if index < len(self.source) else None
        return self.blank if example is None else example
