"""Reads prepared data sets, which are ArrayRecord files, without TensorFlow."""

import dataclasses
import hashlib
import json
import math
import os
import re
import threading
import zipfile
from collections.abc import Sequence
from typing import Protocol, TypedDict

import numpy as np
import simplejpeg
from etils import epath
from jaxtyping import Bool, Integer, UInt8

from alexnet_jax.config import ConfigError
from alexnet_jax.runtime.console import log_error

Batch = dict[str, np.ndarray]  # see loader.training_batches() and loader.validation_batches()

MANIFEST_FIELDS = ('source', 'image_size', 'channels', 'encoding', 'validation_fraction', 'class_names')
MANIFEST = 'prepared.json'  # name of the file with the Manifest
IN_MEMORY_LIMIT_BYTES = 1 << 28  # a split with more bytes of pixels is not cached in memory


class DatasetError(RuntimeError):
    """Raised if data could not be prepared or are corrupt. The message is one line with the cause and the remedy."""


class Example(TypedDict):
    """A labeled image."""

    image: UInt8[np.ndarray, 's s c']
    label: np.int32


class DatasetSettings(Protocol):
    """The settings of a prepared data set that both DataConfig and prepare.writer.PrepareConfig have."""

    @property
    def source(self) -> str:
        """Source of the raw images: photos, tfds:NAME[:config], folder:DIR or idx:DIR."""

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""

    @property
    def channels(self) -> int:
        """Number of channels, 1 or 3."""

    @property
    def encoding(self) -> str:
        """Encoding of the stored images, raw or jpeg."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes; None or empty selects the names of the source."""

    @property
    def max_corrupt_fraction(self) -> float:
        """Maximum fraction of unreadable images in preparation, and of corrupt records."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of prepared.json, which describes a prepared data set.

    Attributes:
      source, image_size, channels, encoding: see DataConfig.
      fingerprint: digest of the raw images, see prepare.raw_sources.Source.
      validation_fraction: fraction of the training images held out for validation; None if the source has a
        validation split.
      class_names: one name per label.
      images: number of images by split.
      files: size in bytes of each other file of the data set, by name.
    """

    source: str
    fingerprint: str
    validation_fraction: float | None
    image_size: int
    channels: int
    encoding: str
    class_names: list[str]
    images: dict[str, int]
    files: dict[str, int]


class SplitReader:
    """Random access to the examples of a split; a corrupt record reads as None.

    ArrayRecord detects corrupt records by their checksums. The reader logs and counts each of them once. If the pixels
    of all images take at most IN_MEMORY_LIMIT_BYTES, the reader caches each image after its first read, because reading
    dominates the cost of a batch.

    Args:
      records: serialized tf.train.Examples.
      shape: shape of an image, (S, S, C).
      encoding: encoding of the image in a record, 'raw' or 'jpeg'.
      name: name of the split in messages.
      max_corrupt_fraction: maximum fraction of corrupt records. The read that exceeds it raises DatasetError.
    """

    def __init__(
        self,
        records: Sequence[bytes],
        shape: tuple[int, int, int],
        encoding: str,
        name: str,
        max_corrupt_fraction: float,
    ):
        from tensorflow_datasets.proto import tf_example_pb2

        # Parse the protobuf directly: the remaining steps of TFDS's decoder take twice as long and hold the GIL.
        self.parse = tf_example_pb2.Example.FromString
        self.records, self.shape, self.encoding, self.name = records, shape, encoding, name
        self.max_corrupt_fraction = max_corrupt_fraction
        self.in_memory = len(records) * math.prod(shape) <= IN_MEMORY_LIMIT_BYTES
        self.cached = np.zeros(len(records), bool)
        self.images = np.empty((len(records) if self.in_memory else 0, *shape), np.uint8)
        self.labels = np.empty(len(records), np.int32)
        self.corrupt: set[int] = set()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def corrupt_mask(self) -> Bool[np.ndarray, ' n']:
        """Returns the mask of the records that this process found corrupt."""
        found = np.zeros(len(self), bool)
        found[list(self.corrupt)] = True
        return found

    def __getitem__(self, index: int) -> Example | None:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.cached[index]:
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
            example: Example = {'image': image, 'label': np.int32(features['label'].int64_list.value[0])}
            if self.in_memory:
                self.images[index], self.labels[index] = image, example['label']
                self.cached[index] = True
        except MemoryError:
            raise
        except Exception as error:  # ArrayRecord, protobuf and the decoder raise different types
            self._count_corrupt(index, error)
            return None
        return example

    def take_cached(self, indices: Integer[np.ndarray, ' b']) -> Batch | None:
        """Returns the images and labels at `indices` if all are cached, otherwise None.

        The function takes a quarter of the time of reading the records one by one.
        """
        if not self.cached[indices].all():
            return None
        images = aligned_empty((len(indices), *self.shape))
        np.take(self.images, indices, 0, out=images, mode='clip')  # other modes are slower with `out`
        return {'image': images, 'label': self.labels[indices]}

    def _count_corrupt(self, index: int, error: Exception) -> None:
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


def dataset_dir(data_dir: str, settings: DatasetSettings) -> str:
    """Returns the folder of the prepared data set with these settings: a path, or a URL if `data_dir` is a URL."""
    root = data_dir if '://' in data_dir else os.path.abspath(os.path.expanduser(data_dir))
    name = re.sub(r'\W+', '_', settings.source.removeprefix('tfds:')).strip('_')
    kind = '_grey' * (settings.channels == 1) + '_jpeg' * (settings.encoding == 'jpeg')
    return os.path.join(root, 'prepared', f'{name}_{settings.image_size}px{kind}')


def read_manifest(directory: str, settings: DatasetSettings) -> Manifest:
    """Returns the manifest of the data set in `directory`.

    Raises ConfigError: `directory` is not a complete data set, or the data set has other settings than `settings`.
    """
    try:
        content = json.loads((epath.Path(directory) / MANIFEST).read_text())
        manifest = Manifest(**{field.name: content[field.name] for field in dataclasses.fields(Manifest)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'config.data.data_dir: {directory} is incomplete or of an older version ({error}); remove it to'
            ' prepare it again'
        ) from None
    for name in MANIFEST_FIELDS:
        prepared, wanted = getattr(manifest, name), getattr(settings, name)
        if name == 'class_names':
            wanted = list(wanted or prepared)
        if prepared not in (wanted, None):
            raise ConfigError(
                f'config.data.{name}: {wanted!r}, but {directory} was prepared with {prepared!r}: use that value,'
                ' remove the folder, or choose another data_dir'
            )
    return manifest


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A prepared data set.

    Attributes:
      train, validation: see SplitReader.
      statistics: statistics of the training images, see prepare.shards.statistics().
      class_names: one name per label.
      fingerprint: SHA-256 of the manifest.
    """

    train: SplitReader
    validation: SplitReader
    statistics: dict[str, np.ndarray]
    class_names: list[str]
    fingerprint: str


def open_prepared(directory: str, settings: DatasetSettings) -> PreparedDataset:
    """Opens the data set in `directory`: a path, or a URL such as gs://... that TFDS and ArrayRecord can read.

    Raises ConfigError: the data set is incomplete or corrupt, or has other settings than `settings`.
    """
    manifest = read_manifest(directory, settings)
    folder = epath.Path(directory)
    for name, size in manifest.files.items():
        path = folder / name
        if not path.exists() or path.stat().length != size:
            found = f'{path.stat().length} bytes' if path.exists() else 'missing'
            raise ConfigError(
                f'config.data.data_dir: {path} is {found}, not {size} bytes; copy the data set again, or remove it'
            )
    statistics = _read_statistics(folder / 'statistics.npz')
    import tensorflow_datasets as tfds

    shape = (manifest.image_size, manifest.image_size, manifest.channels)
    builder = tfds.builder_from_directory(directory)
    splits = {}
    for name in ('train', 'validation'):
        records = builder.as_data_source(name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        splits[name] = SplitReader(
            records, shape, manifest.encoding, f'{name} in {directory}', settings.max_corrupt_fraction
        )
    fingerprint = hashlib.sha256(json.dumps(dataclasses.asdict(manifest), sort_keys=True).encode()).hexdigest()
    return PreparedDataset(**splits, statistics=statistics, class_names=manifest.class_names, fingerprint=fingerprint)


def _read_statistics(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with path.open('rb') as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f'config.data.data_dir: {path} is corrupt ({error}); copy the data set again, or remove it'
        ) from None


def evenly_spaced(split: SplitReader, count: int) -> list[tuple[int, Example]]:
    """Returns at most `count` pairs (index, example), evenly spaced over `split`, without corrupt records."""
    numbers = dict.fromkeys(np.linspace(0, len(split) - 1, count).astype(int).tolist())
    return [(number, example) for number in numbers if (example := split[number]) is not None]


def aligned_empty(shape: tuple[int, ...]) -> UInt8[np.ndarray, '...']:
    """Returns an uninitialized uint8 array, aligned to 64 bytes so that JAX's CPU backend needs no copy."""
    size = math.prod(shape)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)
