"""Sources of raw images: TFDS, a folder with one folder per class, IDX files, and the `photos` data set."""

import gzip
import importlib.util
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, UInt8

from alexnet_jax.paths import check_text_path, check_writable
from alexnet_jax.prepare.raw_sources import (
    ArrayExamples,
    Examples,
    FileExamples,
    Labels,
    Source,
    SourceError,
    TfdsExamples,
    digest,
)
from alexnet_jax.runtime.console import log

# TFDS has disabled its bucket of metadata; each look-up would only leave an empty temporary folder.
tfds.core.DatasetInfo.initialize_from_bucket = lambda info: None

IMAGENET_TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
VALIDATION_SPLIT_NAMES = ('validation', 'val', 'test', 't10k')  # the first existing one is used


def is_local(source: str) -> bool:
    """Returns whether `source` is an existing folder, which open_source() opens without a download or conversion."""
    kind, _, location = source.partition(':')
    return kind in ('folder', 'idx') and os.path.isdir(os.path.expanduser(location))


def open_source(source: str, data_dir: str, validation_fraction: float) -> Source:
    """Opens a source.

    Args:
      source: 'photos', 'tfds:NAME[:config]', 'folder:DIR' or 'idx:DIR'.
      data_dir: folder of the TFDS data sets.
      validation_fraction: fraction of the training images to hold out if the source has no validation split.

    Raises SourceError: the source does not exist, has a wrong format, or cannot be downloaded.
    Raises ConfigError: the path of the source cannot be used, or TFDS would have to write to a read-only `data_dir`.
    """
    kind, _, location = source.partition(':')
    if kind in ('folder', 'idx'):
        check_text_path('config.data.source', location)
    if kind == 'folder':
        return _folder(Path(location).expanduser(), validation_fraction)
    if kind == 'idx':
        return _idx(Path(location).expanduser(), validation_fraction)
    return _tfds(source, data_dir, validation_fraction)


def holdout_mask(labels: Labels, fraction: float) -> Bool[np.ndarray, ' n']:
    """Returns the mask of the examples to hold out: `fraction` of each class, chosen with a fixed seed."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels == label)
        chosen[np.random.default_rng(label).permutation(of_label)[: round(fraction * len(of_label))]] = True
    return chosen


def _split_off(examples: FileExamples | ArrayExamples, fraction: float, root: Path) -> dict[str, Examples]:
    """Holds out `fraction` of `examples` for validation. Raises SourceError: a split would be empty."""
    chosen = holdout_mask(examples.labels, fraction)
    if not chosen.any() or chosen.all():
        raise SourceError(
            f'{root} has no validation split ({", ".join(VALIDATION_SPLIT_NAMES[:3])}), and'
            f' data.validation_fraction={fraction:g} of its {len(chosen)} training images'
            ' leaves no image for validation or none for training'
        )
    return {'train': examples.subset(np.flatnonzero(~chosen)), 'validation': examples.subset(np.flatnonzero(chosen))}


def _folder(root: Path, fraction: float) -> Source:
    """Opens a source with one folder per class, in train/ or, if there is no train/, in `root`.

    The validation split is the first existing folder of validation/, val/, test/ and t10k/ next to train/. If there is
    none, `fraction` of the training images is held out.
    """
    if not root.is_dir():
        raise SourceError(
            f'config.data.source: {root} is not a folder; DIR of folder:DIR must contain one folder per class'
        )
    has_train = (root / 'train').is_dir() and bool(_subfolders(root / 'train'))  # otherwise `train` is a class
    classes = _subfolders(root / 'train' if has_train else root)
    odd = next((name for name in classes if not name.isprintable()), None)  # such as bytes that are not UTF-8
    if odd is not None:
        raise SourceError(f'{root}: rename the folder {odd!r}; the name of a class must be printable text')
    if not classes:
        raise SourceError(f'{root / "train" if has_train else root} has no folders; each class needs its own folder')
    train = _files(root, 'train' if has_train else '', classes)
    if not len(train):
        raise SourceError(f'{root}: the folders of its {len(classes)} classes are empty')
    held = next((name for name in VALIDATION_SPLIT_NAMES if has_train and (root / name).is_dir()), None)
    if held is None:
        splits = _split_off(train, fraction, root)
    else:
        unknown = sorted(set(_subfolders(root / held)) - set(classes))
        if unknown:
            raise SourceError(f'{root / held / unknown[0]} is a class that is missing from {root / "train"}')
        splits = {'train': train, 'validation': _files(root, held, classes)}
        if not len(splits['validation']):
            raise SourceError(f'{root / held} has no images in its class folders')
    return Source(splits, classes, held is None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link; prepare skips and reports it
        return -1


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))


def _files(root: Path, split: str, classes: list[str]) -> FileExamples:
    """Returns all files except hidden ones in the folders of `classes`, sorted by path within each class."""
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_walk(root / split / name, {os.path.realpath(root / split / name)}))
        names += [path[len(str(root)) + 1 :] for path in found]
        labels += [label] * len(found)
    return FileExamples(str(root), names, [_size(root / name) for name in names], np.array(labels, np.int32))


def _walk(folder: Path, seen: set[str]) -> list[str]:
    """Returns all files below `folder` except hidden ones. `seen` has the real paths of `folder` and its parents.

    Raises SourceError: a link leads to a folder that contains the link.
    """
    if not folder.is_dir():
        return []
    with os.scandir(folder) as iterator:
        entries = list(iterator)
    files = []
    for entry in entries:
        if entry.name.startswith('.'):
            continue
        if not entry.is_dir():
            files.append(entry.path)
            continue
        real = os.path.realpath(entry.path)
        if any(f'{other}{os.sep}'.startswith(f'{real}{os.sep}') for other in seen):
            raise SourceError(f'{entry.path} is a link to a folder that contains it; remove the link')
        files += _walk(Path(entry.path), {*seen, real})
    return files


def _idx(folder: Path, fraction: float) -> Source:
    """Opens files in MNIST's format, *train*images*idx3* and *train*labels*idx1*, optionally compressed with gzip.

    The validation split is t10k or test. If there is neither, `fraction` of the training images is held out.
    """
    train = _idx_split(folder, 'train')
    classes = int(train.labels.max()) + 1
    splits: dict[str, Examples] = {'train': train}
    for name in ('t10k', 'test'):
        if list(folder.glob(f'*{name}*idx3*')):
            splits['validation'] = validation = _idx_split(folder, name)
            classes = max(classes, int(validation.labels.max()) + 1)
            break
    holds_out_validation = 'validation' not in splits
    if holds_out_validation:
        splits = _split_off(train, fraction, folder)
    return Source(splits, [str(label) for label in range(classes)], holds_out_validation)


def _idx_split(folder: Path, split: str) -> ArrayExamples:
    """Returns the examples of a split. Raises SourceError: the files are missing or corrupt."""
    arrays = []
    for what, dimensions in (('images', 3), ('labels', 1)):
        found = sorted(folder.glob(f'*{split}*{what}*idx{dimensions}*'))
        if len(found) != 1:
            names = ', '.join(path.name for path in found) or 'none'
            pattern = f'{split}-{what}-idx{dimensions}-ubyte[.gz]'
            raise SourceError(f'config.data.source: {folder} must contain one file {pattern}, but contains {names}')
        arrays.append(_idx_array(found[0], dimensions))
    images, labels = arrays
    if len(images) != len(labels) or not len(images):
        raise SourceError(f'{folder}: {len(images)} {split} images but {len(labels)} labels; the numbers must be equal')
    return ArrayExamples(images, labels, np.arange(len(images)))


def _idx_array(path: Path, dimensions: int) -> UInt8[np.ndarray, '...']:
    """Reads a uint8 array from an IDX file: two zero bytes, 8 for uint8, rank, sizes (4 bytes, big-endian), data."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b'\x1f\x8b' else content
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f'{path} is corrupt: {error}; download it again') from None
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * dimensions], '>u4').tolist())
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != 4 + 4 * dimensions + np.prod(shape, dtype=int):
        raise SourceError(f'{path} is not a complete IDX file of bytes with {dimensions} dimensions; download it again')
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _tfds(source: str, data_dir: str, fraction: float) -> Source:
    builder = _builder(source, data_dir)
    image, label = _image_and_label(builder)
    _download_and_prepare(builder, source, data_dir)
    info = builder.info
    sizes = {name: split.num_examples for name, split in info.splits.items() if split.num_examples}
    if 'train' not in sizes:
        raise SourceError(f'config.data.source: {info.full_name} has no training split; its splits are {sorted(sizes)}')
    held = next((name for name in VALIDATION_SPLIT_NAMES if name in sizes), None)
    if held is None:
        kept = sizes['train'] - round(fraction * sizes['train'])
        names = {'train': f'train[:{kept}]', 'validation': f'train[{kept}:]'}
    else:
        names = {'train': 'train', 'validation': held}
    described = [(name, split.num_examples, split.num_bytes) for name, split in info.splits.items()]
    metadata_digest = digest(info.full_name, *described)
    splits = {}
    for split, name in names.items():
        count = info.splits[name].num_examples
        splits[split] = TfdsExamples(str(builder.data_dir), name, image, label, 0, count, metadata_digest)
        if not count:
            raise SourceError(
                f'{info.full_name} has no validation split, and data.validation_fraction={fraction:g} of its'
                f' {sizes["train"]} training images leaves no image for validation or none for training'
            )
    return Source(splits, list(info.features[label].names), held is None)


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
    if source.partition(':')[0] in ('folder', 'idx'):
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
