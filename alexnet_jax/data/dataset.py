"""Reads prepared data sets, which are ArrayRecord files, without TensorFlow."""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from etils import epath

from alexnet_jax.config import ConfigError
from alexnet_jax.data.manifest import MANIFEST, Manifest, load_manifest, match_earlier_source, unusable
from alexnet_jax.data.split_reader import SplitReader
from alexnet_jax.paths import absolute_source, check_folder, is_url
from alexnet_jax.runtime.console import summarize_exception

MANIFEST_FIELDS = (
    'source',
    'image_size',
    'channels',
    'encoding',
    'validation_fraction',
    'validation_split',
    'class_names',
)
MAX_NAME_BYTES = 255  # of a file name, on common file systems
SAMPLE_BYTES = 1 << 16  # see sampled_digests()


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


def read_manifest(directory: str, settings: DatasetSettings, replace: str = 'alexnet prepare') -> Manifest:
    """Returns the manifest of the data set in `directory`; `replace` is the command that prepares it anew.

    Raises ConfigError: `directory` is not a complete data set, or the data set has other settings than `settings`.
    """
    manifest = load_manifest(directory)
    problem = describe_difference(manifest, settings)
    if problem is not None:
        field, wanted, prepared = problem
        raise ConfigError(
            f'config.data.{field}: {wanted!r}, but {directory} was prepared with {prepared!r}: use that value or'
            f' another data_dir, or prepare the data set anew: {replace}'
        )
    return manifest


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
      choices: what was chosen when the data set was prepared and is not in the log of this process, one line each.
    """

    train: SplitReader
    validation: SplitReader
    statistics: dict[str, np.ndarray]
    class_names: list[str]
    fingerprint: str
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    earlier_fingerprints: Sequence[str] = ()
    choices: Sequence[str] = ()

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
        train=splits['train'],
        validation=splits['validation'],
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
        raise unusable(path, 'is missing') from None
    if found != size:
        raise unusable(path, f'is {found} bytes, not {size} bytes')
    if digests is None:
        return
    differs = [old != new for old, new in zip(digests, sampled_digests(path), strict=True)]
    if all(differs) or (any(differs) and '.array_record' not in path.name):
        raise unusable(path, 'is corrupt')


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
        raise unusable(info, f'or features.json is corrupt ({summarize_exception(error)})') from None
    if class_names != manifest.class_names:
        raise unusable(folder / MANIFEST, 'and label.labels.txt have different class names, so one is corrupt')
    for split, records in splits.items():
        if len(records) != manifest.images[split]:
            raise unusable(
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
        raise unusable(path, f'is corrupt ({summarize_exception(error)})') from None
    if corrupt or {name: array.shape for name, array in arrays.items()} != shapes:
        raise unusable(path, 'is corrupt')
    return arrays
