"""Labels of a flat folder of images, from the files that ILSVRC2012, Kaggle, Caffe and Tiny ImageNet provide.

Each reader returns the class of each image, by file name or by file name without its ending.
"""

import csv
import functools
import io
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from alexnet_jax.prepare.image_files import REMEDY, counted, shortened
from alexnet_jax.prepare.raw_sources import SourceError

_DEVKIT = 'ILSVRC2012_devkit_t12'
_TRUTH, _META = 'ILSVRC2012_validation_ground_truth.txt', 'meta.mat'
_MAX_BYTES = 64 * 2**20  # of a label file; that of 50,000 images has at most 3 MB
_PARENTS = 3  # folders above the images folder in which label files are searched: Kaggle's is in ROOT of
# ROOT/ILSVRC/Data/CLS-LOC/val

Labels = dict[str, str]


def label_flat_folder(folder: Path, root: Path, names: Sequence[str], classes: Sequence[str]) -> tuple[str, Labels]:
    """Finds the labels of the images in a flat folder.

    Label files are searched in `folder`, in `root` and in the folders above `root`. A file without a label for any of
    the images is not used. If there is no such file, images with the names of the validation images of ILSVRC2012 get
    the labels in the list that TFDS contains.

    Args:
      folder: the folder of the images.
      root: the folder of the splits.
      names: file names of the images.
      classes: names of the classes, sorted.

    Returns the path of the label file, and the class of each image by file name, for the images with a label.

    Raises SourceError: there is no label file with labels for the images, or the file is corrupt.
    """
    tried = []
    for path, read in _label_files(folder, root, classes):
        labels = _of_images(read(), names)
        if labels:
            return str(path), labels
        tried.append(str(path))
    if any(re.match(r'ILSVRC2012_val_\d{8}\b', name) for name in names):
        labels = _of_images(_numbered(_imagenet_list('validation_labels.txt')), names)
        if labels:
            return 'validation_labels.txt in TFDS', labels
    reason = f' {shortened(tried)} has no label for them;' if tried else ''
    raise SourceError(
        f'config.data.source: {folder} has {counted(names)}, but no folder per class and no file of labels;'
        f'{reason} {REMEDY}'
    )


def _of_images(labels: Labels, names: Sequence[str]) -> Labels:
    found = ((name, labels.get(name) or labels.get(os.path.splitext(name)[0])) for name in names)
    return {name: label for name, label in found if label is not None}


def _label_files(folder: Path, root: Path, classes: Sequence[str]) -> Iterator[tuple[Path, Callable[[], Labels]]]:
    """Yields the paths of the label files around `folder`, each with a function that reads the file."""
    near = [folder, *itertools.takewhile(lambda path: path != root, folder.parents), root]
    far = [*near, *root.parents[:_PARENTS]]
    readers: list[tuple[str, list[Path], Callable[[Path], Labels]]] = [
        ('val_annotations.txt', near, _read_tiny_imagenet),
        ('LOC_val_solution.csv', far, _read_kaggle),
        (_TRUTH, far, _read_devkit_files),
        (f'{_DEVKIT}/data/{_TRUTH}', far, _read_devkit_files),
        (f'{_DEVKIT}.tar.gz', far, _read_devkit_archive),
        ('val.txt', near, lambda path: _read_caffe(path, classes)),
    ]
    for name, places, read in readers:
        for place in places:
            path = place / name
            if path.is_file():
                yield path, functools.partial(read, path)


def _read_kaggle(path: Path) -> Labels:
    """Reads LOC_val_solution.csv: ImageId, and PredictionString with the class and the box of each object."""
    labels: Labels = {}
    for line, cells in numbered_rows(path):
        if cells[:1] == ['ImageId']:
            continue
        objects = cells[1].split()[::5] if len(cells) == 2 else []
        if not objects or len(set(objects)) > 1:
            raise SourceError(
                f'{path}, line {line}: expected an image and one class, but found {",".join(cells)[:80]!r}'
            )
        _add(labels, cells[0], objects[0], path, line)
    return labels


def _read_tiny_imagenet(path: Path) -> Labels:
    """Reads val_annotations.txt: file name, class, and box, separated by tabs."""
    labels: Labels = {}
    for line, cells in numbered_rows(path, '\t'):
        if len(cells) < 2 or not all(cells[:2]):
            raise SourceError(f'{path}, line {line}: expected a file name, a tab and a class, found {cells[0][:80]!r}')
        _add(labels, cells[0], cells[1], path, line)
    return labels


def _read_caffe(path: Path, classes: Sequence[str]) -> Labels:
    """Reads val.txt: file name, a space, and the number of the class in the sorted list of classes, from 0."""
    rows = []
    for line, text in _lines(path):
        if not text.strip():
            continue
        name, _, digits = text.strip().rpartition(' ')
        if not name or not _is_number(digits):
            raise SourceError(
                f'{path}, line {line}: expected a file name and the number of a class, found {text[:80]!r}'
            )
        rows.append((line, os.path.basename(name.strip()), int(digits)))
    names, largest = classes, max((number for *_, number in rows), default=0)
    if largest >= len(classes) and set(classes) <= set(imagenet := _imagenet_list('labels.txt')):
        names = imagenet  # `classes` are a part of those of ImageNet, and the numbers are those of ImageNet
    if largest >= len(names):
        raise SourceError(
            f'{path}: the class {largest} does not exist; the {len(names)} classes have the numbers from 0'
        )
    labels: Labels = {}
    for line, name, number in rows:
        _add(labels, name, names[number], path, line)
    return labels


def _read_devkit_files(path: Path) -> Labels:
    """Reads the ground truth, and meta.mat in the same folder."""
    meta = path.with_name(_META)
    if not meta.is_file():
        raise SourceError(f'{meta} is missing; it has the classes of the numbers in {_TRUTH}')
    return _devkit_labels(_read_bytes(path), _read_bytes(meta), path)


def _read_devkit_archive(path: Path) -> Labels:
    """Reads two files of the archive, without extracting it."""
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = next((name for name in (_TRUTH, _META) if member.name.endswith(f'{_DEVKIT}/data/{name}')), None)
                if name and member.isreg() and member.size <= _MAX_BYTES and (file := archive.extractfile(member)):
                    files[name] = file.read()
                if len(files) == 2:
                    break
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise SourceError(f'{path} is corrupt: {error}; download it again') from None
    if len(files) != 2:
        raise SourceError(f'{path} must contain {_DEVKIT}/data/{_TRUTH} and {_META} beside it; download it again')
    return _devkit_labels(files[_TRUTH], files[_META], path)


def _devkit_labels(truth: bytes, meta: bytes, path: Path) -> Labels:
    """Returns the labels from the numbers of the classes of the development kit, in the order of the images.

    The numbers are those of meta.mat, which has another order than the sorted names of the classes.
    """
    import scipy.io  # type: ignore[import-untyped]

    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)['synsets']
        wnids = {int(synset['ILSVRC2012_ID']): str(synset['WNID']) for synset in np.atleast_1d(synsets)}
    except Exception as error:  # scipy raises many types for corrupt content
        message = ' '.join(str(error).split())
        raise SourceError(f'{path}: meta.mat is corrupt ({type(error).__name__}: {message})') from None
    classes = []
    for line, text in enumerate(truth.decode(errors='replace').split(), 1):
        if not _is_number(text) or int(text) not in wnids:
            raise SourceError(f'{path}: line {line} of the ground truth is {text[:80]!r}, which meta.mat does not have')
        classes.append(wnids[int(text)])
    return _numbered(classes)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10  # int() refuses numbers of thousands of digits


def _numbered(classes: Sequence[str]) -> Labels:
    """Returns the labels of the validation images of ILSVRC2012, which are numbered from 1."""
    return {f'ILSVRC2012_val_{number:08d}': name for number, name in enumerate(classes, 1)}


def _imagenet_list(name: str) -> list[str]:
    """Returns the lines of a file of the imagenet2012 builder of TFDS."""
    path = resources.files('tensorflow_datasets') / 'datasets' / 'imagenet2012' / name
    try:
        return path.read_text().split()
    except OSError as error:
        raise SourceError(f'config.data.source: TFDS has no list of the labels of ImageNet: {error}') from None


def numbered_rows(path: Path, delimiter: str = ',') -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the cells, without surrounding spaces, of each row that is not empty.

    Raises SourceError: the file cannot be read or is not UTF-8 text, or a cell is too long or has an
    opening quotation mark only.
    """
    reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise SourceError(f'{path}, line {reader.line_num}: not valid CSV: {error}') from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the number and the text of each line. Raises SourceError: the file cannot be read."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError:
        raise SourceError(f'{path} is not UTF-8 text; save it as UTF-8') from None
    except OSError as error:
        raise SourceError(f'{path} cannot be read: {error.strerror}') from None


def _read_bytes(path: Path) -> bytes:
    try:
        with open(path, 'rb') as file:
            return file.read(_MAX_BYTES)
    except OSError as error:
        raise SourceError(f'{path} cannot be read: {error.strerror}') from None


def _add(labels: Labels, name: str, label: str, path: Path, line: int) -> None:
    if labels.setdefault(name, label) != label:
        raise SourceError(f'{path}, line {line}: {name} has the class {label}, but {labels[name]} in an earlier line')
