"""Folders of images: one folder per class."""

import os
from pathlib import Path

import numpy as np

from alexnet_jax.prepare.raw_sources import FileExamples, Source, SourceError, hold_out
from alexnet_jax.prepare.splits import choose_splits, split_kind


def open_folder(root: Path, fraction: float, validation_split: str | None) -> Source:
    """Opens a source with one folder per class, in train/ or, if there is no train/, in `root`.

    splits.choose_splits() chooses the folder of validation images next to train/. If there is none, `fraction` of the
    training images is held out.
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
    if not has_train:
        return Source(hold_out(train, fraction, str(root)), classes, True, roots=(str(root),))
    found = [name for name in _subfolders(root) if split_kind(name)]
    choice = choose_splits(found, validation_split, str(root))
    held = choice.validation
    if held is None:
        splits = hold_out(train, fraction, str(root))
        origins = {'train': 'train/', 'validation': f'{fraction:.0%} of each class of train/'}
    else:
        unknown = sorted(set(_subfolders(root / held)) - set(classes))
        if unknown:
            raise SourceError(f'{root / held / unknown[0]} is a class that is missing from {root / "train"}')
        splits = {'train': train, 'validation': _files(root, held, classes)}
        if not len(splits['validation']):
            raise SourceError(f'{root / held} has no images in its class folders')
        origins = {'train': 'train/', 'validation': f'{held}/'}
    return Source(splits, classes, held is None, origins, choice.notes, roots=(str(root),))


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
