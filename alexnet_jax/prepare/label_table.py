"""Tables of images and their classes: labels.csv, labels.tsv, metadata.csv and _classes.csv."""

import contextlib
import dataclasses
import functools
import os
import re
import sys
from pathlib import Path

from alexnet_jax.config import check_class_names
from alexnet_jax.data.split_names import split_kind
from alexnet_jax.prepare.image_files import HEADER, Files, size_of
from alexnet_jax.prepare.label_files import numbered_rows
from alexnet_jax.prepare.raw_sources import SourceError

_EXPLICIT, _HUGGING_FACE, _ROBOFLOW = ('labels.csv', 'labels.tsv'), 'metadata.csv', '_classes.csv'
_TABLES = (*_EXPLICIT, _HUGGING_FACE, _ROBOFLOW)
# The first name precedes the others, which must be unambiguous.
_PATHS = ('path', 'filepath', 'file_path', 'filename', 'file_name', 'file', 'image', 'image_path')
_LABELS = ('label', 'class', 'category', 'target')
_SPLITS = ('split', 'set', 'subset', 'partition')


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """The rows of a table: one path, class and split per image.

    Attributes:
      file: the table.
      paths, classes: one per image; the paths are relative to the folder of the table.
      splits: one per image; None if the table has no splits.
      unused: the names of the columns that are not read.
    """

    file: Path
    paths: list[str]
    classes: list[str]
    splits: list[str] | None
    unused: tuple[str, ...] = ()

    def files(self, root: str, split: str | None = None) -> dict[str, Files]:
        """Returns the files of each class in `split`, or in the whole table, with paths relative to `root`.

        A file that does not exist has the size -1. Raises SourceError: no file exists.
        """
        folder = self.file.parent
        place = os.path.join(folder, '')
        prefix = place.removeprefix(os.path.join(root, ''))
        files: dict[str, Files] = {}
        found = False
        for i, path in enumerate(self.paths):
            if split is None or self.splits is None or self.splits[i] == split:
                size = size_of(place + path)
                files.setdefault(self.classes[i], []).append((prefix + path, size))
                found = found or size >= 0
        if not found:
            raise SourceError(
                f'{self.file}: none of its images exist; the first is {self.paths[0]};'
                f' paths must be relative to {folder}'
            )
        return files


def find_table(folder: Path) -> Path | None:
    """Returns the table in `folder`, whose name may have any case, or None.

    Raises SourceError: there are two tables.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower() in _TABLES and entry.is_file())
        explicit = [name for name in names if name.lower() in _EXPLICIT]
        if len(explicit) > 1:
            raise SourceError(f'config.data.source: {folder} has {" and ".join(explicit)}; keep one of them')
        found = [folder / name for name in sorted(names, key=lambda name: _TABLES.index(name.lower()))]
        return next((path for path in found if path.name.lower() != _HUGGING_FACE or _has_labels(path)), None)
    return None


def read_table(path: Path) -> LabelTable:
    """Reads a table.

    labels.csv has a header with the columns `path` and `label`, and optionally `split`, under these names or synonyms.
    The paths are relative to the folder of the table. If there is no column of splits and each path contains a folder
    whose name says train, validation or test, those folders are the splits.

    Raises SourceError or ConfigError: the message begins with the file and the line.
    """
    rows = numbered_rows(path, _delimiter(path))
    line, header = next(rows, (1, []))
    if not header:
        raise SourceError(f'{path} is empty; its first line must be a header such as {HEADER}')
    is_one_hot = path.name.lower() == _ROBOFLOW  # one column per class after the path
    path_column = 0 if is_one_hot else _column(path, header, _PATHS, ('id',))
    class_column = None if is_one_hot else _column(path, header, _LABELS)
    split_column = None if is_one_hot else _find_column(path, header, _SPLITS)
    used = (path_column, class_column, split_column)
    unused = () if is_one_hot else tuple(name for i, name in enumerate(header) if name and i not in used)
    table = LabelTable(path, [], [], [] if split_column is not None else None, unused)
    lines: list[int] = []
    seen: dict[str, int] = {}
    known: set[str] = set()
    for line, cells in rows:
        where = f'{path}, line {line}'
        if len(cells) != len(header):
            raise SourceError(f'{where}: the number of cells is {len(cells)}, but the header has {len(header)}')
        image = _checked_path(cells[path_column], where)
        name = cells[class_column] if class_column is not None else _marked(header, cells, where)
        split = cells[split_column] if split_column is not None else ''
        if not name or (split_column is not None and not split):
            raise SourceError(f'{where}: the {"split" if name else "class"} of {image} is missing')
        if name not in known:
            check_class_names([name], where)
            known.add(name)
        first = seen.setdefault(image, len(lines))
        if first == len(lines):
            lines.append(line)
            table.paths.append(image)
            table.classes.append(sys.intern(name))
            if table.splits is not None:
                table.splits.append(sys.intern(split))
        elif table.classes[first] != name or (table.splits is not None and table.splits[first] != split):
            what = 'class' if table.classes[first] != name else 'split'
            raise SourceError(f'{where}: {image} has another {what} in line {lines[first]}')
    if not table.paths:
        raise SourceError(f'{path} has a header, but no images')
    return table if table.splits is not None else dataclasses.replace(table, splits=_splits_of_paths(table))


def _splits_of_paths(table: LabelTable) -> list[str] | None:
    """Returns the folder in each path whose name says train, validation or test; None if no path has such a folder.

    Raises SourceError: only some of the paths have such a folder, and these folders are of several splits.
    """
    split_of = functools.cache(lambda folder: next(filter(split_kind, folder.split('/')), ''))
    splits = [split_of(os.path.dirname(path)) for path in table.paths]
    if all(splits):
        return splits
    if len({split_kind(name) for name in splits if name}) > 1:
        name, path = next(filter(None, splits)), table.paths[splits.index('')]
        raise SourceError(
            f'{table.file}: some images are in folders of splits such as {name}, others are not, such as {path};'
            ' add a column split'
        )
    return None


def sorted_classes(names: set[str]) -> tuple[list[str], bool]:
    """Returns the sorted classes, and whether they are names: integers are sorted by value."""
    are_numbers = all(re.fullmatch(r'0|[1-9][0-9]*', name) for name in names)
    return sorted(names, key=int) if are_numbers else sorted(names), not are_numbers


def _delimiter(path: Path) -> str:
    return '\t' if path.suffix.lower() == '.tsv' else ','


def _has_labels(path: Path) -> bool:
    """Returns whether a table of the Hugging Face Hub has labels; others have captions."""
    _, header = next(numbered_rows(path), (1, []))
    return any(name.lower() in _LABELS for name in header)


def _column(path: Path, header: list[str], names: tuple[str, ...], last: tuple[str, ...] = ()) -> int:
    """Returns the position of the required column that _find_column() finds. Raises SourceError: there is none."""
    found = _find_column(path, header, names, last)
    if found is not None:
        return found
    listed = ','.join(header)[:80]
    signs = ((';', 'semicolons'), ('\t', 'tabs'), (',', 'commas'))
    delimiter = next((what for sign, what in signs if sign in listed and len(header) == 1), None)
    if delimiter:
        wanted = 'tabs' if path.suffix.lower() == '.tsv' else 'commas'
        raise SourceError(
            f'{path}, line 1: the columns are separated by {delimiter}, but must be separated by {wanted}'
        )
    raise SourceError(
        f'{path}, line 1: the header {listed!r} has no column {names[0]}; an example of a header is {HEADER};'
        ' rename the file if it is not a list of images'
    )


def _find_column(path: Path, header: list[str], names: tuple[str, ...], last: tuple[str, ...] = ()) -> int | None:
    """Returns the position of the column that has one of `names` in any case, or else one of `last`, or None.

    The first of `names` precedes the others. Raises SourceError: there are several such columns.
    """
    for choice in (names[:1], names, last):
        found = [i for i, name in enumerate(header) if name.lower() in choice]
        if len(found) > 1:
            columns = ' and '.join(header[i] for i in found)
            raise SourceError(f'{path}, line 1: the columns {columns} mean the same; rename one of them to {names[0]}')
        if found:
            return found[0]
    return None


def _marked(header: list[str], cells: list[str], where: str) -> str:
    """Returns the class whose column has a 1, in a table of Roboflow."""
    marked = [name for name, cell in zip(header[1:], cells[1:], strict=True) if cell == '1']
    if len(marked) != 1:
        raise SourceError(f'{where}: {cells[0]} has {len(marked)} classes; each image must have one')
    return marked[0]


def _checked_path(path: str, where: str) -> str:
    """Returns the normalized path of an image. Raises SourceError: the path is empty or leads out of the folder."""
    normalized = os.path.normpath(path.replace('\\', '/')) if path else '.'
    if normalized == '.' or '\0' in path:
        raise SourceError(f'{where}: the path {path!r} is not that of a file')
    if normalized.startswith('/') or re.match('[A-Za-z]:/', normalized):
        raise SourceError(f'{where}: the path {path!r} is absolute; give the path relative to the folder of the table')
    if normalized.split('/')[0] == '..':
        raise SourceError(f'{where}: the path {path!r} leads out of the folder of the table; give a path below it')
    return normalized
