"""Files of images in folders: which files and folders count, and which are ignored."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized

import numpy as np

from alexnet_jax.data.inventory import TEXT_ENDINGS, is_folder, is_litter, is_run
from alexnet_jax.paths import shown
from alexnet_jax.prepare.raw_sources import FileExamples, SourceError

Files = list[tuple[str, int]]  # (path relative to the root of the source, size in bytes)

HEADER = 'path,label[,split]'  # of labels.csv
REMEDY = f'make a folder for each class, or list the images in labels.csv with the header {HEADER}'
IMAGES, EMPTY, OTHER = 'images', 'empty', 'other'  # contents of a folder, see content_of()
_SHOWN = {'*run': 'folders of runs'}  # by the kind of what is ignored
_OTHER_ENDINGS = frozenset(TEXT_ENDINGS) | {
    f'.{ending}'
    for endings in (
        'names labels npz npy pkl pickle mat h5 hdf5 parquet arrow feather tfrecord record rec idx db sqlite',
        'pt pth ckpt onnx safetensors zip tar gz tgz bz2 xz 7z rar exe dll so',
        'mp4 avi mov mkv webm wmv mpg mpeg wav mp3 flac',
    )
    for ending in endings.split()
}


def list_folder(folder: str | os.PathLike[str], ignored: Counter[str]) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Returns the sorted names of the folders in `folder`, and its image files in any order; see entries_of()."""
    folders, images = [], []
    for entry, is_dir in entries_of(folder, ignored):
        if is_dir:
            folders.append(entry.name)
        else:
            images.append(entry)
    return sorted(folders), images


def entries_of(folder: str | os.PathLike[str], ignored: Counter[str]) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """Yields the folders and the image files in `folder`, each with whether it is a folder.

    A file counts as an image unless its ending says otherwise. The function counts in `ignored` what is ignored:
    '*.txt' for other files, '*run' for folders of runs, and names such as '.git/' or 'Thumbs.db' for system files.

    Raises SourceError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if is_litter(name):
                    ignored[_kind_of_litter(entry)] += 1
                elif is_folder(entry):
                    if is_run(entry.path):
                        ignored['*run'] += 1
                    else:
                        yield entry, True
                elif (ending := os.path.splitext(name)[1].lower()) in _OTHER_ENDINGS:
                    ignored[f'*{ending}'] += 1
                else:
                    yield entry, False
    except OSError as error:
        raise SourceError(f'config.data.source: {os.fspath(folder)} cannot be read: {error.strerror}') from None


def content_of(folder: str | os.PathLike[str]) -> str:
    """Returns IMAGES if there is an image in `folder` or below, EMPTY if there is no file at all, otherwise OTHER."""
    others = Counter[str]()
    if next(images_below(folder, others), None):
        return IMAGES
    return OTHER if has_other_files(others) else EMPTY


def images_below(folder: str | os.PathLike[str], ignored: Counter[str]) -> Iterator[os.DirEntry[str]]:
    """Yields the images in `folder` and below. A folder to which several links lead is read once."""
    pending, seen = [os.fspath(folder)], set()
    while pending:
        current = pending.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        for entry, is_dir in entries_of(current, ignored):
            if is_dir:
                pending.append(entry.path)
            else:
                yield entry


def has_other_files(ignored: Counter[str]) -> bool:
    """Returns whether `ignored` counts files that are neither images nor system files."""
    return any(name.startswith('*') for name in ignored)


def files_below(root: str, folder: str, ignored: Counter[str]) -> Files:
    """Returns the images in `folder` and below, in any order, with paths relative to `root`.

    Raises SourceError: a folder cannot be read, or a link leads to a folder that contains the link.
    """
    files: Files = []
    pending: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]  # with real paths of parents
    while pending:
        current, parents = pending.pop()
        folders, images = list_folder(current, ignored)
        files += sized(root, images)
        for name in folders:
            path = os.path.join(current, name)
            real = os.path.realpath(path)
            if any(f'{parent}{os.sep}'.startswith(f'{real}{os.sep}') for parent in parents):
                raise SourceError(f'{path} is a link to a folder that contains it; remove the link')
            pending.append((path, (*parents, real)))
    return files


def sized(root: str, images: Iterable[os.DirEntry[str]]) -> Files:
    """Returns the paths of `images`, relative to `root`, and their sizes; -1 for a link to nothing."""
    start = len(os.path.join(root, ''))
    return [(image.path[start:], size_of(image)) for image in images]


def size_of(file: os.DirEntry[str] | str) -> int:
    """Returns the size of a file in bytes, or -1 if it cannot be read; the preparation then skips and reports it."""
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):
        return -1


def examples_of(root: str, files: Mapping[str, Files], class_names: list[str]) -> FileExamples:
    """Returns the examples in `files`, which has the files of each class, sorted by class and path."""
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        for path, size in sorted(files.get(name, ())):
            names.append(path)
            sizes.append(size)
            labels.append(label)
    return FileExamples(root, names, sizes, np.array(labels, np.int32))


def counted(images: Sized) -> str:
    """Returns the number of images as text."""
    return f'{len(images):,} image{"" if len(images) == 1 else "s"}'


def shortened(names: Iterable[str], most: int = 5) -> str:
    """Returns the first names of a list as text, and the number of those left out."""
    names = [shown(name) for name in names]
    more = [f'{len(names) - most:,} more'] if len(names) > most else []
    *first, last = [*names[:most], *more]
    return f'{", ".join(first)} and {last}' if first else last


def describe_ignored(ignored: Counter[str]) -> list[str]:
    """Returns at most two lines about the files and folders that `ignored` counts."""
    lines = []
    for is_other, what in ((True, 'not read as images'), (False, 'ignored as system files or hidden files')):
        names = [name for name in sorted(ignored) if name.startswith('*') == is_other]
        if names:
            lines.append(f'{what}: {shortened([f"{ignored[name]:,} {_SHOWN.get(name, name)}" for name in names], 10)}')
    return lines


def _kind_of_litter(entry: os.DirEntry[str]) -> str:
    """Returns the name under which a system file or hidden file is counted."""
    if is_folder(entry):
        return f'{entry.name}/'
    if entry.name.startswith('._'):
        return '._*'  # AppleDouble files: one per file
    return entry.name if entry.name == '.DS_Store' or not entry.name.startswith('.') else '.*'
