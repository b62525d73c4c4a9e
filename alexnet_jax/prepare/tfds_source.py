"""Data sets of TFDS in the file formats TFRecord and ArrayRecord, and the data set `photos`."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import sys

import numpy as np
import tensorflow_datasets as tfds

from alexnet_jax.config import ConfigError
from alexnet_jax.paths import check_writable, shown
from alexnet_jax.prepare.raw_sources import Source, SourceError, check_held_out, digest
from alexnet_jax.prepare.shard_writer import call_in_process
from alexnet_jax.prepare.splits import choose_one_split, choose_splits
from alexnet_jax.prepare.tfds_folders import TfdsName, describe_rest, find_version, parse_name
from alexnet_jax.prepare.tfds_records import TfdsExamples, TfdsShard
from alexnet_jax.prepare.tfrecord import FRAMING_BYTES, is_gzip
from alexnet_jax.runtime.console import log

# TFDS has disabled its bucket of metadata; each look-up would only leave an empty temporary folder.
tfds.core.DatasetInfo.initialize_from_bucket = lambda info: None

IMAGENET_TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
FILE_FORMATS = ('tfrecord', 'array_record')


def open_tfds(source: str, data_dir: str, fraction: float, validation_split: str | None) -> Source:
    """Opens a TFDS data set, which TFDS downloads and prepares if necessary; see sources.open_source()."""
    name = _name(source)
    folder, notes = find_version(name, data_dir)
    builder = _read_builder(folder or _download_and_prepare(name, source, data_dir), name, data_dir)
    image, label = _image_and_label(builder)
    info = builder.info
    sizes = {split: part.num_examples for split, part in info.splits.items() if part.num_examples}
    choice = choose_splits(sizes, validation_split, info.full_name)
    origins = {
        'train': choice.train,
        'validation': choice.validation or f'the last {100 * fraction:g}% of {choice.train}',
    }
    train = _open_split(builder, choice.train, image, label)
    if choice.validation is None:
        kept = len(train) - round(fraction * len(train))
        check_held_out(len(train) - kept, len(train), fraction, info.full_name)
        validation, train = train.subset(range(kept, len(train))), train.subset(range(kept))
    else:
        validation = _open_split(builder, choice.validation, image, label)
    names = list(info.features[label].names)
    return Source(
        {'train': train, 'validation': validation},
        names,
        choice.validation is None,
        origins,
        (*notes, *choice.notes),
        names_classes=not _are_numbers(names),
        roots=(os.path.abspath(builder.data_dir),),
    )


def open_tfds_split(source: str, data_dir: str, split: str | None) -> Source:
    """Opens one split of a TFDS data set. If TFDS must prepare the data set, a child process does that.

    Raises SourceError or ConfigError: see sources.open_split().
    """
    name = _name(source)
    folder, notes = find_version(name, data_dir)
    if folder is None:
        # A child process, because TensorFlow should not share a process with JAX.
        folder = call_in_process(_prepare_quietly, name, source, data_dir)
    builder = _read_builder(folder, name, data_dir)
    image, label = _image_and_label(builder)
    sizes = {name: part.num_examples for name, part in builder.info.splits.items() if part.num_examples}
    chosen = choose_one_split(sizes, split, builder.info.full_name)
    names = list(builder.info.features[label].names)
    return Source(
        {chosen: _open_split(builder, chosen, image, label)},
        names,
        False,
        {chosen: chosen},
        notes,
        names_classes=not _are_numbers(names),
        roots=(os.path.abspath(builder.data_dir),),
    )


def _prepare_quietly(name: TfdsName, source: str, data_dir: str) -> str:
    """Returns the result of _download_and_prepare(), without the output of TFDS if there is no terminal."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints unknown sizes
        return _download_and_prepare(name, source, data_dir)


def _open_split(builder: tfds.core.DatasetBuilder, split: str, image: str, label: str) -> TfdsExamples:
    """Returns all examples of a split. Raises SourceError: a file is missing, too short, compressed or elsewhere."""
    info, folder = builder.info, str(builder.data_dir)
    shards, first = [], 0
    for path, count in zip(map(os.fspath, info.splits[split].filepaths), info.splits[split].shard_lengths, strict=True):
        if count:
            shards.append(TfdsShard(path, first, count, _checked_size(path, count, folder)))
            first += count
    file_format = _file_format(builder)
    if file_format == 'tfrecord' and is_gzip(shards[0].path):
        raise SourceError(f'{shards[0].path} is compressed with GZIP; only TFRecord files without compression are read')
    file_name = 'file_name' if isinstance(dict(info.features).get('file_name'), tfds.features.Text) else None
    described = [(name, part.num_examples, part.num_bytes) for name, part in info.splits.items()]
    metadata_digest = digest(info.full_name, *described)
    return TfdsExamples(tuple(shards), file_format, split, image, label, file_name, 0, first, metadata_digest)


def _are_numbers(names: list[str]) -> bool:
    """Returns whether `names` are '0', '1', ..., as a source has that only numbers its classes."""
    return names == [str(label) for label in range(len(names))]


def _checked_size(path: str, count: int, folder: str) -> int:
    """Returns the size of a file of `count` records in bytes. Raises SourceError: see _open_split()."""
    remedy = f'copy {folder} again'
    if os.path.relpath(path, folder).startswith(os.pardir) or count < 0:
        raise SourceError(
            f'{folder}: dataset_info.json is corrupt: it lists {count} records in {shown(path)}; {remedy}'
        )
    if not os.path.isfile(path):
        raise SourceError(f'{shown(path)} is {"not a file" if os.path.exists(path) else "missing"}; {remedy}')
    size = os.path.getsize(path)
    if size < count * FRAMING_BYTES:
        raise SourceError(f'{shown(path)} is truncated: it has {size} bytes and {count} records; {remedy}')
    return size


def _read_builder(folder: str, name: TfdsName, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns a builder that reads the data set in `folder`.

    Only data sets of TFDS 3, which lack features.json, need the code of the data set. Raises SourceError: a file is
    missing or corrupt, or the file format is not in FILE_FORMATS.
    """
    for path in (os.path.join(folder, entry) for entry in sorted(os.listdir(folder))):
        # A pipe would block TFDS, and a device has no end.
        if path.endswith(('.json', '.txt')) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise SourceError(f'{path} is not a regular file; copy {folder} again')
    has_features = os.path.exists(os.path.join(folder, 'features.json'))
    try:
        if has_features:
            builder = tfds.builder_from_directory(folder)
        else:
            version = dataclasses.replace(name, version=os.path.basename(folder))
            builder = tfds.builder(str(version), data_dir=data_dir)
        for split in builder.info.splits.values():
            split.filepaths  # noqa: B018  raises if the template of the file names is corrupt
    except Exception as error:  # TFDS raises many types
        problem = 'dataset_info.json or features.json is corrupt' if has_features else 'features.json is missing'
        raise SourceError(f'{folder}: {problem} ({_one_line(error)}); copy or prepare the data set again') from None
    file_format = _file_format(builder)
    if file_format not in FILE_FORMATS:
        raise SourceError(
            f'{folder} has the file format {file_format}, but only {" and ".join(FILE_FORMATS)} are read;'
            ' convert it with `tfds convert_format`, or choose another config.data.data_dir'
        )
    return builder


def _file_format(builder: tfds.core.DatasetBuilder) -> str:
    return builder.info.file_format.value if builder.info.file_format else 'tfrecord'  # of old versions of TFDS


def _name(source: str) -> TfdsName:
    """Returns the TFDS name of `source`. Raises SourceError: the name is malformed."""
    if not is_photos(source):
        return parse_name(source)
    from alexnet_jax.prepare.photos import Photos, parse_selection

    selection = parse_selection(source)
    return TfdsName('photos', selection.name if selection else '', str(Photos.VERSION))


def _image_and_label(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """Returns the names of the only image feature and of the class feature.

    The class feature is `label`, else a supervised key, else the only ClassLabel. Raises SourceError: a feature is
    missing, ambiguous or unusable.
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
    dtype = np.dtype(features[images[0]].np_dtype)
    if dtype not in (np.uint8, np.uint16):
        raise SourceError(f'config.data.source: the pixels of {builder.name} are {dtype}, not uint8 or uint16')
    if features[label].num_classes is None:
        raise SourceError(f'config.data.source: {builder.name} does not say how many classes {label} has')
    return images[0], label


def is_photos(source: str) -> bool:
    """Returns whether `source` is the data set `photos` or a part of it."""
    return source.partition(':')[0] == 'photos'


def _builder(name: TfdsName, source: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder that prepares the data set `name` of `source`, as ArrayRecord files, with its code."""
    try:
        if is_photos(source):
            from alexnet_jax.prepare.photos import Photos, parse_selection

            selection = parse_selection(source)
            builder: tfds.core.DatasetBuilder = Photos(config=selection, data_dir=data_dir, file_format='array_record')
        else:
            builder = tfds.builder(str(name), data_dir=data_dir, file_format='array_record')
    except tfds.core.registered.DatasetNotFoundError:
        raise SourceError(f"config.data.source: TFDS has no data set '{name}'; see 'tfds.list_builders()'") from None
    except Exception as error:  # the code of a data set raises many types
        raise SourceError(f"config.data.source: TFDS cannot build '{name}': {_one_line(error)}") from None
    return builder


def _builder_for_preparation(name: TfdsName, source: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder that can prepare a data set in `data_dir`.

    Raises SourceError or ConfigError: TFDS has no such data set, TensorFlow or a file is missing, or the folder is not
    writable. The message ends with what `data_dir` has of the data set.
    """
    try:
        builder = _builder(name, source, data_dir)
        _image_and_label(builder)
        check_writable('config.data.data_dir', data_dir, f'TFDS writes {source} to that folder, so use another folder')
        # Fail before a download of gigabytes. Builders that use TensorFlow import it lazily as `tf`.
        if 'tf' in vars(sys.modules[type(builder).__module__]) and importlib.util.find_spec('tensorflow') is None:
            raise _without_tensorflow(source)
        if builder.name == 'imagenet2012':
            imagenet_tars(data_dir)
    except (SourceError, ConfigError) as error:
        raise type(error)(f'{error}{describe_rest(name, data_dir)}') from None
    return builder


def _download_and_prepare(name: TfdsName, source: str, data_dir: str) -> str:
    """Downloads and converts a data set with TFDS, and returns the folder of the version.

    Raises SourceError or ConfigError: see _builder_for_preparation(), or TFDS fails.
    """
    builder = _builder_for_preparation(name, source, data_dir)
    config = tfds.download.DownloadConfig()
    if builder.name == 'imagenet2012':
        config.manual_dir = imagenet_tars(data_dir)
    log(f'reading {source} with TFDS into {builder.data_dir}{describe_rest(name, data_dir)}')
    try:
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # TFDS, its builders and its downloader raise many types
        if isinstance(error, ModuleNotFoundError) and error.name == 'tensorflow':
            raise _without_tensorflow(source) from None
        raise SourceError(f'{source}: TFDS could not download or prepare the data: {_one_line(error)}') from None
    return str(builder.data_dir)


def missing_tfds_data(source: str, data_dir: str) -> tuple[Source, dict[str, int], int] | None:
    """Describes data that TFDS has not prepared yet; returns None if open_source() would only read files.

    Returns a source without splits, the number of images by split ({} if unknown), and the bytes that TFDS would
    download.

    Raises SourceError or ConfigError: see _builder_for_preparation().
    """
    if not is_photos(source) and not source.startswith('tfds:'):
        return None
    name = _name(source)
    if find_version(name, data_dir)[0]:
        return None
    builder = _builder_for_preparation(name, source, data_dir)
    names, images = list(builder.info.features[_image_and_label(builder)[1]].names), {}
    if is_photos(source):
        from alexnet_jax.prepare.photos import PATCHES_PER_IMAGE, parse_selection

        selection = parse_selection(source)
        counts = PATCHES_PER_IMAGE | ({'train': selection.train_patches} if selection else {})
        images = {split: count * len(names) for split, count in counts.items()}
    is_manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS is not None  # the user has downloaded the files
    download_bytes = 0 if is_manual else sum(int(info.size) for info in (builder.url_infos or {}).values())
    return Source({}, names, False, names_classes=not _are_numbers(names)), images, download_bytes


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
    raise SourceError(
        f'ImageNet: put {what} (ILSVRC2012, from image-net.org) into {folders[0]}, or set config.data.data_dir to the'
        ' folder in which TFDS has prepared imagenet2012'
    )
