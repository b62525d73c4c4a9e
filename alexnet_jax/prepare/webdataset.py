"""Tar files of WebDataset. Members with the same key, the path up to the first dot of the name, are one example."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Integer

from alexnet_jax.data.images import UnreadableImage
from alexnet_jax.data.split_names import split_word
from alexnet_jax.paths import shown
from alexnet_jax.prepare.raw_sources import Indices, Labels, RawExample, Source, SourceError
from alexnet_jax.prepare.record_files import (
    FoundFiles,
    LabelColumn,
    RawSplit,
    find_files,
    open_one_split,
    open_splits,
)
from alexnet_jax.prepare.tar_index import TarIndex
from alexnet_jax.prepare.tar_members import Member, read_members

_COMPRESSED_ENDINGS = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')
_CLASS_FILES = ('classes.txt', 'classnames.txt')  # beside the tar files, one name per line
_MAX_FILES = 100_000
_MAX_TEXT_BYTES = 1 << 20  # of a file of class names
_MAX_IMAGE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class TarExamples:
    """Images in tar files.

    Attributes:
      root: folder of the data set.
      files: paths of the tar files relative to `root`.
      lengths: sizes of the tar files in bytes.
      numbers: position of the tar file of each image in `files`.
      headers: position of the header of each image in its tar file.
      labels: one label per image.
    """

    root: str
    files: tuple[str, ...]
    lengths: tuple[int, ...]
    numbers: Integer[np.ndarray, ' n']
    headers: Integer[np.ndarray, ' n']
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> RawExample:
        with self._open(index) as (descriptor, member):
            if member.problem is not None:
                raise UnreadableImage(f'{member.problem}, not an image file')
            if member.size > _MAX_IMAGE_BYTES:
                raise UnreadableImage(f'{member.size:,} bytes, more than an image has')
            return os.pread(descriptor, member.size, member.start), int(self.labels[index])

    @contextlib.contextmanager
    def _open(self, index: int) -> Iterator[tuple[int, Member]]:
        path = os.path.join(self.root, self.files[self.numbers[index]])
        with open(path, 'rb', buffering=0) as file:
            try:
                yield file.fileno(), next(read_members(file.fileno(), path, int(self.headers[index])))
            except (SourceError, StopIteration):
                raise UnreadableImage('the tar file was changed during the preparation') from None

    def name(self, index: int) -> str:
        """Returns the paths of the tar file and of the member, or its position if it cannot be read."""
        file = self.files[self.numbers[index]]
        try:
            with self._open(index) as (_, member):
                return f'{file}/{member.name}'
        except (UnreadableImage, OSError):
            return f'{file} byte {self.headers[index]}'

    def subset(self, indices: Indices) -> 'TarExamples':
        """Returns the examples at `indices`."""
        used, numbers = np.unique(self.numbers[indices], return_inverse=True)
        files, lengths = tuple(self.files[i] for i in used), tuple(self.lengths[i] for i in used)
        return TarExamples(
            self.root, files, lengths, numbers.astype(np.int32), self.headers[indices], self.labels[indices]
        )

    def digest(self) -> str:
        """Returns the digest of the names and sizes of the tar files, the positions and the labels."""
        arrays = self.numbers.tobytes() + self.headers.tobytes() + self.labels.tobytes()
        return hashlib.sha256(json.dumps([self.files, self.lengths]).encode() + arrays).hexdigest()


def open_webdataset(pattern: str, fraction: float, validation_split: str | None) -> Source:
    """Opens tar files.

    Args:
      pattern: a folder of tar files, or the path of one, which may contain lists {a,b}, ranges {000..146} and *.
      fraction, validation_split: see sources.open_source().

    Raises SourceError: files are missing, compressed, truncated or corrupt, or a split has no labels.
    """
    found, notes = _find_splits(pattern)
    source = open_splits(*found, fraction, validation_split)
    return dataclasses.replace(source, notes=(*source.notes, *notes))


def open_webdataset_split(pattern: str, split: str | None) -> Source:
    """Opens one split of tar files, see open_webdataset() and sources.open_split()."""
    found, notes = _find_splits(pattern)
    source = open_one_split(*found, split)
    return dataclasses.replace(source, notes=(*source.notes, *notes))


def _find_splits(pattern: str) -> tuple[FoundFiles, list[str]]:
    """Finds the tar files of a source; also returns notes. Raises SourceError: see open_webdataset()."""
    paths = find_tars(pattern)
    folder = os.path.abspath(os.path.expanduser(pattern))
    root = folder if os.path.isdir(folder) else os.path.commonpath([os.path.dirname(path) for path in paths])
    files = [os.path.relpath(path, root) for path in paths]
    class_file = _find_class_file(root)
    names = _read_class_names(class_file) if class_file else None
    roots = [folder] if os.path.isdir(folder) else paths
    roots += [class_file] if class_file else []
    notes = [f'{class_file} has the names of the {len(names)} classes'] if names is not None else []
    return (pattern, files, functools.partial(_open_split, root, names), tuple(roots)), notes


def find_tars(pattern: str) -> list[str]:
    """Returns the absolute paths of the tar files that match `pattern`, sorted except for the order of lists.

    Raises SourceError: there are none, or some are missing or compressed.
    """
    pattern = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isdir(pattern):
        paths = [os.path.join(pattern, file) for file in find_files(pattern, ('.tar', *_COMPRESSED_ENDINGS))]
        if not paths:
            raise SourceError(f'config.data.source: {pattern} has no tar files')
    else:
        wanted = [pattern] if os.path.exists(pattern) else list(itertools.islice(_expand(pattern), _MAX_FILES + 1))
        if len(wanted) > _MAX_FILES:
            raise SourceError(f'config.data.source: {shown(pattern)} has more than {_MAX_FILES:,} files')
        found = {path: [path] if os.path.exists(path) else sorted(glob.glob(path)) for path in wanted}
        missing = [path for path, matches in found.items() if not matches]
        if missing == [pattern]:
            raise SourceError(f'config.data.source: no tar file matches wds:{shown(pattern)}')
        if missing:
            raise SourceError(
                f'config.data.source: {len(missing)} of the {len(found)} tar files of wds:{shown(pattern)} are missing;'
                f' the first is {shown(missing[0])}'
            )
        paths = list(dict.fromkeys(path for matches in found.values() for path in matches))
    compressed = next((path for path in paths if path.lower().endswith(_COMPRESSED_ENDINGS)), None)
    if compressed is not None:
        raise SourceError(
            f'config.data.source: {shown(compressed)} is compressed, without random access; decompress it (gunzip), or'
            ' leave it out of the pattern'
        )
    other = next((path for path in paths if not os.path.isfile(path)), None)
    if other is not None:
        raise SourceError(f'config.data.source: {shown(other)} is not a file; wds:PATTERN takes tar files')
    return paths


def _expand(pattern: str) -> Iterator[str]:
    """Yields the paths of a pattern with lists {a,b} and ranges {000..146}, which may be nested."""
    braces = re.search(r'\{([^{}]*)\}', pattern)
    if braces is None:
        yield pattern
        return
    bounds = re.fullmatch(r'([0-9]{1,18})\.\.([0-9]{1,18})', braces[1])
    if bounds is None and ',' not in braces[1]:
        raise SourceError(
            f'config.data.source: {shown(braces[0])} in wds:{shown(pattern)} is neither a list {{a,b}} nor a range'
            ' {000..146}'
        )
    if bounds is None:
        choices: Iterator[str] = iter(braces[1].split(','))
    else:
        width = max(map(len, bounds.groups())) if any(bound.startswith('0') for bound in bounds.groups()) else 0
        choices = (f'{number:0{width}}' for number in range(int(bounds[1]), int(bounds[2]) + 1))
    for choice in choices:
        yield from _expand(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _find_class_file(root: str) -> str | None:
    """Returns the file with the class names in `root`, or beside `root` if it is named like a split, or None."""
    folders = [root, os.path.dirname(root)] if split_word(os.path.basename(root)) else [root]
    paths = (os.path.join(folder, name) for folder in folders for name in _CLASS_FILES)
    return next(filter(os.path.isfile, paths), None)


def _read_class_names(path: str) -> list[str]:
    """Returns the class names in a file. Raises SourceError: it is no text."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            return [line.strip() for line in file.read(_MAX_TEXT_BYTES).splitlines() if line.strip()]
    except ValueError:
        raise SourceError(f'{path} is not UTF-8 text with one class name per line') from None


def _open_split(root: str, class_names: list[str] | None, files: Sequence[str]) -> RawSplit:
    """Indexes the tar files of a split."""
    index = TarIndex()
    lengths = []
    for file in files:
        try:
            index.add(os.path.join(root, file))
            lengths.append(os.path.getsize(os.path.join(root, file)))
        except OSError as error:
            raise SourceError(f'{os.path.join(root, file)} cannot be read ({error.strerror})') from None
    numbers = np.repeat(np.arange(len(files), dtype=np.int32), index.counts)
    headers, codes = np.frombuffer(index.headers, np.int64), np.frombuffer(index.codes, np.int32)
    if not np.any(codes >= 0):
        endings = ', '.join(f'.{shown(ending)}' for ending, _ in index.endings.most_common(8)) or 'none'
        raise SourceError(
            f'config.data.source: {shown(files[0])} has no images with labels: images end in .jpg, .png and so on, and'
            f' their labels in .cls, or .json with the field label; the endings of its members are {endings}'
        )

    def examples(positions: Integer[np.ndarray, ' m'], labels: Labels) -> TarExamples:
        return TarExamples(root, tuple(files), tuple(lengths), numbers[positions], headers[positions], labels)

    name = examples(np.arange(len(codes)), np.zeros(len(codes), np.int32)).name
    return RawSplit(LabelColumn(index.values(), codes), examples, name, class_names, index.notes())
