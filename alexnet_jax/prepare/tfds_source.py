"""Data sets of TFDS, and the data set `photos`."""

import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from alexnet_jax.paths import check_writable
from alexnet_jax.prepare.raw_sources import Examples, Indices, RawExample, Source, SourceError, digest
from alexnet_jax.prepare.splits import choose_splits
from alexnet_jax.runtime.console import log

# TFDS has disabled its bucket of metadata; each look-up would only leave an empty temporary folder.
tfds.core.DatasetInfo.initialize_from_bucket = lambda info: None

IMAGENET_TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
TfdsRecord = dict[str, Any]  # the value of each feature by name


@dataclasses.dataclass(frozen=True)
class TfdsExamples:
    """Examples of a TFDS data set that is stored as ArrayRecord files.

    Attributes:
      directory: folder of the data set.
      split: the split in the syntax of TFDS, such as 'train[10%:]'.
      image, label: names of the features.
      start, stop: range of records in the split.
      metadata_digest: digest of the TFDS metadata of the data set.
    """

    directory: str
    split: str
    image: str
    label: str
    start: int
    stop: int
    metadata_digest: str

    def __len__(self) -> int:
        return self.stop - self.start

    def _record(self, index: int) -> TfdsRecord:
        return _data_source(self.directory, self.split, self.image)[self.start + index]

    def __getitem__(self, index: int) -> RawExample:
        record = self._record(index)
        return record[self.image], int(record[self.label])

    def name(self, index: int) -> str:
        """Returns the file name if the record contains one, as in ImageNet, otherwise the position in the split."""
        position = f'record {self.start + index} of {self.split}'
        try:
            record = self._record(index)
        except RuntimeError:  # corrupt record
            return position
        return record['file_name'].decode() if 'file_name' in record else position

    def subset(self, indices: Indices) -> 'TfdsExamples':
        """Returns the examples at `indices`, which must be contiguous and not empty."""
        return dataclasses.replace(self, start=self.start + int(indices[0]), stop=self.start + int(indices[-1]) + 1)

    def digest(self) -> str:
        """Returns the digest of the TFDS metadata, the split and the range, which does not depend on `directory`."""
        return digest(self.metadata_digest, self.split, self.start, self.stop)


@functools.lru_cache(maxsize=4)
def _data_source(directory: str, split: str, image: str) -> Sequence[TfdsRecord]:
    builder = tfds.builder_from_directory(directory)
    return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})


def open_tfds(source: str, data_dir: str, fraction: float, validation_split: str | None) -> Source:
    """Opens a TFDS data set, which TFDS downloads and prepares if necessary; see sources.open_source()."""
    builder = _builder(source, data_dir)
    image, label = _image_and_label(builder)
    _download_and_prepare(builder, source, data_dir)
    info = builder.info
    sizes = {name: split.num_examples for name, split in info.splits.items() if split.num_examples}
    choice = choose_splits(sizes, validation_split, info.full_name)
    if choice.validation is None:
        kept = sizes[choice.train] - round(fraction * sizes[choice.train])
        names = {'train': f'{choice.train}[:{kept}]', 'validation': f'{choice.train}[{kept}:]'}
    else:
        names = {'train': choice.train, 'validation': choice.validation}
    described = [(name, split.num_examples, split.num_bytes) for name, split in info.splits.items()]
    metadata_digest = digest(info.full_name, *described)
    splits: dict[str, Examples] = {}
    for split, name in names.items():
        count = info.splits[name].num_examples
        splits[split] = TfdsExamples(str(builder.data_dir), name, image, label, 0, count, metadata_digest)
        if not count:
            raise SourceError(
                f'{info.full_name} has no validation split, and data.validation_fraction={fraction:g} of its'
                f' {sizes[choice.train]} training images leaves no image for validation or none for training'
            )
    return Source(splits, list(info.features[label].names), choice.validation is None, names, choice.notes)


def _image_and_label(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """Returns the names of the only image feature and of the class feature.

    The class feature is `label`, else a supervised key, else the only ClassLabel. Raises SourceError: a feature is
    missing or ambiguous.
    """
    features = dict(builder.info.features)
    images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    supervised = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    label = next((name for name in ('label', *supervised) if name in labels), labels[0] if len(labels) == 1 else None)
    if len(images) != 1 or label is None:
        found = ', '.join(f'{name}: {type(feature).__name__}' for name, feature in features.items())
        raise SourceError(
            f'config.data.source: {builder.name} must have one image and one class label per example, but has {found}'
        )
    return images[0], label


def _builder(source: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of `source` for ArrayRecord files, which have random access."""
    name = source.removeprefix('tfds:').replace(':', '/')
    try:
        if source == 'photos':
            from alexnet_jax.prepare.photos import Photos

            builder: tfds.core.DatasetBuilder = Photos(data_dir=data_dir, file_format='array_record')
        else:
            builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except tfds.core.registered.DatasetNotFoundError:
        raise SourceError(f"config.data.source: TFDS has no data set {name!r}; see 'tfds.list_builders()'") from None
    except ValueError as error:
        if 'File format is already set' in str(error):
            raise SourceError(
                f'{name} in {data_dir} already exists in a file format other than array_record, without random access:'
                ' choose another config.data.data_dir, or remove the folder'
            ) from None
        raise SourceError(f'config.data.source: TFDS cannot build {name!r}: {_one_line(error)}') from None
    return builder


def _download_and_prepare(
    builder: tfds.core.DatasetBuilder, source: str, data_dir: str, check_only: bool = False
) -> None:
    """Downloads and converts the data of `builder` with TFDS, unless TFDS has already prepared the data.

    Raises SourceError: TensorFlow or a file is missing or, without `check_only`, TFDS fails.
    """
    if builder.is_prepared():
        return
    check_writable('config.data.data_dir', data_dir, f'TFDS writes {source} to that folder, so use another folder')
    # Fail before a download of gigabytes. Builders that use TensorFlow import it lazily as `tf`.
    if 'tf' in vars(sys.modules[type(builder).__module__]) and importlib.util.find_spec('tensorflow') is None:
        raise _without_tensorflow(source)
    config = tfds.download.DownloadConfig()
    if builder.name == 'imagenet2012':
        config.manual_dir = imagenet_tars(data_dir)
    if check_only:
        return
    log(f'reading {source} with TFDS into {builder.data_dir}')
    try:
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # TFDS, its builders and its downloader raise many types
        if isinstance(error, ModuleNotFoundError) and error.name == 'tensorflow':
            raise _without_tensorflow(source) from None
        raise SourceError(f'{source}: TFDS could not download or prepare the data: {_one_line(error)}') from None


def missing_tfds_data(source: str, data_dir: str) -> tuple[list[str], dict[str, int], int] | None:
    """Describes data that TFDS has not prepared yet; returns None if open_source() would only read files.

    Returns the class names, the number of images by split ({} if unknown), and the bytes that TFDS would download.
    Raises SourceError: TFDS has no such data set, or TensorFlow or a file is missing.
    """
    if source.partition(':')[0] not in ('tfds', 'photos'):
        return None
    builder = _builder(source, data_dir)
    _, label = _image_and_label(builder)
    if builder.is_prepared():
        return None
    _download_and_prepare(builder, source, data_dir, check_only=True)
    names, images = list(builder.info.features[label].names), {}
    if source == 'photos':
        from alexnet_jax.prepare.photos import PATCHES_PER_IMAGE

        images = {split: count * len(names) for split, count in PATCHES_PER_IMAGE.items()}
    is_manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS is not None  # the user has downloaded the files
    return names, images, 0 if is_manual else sum(int(info.size) for info in (builder.url_infos or {}).values())


def _without_tensorflow(source: str) -> SourceError:
    return SourceError(
        f'{source}: its builder in TFDS needs TensorFlow, which is not installed: pip install "alexnet_jax[imagenet]"'
    )


def _one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:400]}'


def imagenet_tars(data_dir: str) -> str:
    """Returns the folder with both tar files of ImageNet, `data_dir`/downloads/manual or `data_dir`.

    Raises SourceError: a file is missing; the message names the file and its folder.
    """
    folders = [os.path.join(data_dir, 'downloads', 'manual'), data_dir]
    for folder in folders:
        if all(os.path.exists(os.path.join(folder, tar)) for tar in IMAGENET_TARS):
            return folder
    missing = [tar for tar in IMAGENET_TARS if not any(os.path.exists(os.path.join(f, tar)) for f in folders)]
    what = ' and '.join(missing or IMAGENET_TARS)
    raise SourceError(f'ImageNet: put {what} (ILSVRC2012, from image-net.org) into {folders[0]}')
