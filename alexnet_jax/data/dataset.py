"""Prepared data sets, read as ArrayRecord files without TensorFlow.

The order of the images is a pure function of the seed and the position in the sequence, for any number of processes.
The complete state of an input pipeline is therefore the number of steps.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import threading
import zipfile
from typing import Any

import numpy as np
import simplejpeg
from etils import epath

from alexnet_jax.config import ConfigError
from alexnet_jax.runtime.console import log_error

Batch = dict[str, np.ndarray]

MANIFEST_FIELDS = ('source', 'image_size', 'channels', 'encoding', 'validation_fraction', 'class_names')
MANIFEST = (
    'prepared.json'  # file in a data set: settings, source fingerprint, image counts, and sizes of the data set's files
)
IN_MEMORY_LIMIT_BYTES = 1 << 28  # maximum bytes of images of a split that is cached in memory


class DatasetError(RuntimeError):
    """Raised if data could not be prepared or are corrupt. The message is one line with the cause and the remedy."""


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A prepared data set, written by `prepare`.

    Attributes:
      train, validation: see Split.
      statistics: statistics of the training images, see prepare.shards.statistics().
      class_names: one name per label.
      fingerprint: sha256 of settings, source fingerprint, image counts and file sizes.
    """

    train: Any
    validation: Any
    statistics: dict[str, np.ndarray]
    class_names: list[str]
    fingerprint: str


class SplitReader:
    """Random access to {'image': (S, S, C) uint8, 'label': int32}, or None for a record that is corrupt on disk.

    Every record has a checksum. A corrupt record is logged and counted once. A split of at most 256 MiB caches images
    in memory after the first read, because reading is most of the cost of a batch.

    Args:
      records: random access to serialized tf.train.Examples.
      shape: (S, S, C).
      encoding: encoding of the image in a record, 'raw' or 'jpeg'.
      name: name in messages.
      max_corrupt_fraction: maximum fraction of corrupt records; beyond it, access to a record raises DatasetError.
    """

    def __init__(self, records: Any, shape: tuple[int, ...], encoding: str, name: str, max_corrupt_fraction: float):
        from tensorflow_datasets.proto import tf_example_pb2

        # Parses the protobuf directly: the further steps of TFDS take twice as long as parsing, with the GIL held.
        self.parse = tf_example_pb2.Example.FromString
        self.records, self.shape, self.encoding, self.name, self.max_corrupt_fraction = (
            records,
            shape,
            encoding,
            name,
            max_corrupt_fraction,
        )
        self.keeps = len(records) * math.prod(shape) <= IN_MEMORY_LIMIT_BYTES
        self.kept = np.zeros(len(records), bool)
        self.images = np.empty((len(records) if self.keeps else 0, *shape), np.uint8)
        self.labels = np.empty(len(records), np.int32)
        self.corrupt: set[int] = set()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def corrupt_mask(self) -> np.ndarray:
        """Returns a mask (N,) bool of the records that this process found corrupt."""
        found = np.zeros(len(self), bool)
        found[list(self.corrupt)] = True
        return found

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.kept[index]:
            return {'image': self.images[index], 'label': self.labels[index]}
        if index in self.corrupt:
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

    def take_cached(self, indices: np.ndarray) -> Batch | None:
        """Returns the cached images and labels at `indices` (B,), or None if some are not cached.

        The cost is a fourth of the cost of single accesses.
        """
        if not self.kept[indices].all():
            return None
        images = aligned_empty((len(indices), *self.shape))
        np.take(self.images, indices, 0, out=images, mode='clip')  # other modes are slower with `out`
        return {'image': images, 'label': self.labels[indices]}

    def _count(self, index: int, error: Exception) -> None:
        with self.lock:
            if index in self.corrupt:
                return
            self.corrupt.add(index)
        what = (str(error).splitlines() or [type(error).__name__])[0][:200]
        log_error(f'record {index} of {self.name} is corrupt and skipped: {what}')
        if len(self.corrupt) > self.max_corrupt_fraction * len(self):
            raise DatasetError(
                f'{len(self.corrupt)} of {len(self)} records of {self.name} are corrupt, more than'
                f' data.max_corrupt_fraction={self.max_corrupt_fraction:g} allows:'
                ' copy the data set again or remove it, and it will be prepared again'
            ) from None


def dataset_dir(data_dir: str, settings: Any) -> str:
    """Returns the path of the prepared store. `settings` is `data` of a configuration or PrepareConfig."""
    root = data_dir if '://' in data_dir else os.path.abspath(os.path.expanduser(data_dir))
    name = re.sub(r'\W+', '_', settings.source.removeprefix('tfds:')).strip('_')
    kind = '_grey' * (settings.channels == 1) + '_jpeg' * (settings.encoding == 'jpeg')
    return os.path.join(root, 'prepared', f'{name}_{settings.image_size}px{kind}')


def read_manifest(directory: str, settings: Any) -> dict[str, Any]:
    """Returns the settings, fingerprint, image counts and file sizes of the data set in `directory`.

    Raises ConfigError: `directory` is not a complete data set, or the data set has other settings than `settings`.
    """
    try:
        made = json.loads((epath.Path(directory) / MANIFEST).read_text())
        made = {name: made[name] for name in ('fingerprint', 'images', 'files', *MANIFEST_FIELDS)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'config.data.data_dir: {directory} is incomplete or of an older version ({error}); remove it to'
            ' prepare it again'
        ) from None
    for name in MANIFEST_FIELDS:
        wanted = list(settings.class_names or made[name]) if name == 'class_names' else getattr(settings, name)
        if made[name] not in (wanted, None):
            raise ConfigError(
                f'config.data.{name}: {wanted!r}, but {directory} was prepared with {made[name]!r}: use that value,'
                ' remove the folder, or choose another data_dir'
            )
    return made


def open_store(directory: str, settings: Any) -> PreparedDataset:
    """Opens the data set in `directory`: a path, or a URL such as gs://... that TFDS and ArrayRecord can read.

    Raises ConfigError: the data set is incomplete or has other settings than `settings`, `data` of a configuration.
    """
    made = read_manifest(directory, settings)
    folder = epath.Path(directory)
    for name, size in made['files'].items():
        path = folder / name
        if not path.exists() or path.stat().length != size:
            there = f'{path.stat().length} bytes' if path.exists() else 'missing'
            raise ConfigError(
                f'config.data.data_dir: {path} is {there}, not {size} bytes; copy the data set again, or remove it'
            )
    statistics = _statistics(folder / 'statistics.npz')
    import tensorflow_datasets as tfds

    shape = (made['image_size'], made['image_size'], made['channels'])
    builder = tfds.builder_from_directory(directory)
    splits = {}
    for name in ('train', 'validation'):
        records = builder.as_data_source(name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        splits[name] = SplitReader(
            records, shape, made['encoding'], f'{name} in {directory}', settings.max_corrupt_fraction
        )
    fingerprint = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    return PreparedDataset(**splits, statistics=statistics, class_names=made['class_names'], fingerprint=fingerprint)


def _statistics(path: Any) -> dict[str, np.ndarray]:
    try:
        with path.open('rb') as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f'config.data.data_dir: {path} is corrupt ({error}); copy the data set again, or remove it'
        ) from None


def evenly_spaced(split: Any, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Returns about `count` pairs (number, record), evenly spaced over a Split, without corrupt records."""
    numbers = dict.fromkeys(np.linspace(0, len(split) - 1, count).astype(int).tolist())
    return [(number, example) for number in numbers if (example := split[number]) is not None]


def aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an empty uint8 array aligned to 64 bytes, which JAX's CPU backend uses without a copy."""
    size = math.prod(shape)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)
