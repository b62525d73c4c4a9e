"""Reads prepared data sets, which are ArrayRecord files, without TensorFlow."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import simplejpeg
from etils import epath
from jaxtyping import Bool, Integer, UInt8

from alexnet_jax.config import ConfigError
from alexnet_jax.paths import absolute_source, check_folder, is_url
from alexnet_jax.runtime.console import log_error, summarize_exception
from alexnet_jax.runtime.files import JsonObject, json_digest, write_json

Batch = dict[str, np.ndarray]  # see loader.training_batches() and loader.validation_batches()

MANIFEST_FIELDS = (
    'source',
    'image_size',
    'channels',
    'encoding',
    'validation_fraction',
    'validation_split',
    'class_names',
)
MANIFEST = 'prepared.json'  # name of the file with the Manifest
MANIFEST_VERSION = 2
MAX_NAME_BYTES = 255  # of a file name, on common file systems
SAMPLE_BYTES = 1 << 16  # see sampled_digests()
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
        """Source of the raw images: see DataConfig."""

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
    def validation_split(self) -> str | None:
        """Name of the split to validate on; None selects the validation split of the source."""

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
      source, image_size, channels, encoding: see DataConfig. Version 1 has the source as the user gave it, which may be
        a relative path; version 2 has absolute paths.
      fingerprint: digest of the stored images, their classes and splits, which depends neither on the source nor on the
        order of the images; see prepare.shards.content_fingerprint(). In version 1, prepare.raw_sources.Source.
        fingerprint.
      validation_fraction: fraction of the training images held out for validation; None if the source has a
        validation split.
      class_names: one name per label.
      images: number of images by split.
      files: size in bytes of each other file of the data set, by name.
      digests: sampled_digests() of each of these files, by name; {} in data sets of version 0.1.
      version: version of this layout; 1 if the file has no version.
      validation_split: see DataConfig; None in version 1.
      order: digest of the images in the order of the records; '' in version 1.
      inventory: the files of the source, see inventory.Inventory; None in version 1.
      origins: where the images of each split come from, see prepare.raw_sources.Source; {} in version 1.
      source_digest: see prepare.raw_sources.Source.fingerprint; '' in version 1.
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
    digests: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    version: int = 1
    validation_split: str | None = None
    order: str = ''
    inventory: JsonObject | None = None
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    source_digest: str = ''

    def fingerprint_of_images(self) -> str:
        """Returns a digest of images, order, classes and settings, which does not depend on the source.

        The digest of a data set of version 1 is that of earlier versions of the program: the SHA-256 of all fields that
        the manifest then had, but `digests`.
        """
        names = ['fingerprint', 'image_size', 'channels', 'encoding', 'class_names', 'images']
        names += ['source', 'validation_fraction', 'files'] if self.version == 1 else ['order']
        return json_digest({name: getattr(self, name) for name in names})

    def earlier_fingerprints(self) -> list[str]:
        """Returns fingerprint_of_images() of this data set if an earlier version had prepared it from the same source.

        The digests are those for the absolute path of the source and for relative paths.
        """
        found = []
        for text in earlier_texts(self.source) if self.version > 1 else ():
            # The description in this file contained the source.
            size = self.files['dataset_info.json'] + len(json.dumps(f'{text}, ')) - 2
            files = self.files | {'dataset_info.json': size}
            earlier = dataclasses.replace(self, version=1, source=text, fingerprint=self.source_digest, files=files)
            found.append(earlier.fingerprint_of_images())
        return found


def earlier_texts(source: str) -> list[str]:
    """Returns what a user may have typed for the absolute `source` in an earlier version, which kept relative paths."""
    kind, _, location = source.partition(':')
    if kind not in ('folder', 'idx'):
        return [source]
    parts = location.split('/')[1:]
    relative = ['/'.join(parts[start:]) for start in range(len(parts))]
    return [source, *(f'{kind}:{path}' for name in relative for path in (name, f'./{name}')), f'{kind}:.']


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Writes prepared.json, with a digest of its content, to `folder`. Raises OSError: the file cannot be written."""
    content = dataclasses.asdict(manifest)
    write_json(os.path.join(folder, MANIFEST), content | {'digest': json_digest(content)})


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
      max_corrupt_fraction: maximum fraction of corrupt records. If more are found, every read raises DatasetError.
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
        self._check_corrupt()
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
        self._check_corrupt()
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
        self._check_corrupt()

    def _check_corrupt(self) -> None:
        if len(self.corrupt) > self.max_corrupt_fraction * len(self):
            raise DatasetError(
                f'{len(self.corrupt)} of {len(self)} records of {self.name} are corrupt, more than'
                f' data.max_corrupt_fraction={self.max_corrupt_fraction:g} allows:'
                ' copy the data set again or remove it, and it will be prepared again'
            ) from None


def dataset_dir(data_dir: str, settings: DatasetSettings, prepared_dir: str | None = None) -> str:
    """Returns the folder of the prepared data set with these settings: a path, or a URL if its parent is a URL.

    Args:
      data_dir: path or URL of the folder that contains the folder `prepared`.
      settings: the settings of the data set.
      prepared_dir: path or URL that replaces `data_dir`/prepared.

    Raises ConfigError: the path cannot be used, see paths.check_folder().
    """
    field = f'config.data.{"data_dir" if prepared_dir is None else "prepared_dir"}'
    root = check_folder(field, prepared_dir or data_dir)
    root = os.path.join(root, 'prepared') if prepared_dir is None else root
    source = absolute_source('config.data.source', settings.source)
    kind, _, location = source.partition(':')
    if kind in ('photos', 'tfds'):
        name = name_by_text(source, settings)
    else:
        digest = hashlib.sha256(source.encode(errors='surrogatepass')).hexdigest()
        name = _name(os.path.basename(location) or kind, f'_{digest[:8]}', settings)
    directory = os.path.join(root, name)
    return directory if is_url(root) else check_folder(field, directory)


def name_by_text(source: str, settings: DatasetSettings) -> str:
    """Returns the name of the folder of a prepared data set, which earlier versions used for all sources."""
    digest = f'_{hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()[:16]}'
    text = source.removeprefix('tfds:')
    name = _name(text, '', settings)
    return name if len(f'{name}.incomplete'.encode()) <= MAX_NAME_BYTES else _name(text, digest, settings)


def _name(text: str, digest: str, settings: DatasetSettings) -> str:
    """Returns a file name of `text`, `digest` and the format of the images; with a digest, `text` may be shortened."""
    name = re.sub(r'\W+', '_', text).strip('_')
    kind = '_grey' * (settings.channels == 1) + '_jpeg' * (settings.encoding == 'jpeg')
    ending = f'{digest}_{settings.image_size}px{kind}'
    if digest:
        name = name.encode()[: MAX_NAME_BYTES - len(f'{ending}.incomplete')].decode(errors='ignore')
    return f'{name}{ending}'


def read_manifest(directory: str, settings: DatasetSettings) -> Manifest:
    """Returns the manifest of the data set in `directory`.

    Raises ConfigError: `directory` is not a complete data set, or the data set has other settings than `settings`.
    """
    manifest = load_manifest(directory)
    problem = describe_difference(manifest, settings)
    if problem is not None:
        field, wanted, prepared = problem
        raise ConfigError(
            f'config.data.{field}: {wanted!r}, but {directory} was prepared with {prepared!r}: use that value, prepare'
            ' the data set anew with `alexnet prepare --replace`, or choose another data_dir'
        )
    return manifest


def load_manifest(directory: str) -> Manifest:
    """Returns the manifest of the data set in `directory`. Raises ConfigError: it is not a complete data set."""
    path = epath.Path(directory) / MANIFEST
    try:
        return _parse_manifest(json.loads(path.read_text()))
    except Exception as error:  # from the library that reads gs://, or from corrupt content
        raise _unusable(path, f'is missing, corrupt or of another version ({summarize_exception(error)})') from None


def describe_difference(manifest: Manifest, settings: DatasetSettings) -> tuple[str, object, object] | None:
    """Returns the first field in which `manifest` differs from `settings`, with both values; None if there is none."""
    for name in MANIFEST_FIELDS:
        prepared, wanted = getattr(manifest, name), getattr(settings, name)
        if name == 'source':
            wanted = absolute_source('config.data.source', wanted)
            is_same = prepared == wanted or (manifest.version == 1 and match_earlier_source(prepared, wanted))
        elif name == 'class_names':
            wanted = list(wanted or prepared)
            is_same = prepared == wanted
        elif name == 'validation_split':
            is_same = manifest.version == 1 or prepared == wanted
        else:
            is_same = prepared in (wanted, None)
        if not is_same:
            return name, wanted, prepared
    return None


def find_by_fingerprint(
    settings: DatasetSettings, data_dir: str, prepared_dir: str | None, fingerprint: str
) -> tuple[str, Manifest] | None:
    """Returns the folder of the prepared data set with `fingerprint`, see PreparedDataset, and its manifest, or None.

    The function looks first at the data set of the source, then at all others in the same folder, unless it is a URL.
    """
    own = dataset_dir(data_dir, settings, prepared_dir)
    folders = sorted(Path(own).parent.glob(f'*/{MANIFEST}')) if not is_url(own) else []
    for path in sorted(folders, key=lambda path: str(path.parent) != own):
        with contextlib.suppress(ConfigError):  # corrupt, or being written
            manifest = load_manifest(str(path.parent))
            if fingerprint in (manifest.fingerprint_of_images(), *manifest.earlier_fingerprints()):
                return str(path.parent), manifest
    return None


def match_earlier_source(recorded: str, source: str) -> str | None:
    """Compares `recorded`, the source as a user gave it to an earlier version, with the absolute `source`.

    Returns 'absolute' if they are the same source, 'relative' if `source` may be what was meant by the relative path in
    `recorded`, and otherwise None.
    """
    (kind, _, path), (wanted_kind, _, wanted) = recorded.partition(':'), source.partition(':')
    if kind != wanted_kind or kind not in ('folder', 'idx'):
        return None
    path = os.path.expanduser(path)
    if os.path.isabs(path):
        return 'absolute' if absolute_source('config.data.source', f'{kind}:{path}') == source else None
    parts = [part for part in os.path.normpath(path).split('/') if part not in ('..', '.')]
    return 'relative' if wanted.split('/')[-len(parts) :] == parts or not parts else None


def _parse_manifest(content: dict[str, Any]) -> Manifest:
    """Returns the content of prepared.json as a Manifest. Raises ValueError, TypeError, KeyError: it is corrupt."""
    digest = content.pop('digest', None)
    is_of_0_1 = digest is None and 'digests' not in content
    if not is_of_0_1 and digest != json_digest(content):
        raise ValueError('its content does not match its digest')
    names = {field.name for field in dataclasses.fields(Manifest)}
    manifest = Manifest(**{name: value for name, value in content.items() if name in names})
    if manifest.version not in range(1, MANIFEST_VERSION + 1):
        raise ValueError(f'version {manifest.version} is not known')
    images, sizes, classes = manifest.images, manifest.files, manifest.class_names
    if set(images) != {'train', 'validation'} or not all(isinstance(number, int) for number in images.values()):
        raise ValueError(f'images: {images}')
    if not all(isinstance(size, int) for size in sizes.values()) or not all(isinstance(name, str) for name in classes):
        raise ValueError('files or class_names')
    if not all(isinstance(digests, list) and len(digests) == 2 for digests in manifest.digests.values()):
        raise ValueError('digests')
    return manifest


def _unusable(path: epath.Path, problem: str) -> ConfigError:
    """Returns the error for the file `path` of a prepared data set."""
    return ConfigError(
        f'config.data.data_dir: {path} {problem}; copy the data set again, or remove {path.parent} to prepare it again'
    )


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A prepared data set.

    Attributes:
      train, validation: see SplitReader.
      statistics: statistics of the training images, see prepare.shards.statistics().
      class_names: one name per label.
      fingerprint: see Manifest.fingerprint_of_images().
      origins: see Manifest.
      earlier_fingerprints: see Manifest.earlier_fingerprints().
    """

    train: SplitReader
    validation: SplitReader
    statistics: dict[str, np.ndarray]
    class_names: list[str]
    fingerprint: str
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    earlier_fingerprints: Sequence[str] = ()

    def has_fingerprint(self, recorded: str) -> bool:
        """Returns whether a run with the fingerprint `recorded` was trained on this data set."""
        return recorded == self.fingerprint or recorded in self.earlier_fingerprints


def open_prepared(directory: str, settings: DatasetSettings) -> PreparedDataset:
    """Opens the data set in `directory`: a path, or a URL such as gs://... that TFDS and ArrayRecord can read.

    Raises ConfigError: the data set is incomplete or corrupt, or has other settings than `settings`.
    """
    manifest = read_manifest(directory, settings)
    folder = epath.Path(directory)
    for name, size in manifest.files.items():
        _check_file(folder / name, size, manifest.digests.get(name))
    shape = (manifest.image_size, manifest.image_size, manifest.channels)
    statistics = _read_statistics(folder / 'statistics.npz', shape, len(manifest.class_names))
    splits = {
        split: SplitReader(records, shape, manifest.encoding, f'{split} in {directory}', settings.max_corrupt_fraction)
        for split, records in _open_records(folder, manifest).items()
    }
    return PreparedDataset(
        **splits,
        statistics=statistics,
        class_names=manifest.class_names,
        fingerprint=manifest.fingerprint_of_images(),
        origins=manifest.origins,
        earlier_fingerprints=manifest.earlier_fingerprints(),
    )


def sampled_digests(path: epath.Path) -> list[str]:
    """Returns the SHA-256 hex digests of the first bytes of each half of a file, at most SAMPLE_BYTES each.

    Together they cover a small file. In a shard or an archive, checksums cover the other bytes. The end of a shard is
    no sample, because it can be equal in shards of equally many images.
    """
    size = path.stat().length
    count = min(SAMPLE_BYTES, (size + 1) // 2)
    digests = []
    with path.open('rb') as file:
        for offset in (0, size // 2):
            file.seek(offset)
            digests.append(hashlib.sha256(file.read(count)).hexdigest())
    return digests


def _check_file(path: epath.Path, size: int, digests: list[str] | None) -> None:
    """Raises ConfigError if the file does not have `size` bytes, or not the sampled_digests() `digests` unless None.

    A shard may differ in one digest: the checksums of its records find a corrupt record, which training replaces. If
    both differ, the file is another shard.
    """
    try:
        found = path.stat().length
    except FileNotFoundError:
        raise _unusable(path, 'is missing') from None
    if found != size:
        raise _unusable(path, f'is {found} bytes, not {size} bytes')
    if digests is None:
        return
    differs = [old != new for old, new in zip(digests, sampled_digests(path), strict=True)]
    if all(differs) or (any(differs) and '.array_record' not in path.name):
        raise _unusable(path, 'is corrupt')


def _open_records(folder: epath.Path, manifest: Manifest) -> dict[str, Sequence[bytes]]:
    """Returns the serialized examples of both splits. Raises ConfigError: the metadata of TFDS are corrupt."""
    import tensorflow_datasets as tfds

    info = folder / 'dataset_info.json'
    try:
        builder = tfds.builder_from_directory(folder)
        class_names = builder.info.features['label'].names
        splits = {
            split: builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            for split in ('train', 'validation')
        }
    except Exception as error:  # TFDS raises many types for corrupt metadata
        raise _unusable(info, f'or features.json is corrupt ({summarize_exception(error)})') from None
    if class_names != manifest.class_names:
        raise _unusable(folder / MANIFEST, 'and label.labels.txt have different class names, so one is corrupt')
    for split, records in splits.items():
        if len(records) != manifest.images[split]:
            raise _unusable(
                info, f'lists {len(records)} images of {split}, but {MANIFEST} {manifest.images[split]}; one is corrupt'
            )
    return splits


def _read_statistics(path: epath.Path, shape: tuple[int, int, int], classes: int) -> dict[str, np.ndarray]:
    """Returns the statistics of images of `shape` (S, S, C). Raises ConfigError: the file is corrupt."""
    channels = shape[-1:]
    shapes = {
        'mean_image': shape,
        'mean_rgb': channels,
        'eigenvalues': channels,
        'eigenvectors': channels * 2,
        'class_counts': (classes,),
    }
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            corrupt = file.testzip()  # np.load() does not verify the checksum of an array with a corrupt header
        with np.load(io.BytesIO(content)) as file:
            arrays = dict(file)
    except Exception as error:  # zipfile and NumPy raise many types for corrupt content
        raise _unusable(path, f'is corrupt ({summarize_exception(error)})') from None
    if corrupt or {name: array.shape for name, array in arrays.items()} != shapes:
        raise _unusable(path, 'is corrupt')
    return arrays


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
