"""The inventory of a source: names, sizes and times of its files, for the detection of changes without reading images.

`alexnet prepare` stores the inventory in the manifest of a prepared data set, and a run compares it with the source.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

from alexnet_jax.paths import shown
from alexnet_jax.runtime.files import JsonObject, json_digest

# Files and folders that operating systems, file servers and programs create, in lower case.
_LITTER = frozenset(
    ('__macosx', '__pycache__', '@eadir', '#recycle', '$recycle.bin', 'lost+found', 'system volume information')
) | {'thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r'}
# Endings of texts and programs, which are no data. A file with the labels of a source is a root of its own.
_TEXTS = (
    'txt csv tsv json jsonl xml md rst pdf html htm css js yaml yml toml ini cfg conf log lst py pyc ipynb sh bat'
    ' doc docx xls xlsx ppt pptx odt rtf lnk url lock tmp part crdownload md5 sha256'
)
TEXT_ENDINGS = tuple(f'.{ending}' for ending in _TEXTS.split())
MANY_FILES = 100_000  # in larger sources, the files are looked at only if a folder has changed
MANY_FOLDERS = 10_000  # an inventory with more folders does not list them
SHOWN_FOLDERS = 3


@dataclasses.dataclass(frozen=True)
class Inventory:
    """The files of a source without hidden files, system files, texts and programs.

    Attributes:
      roots: absolute paths of the files and folders of the source.
      files: number of files.
      digest: SHA-256 of the names, sizes in bytes and times (of the last change, in ns) of all files.
      folder_digest: SHA-256 of the names and times of all folders.
      folders: for each folder, the number of files directly in it and a digest of their names, sizes and times. The
        names are relative to the folder that contains all roots; {} if there are more than MANY_FOLDERS.
    """

    roots: list[str]
    files: int
    digest: str
    folder_digest: str
    folders: dict[str, tuple[int, str]]


def is_litter(name: str) -> bool:
    """Returns whether a file or folder is no part of a source, because it is hidden or a system file."""
    return name.startswith('.') or name.lower() in _LITTER


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether `entry` is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def take_inventory(roots: Sequence[str], excluded: str) -> Inventory:
    """Returns the inventory of the files and folders `roots`, without the folder `excluded`.

    Raises OSError: a folder cannot be read.
    """
    base = _base(roots)
    folders: dict[str, tuple[int, str]] = {}
    times: dict[str, int] = {}
    single: dict[str, list[str]] = {}  # roots that are files, by folder
    for root in roots:
        if not os.path.isdir(root) and os.path.lexists(root):
            single.setdefault(os.path.relpath(os.path.dirname(root), base), []).append(root)
    for root in roots:
        for folder, time, names in _walk(root, excluded, ()):
            name = os.path.relpath(folder, base)
            times[name] = time
            paths = [os.path.join(folder, file) for file in names] + single.pop(name, [])
            folders[name] = len(paths), _digest(paths)
    folders |= {name: (len(paths), _digest(paths)) for name, paths in single.items()}
    return Inventory(
        roots=list(roots),
        files=sum(count for count, _ in folders.values()),
        digest=json_digest(folders),
        folder_digest=json_digest(times),
        folders=folders if len(folders) <= MANY_FOLDERS else {},
    )


def _base(roots: Sequence[str]) -> str:
    """Returns the folder that contains all roots; '/' if there are none."""
    return os.path.commonpath([os.path.dirname(root) for root in roots] or ['/'])


def _walk(folder: str, excluded: str, parents: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int, list[str]]]:
    """Yields each folder with its time and the names of its files. `parents` has device and inode of the parents.

    Folders of runs, and folders that contain nothing else, are no part of a source.
    """
    if not os.path.isdir(folder) or folder == excluded:
        return
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in parents:  # a link to a folder that contains the link
        return
    try:
        with os.scandir(folder) as iterator:
            entries = [entry for entry in iterator if _counts(entry.name)]
    except PermissionError:  # the preparation refuses it if it has images of the source
        return
    folders = {entry.name for entry in entries if is_folder(entry)}
    runs = {name for name in folders if is_run(os.path.join(folder, name))}
    if runs and len(runs) == len(entries):
        return
    yield folder, status.st_mtime_ns, [entry.name for entry in entries if entry.name not in folders]
    for name in sorted(folders - runs):
        yield from _walk(os.path.join(folder, name), excluded, (*parents, identity))


def _counts(name: str) -> bool:
    return not (is_litter(name) or name.lower().endswith(TEXT_ENDINGS))


def is_run(folder: str) -> bool:
    """Returns whether `folder` is that of a run, whose files are no part of a source."""
    return all(os.path.exists(os.path.join(folder, name)) for name in ('checkpoints', 'config.json'))


def _digest(paths: list[str]) -> str:
    """Returns a digest of the names, sizes and times of files; a missing file has the size -1."""
    lines = []
    for path in paths:
        try:
            status = os.stat(path)
            lines.append((os.fsencode(os.path.basename(path)), status.st_size, status.st_mtime_ns))
        except OSError:  # a dangling link
            lines.append((os.fsencode(os.path.basename(path)), -1, 0))
    return hashlib.sha256(repr(sorted(lines)).encode()).hexdigest()[:16]


def describe_change(recorded: JsonObject | None, excluded: str) -> str | None:
    """Returns how the source differs from `recorded`, the inventory in a manifest, as part of a sentence.

    Returns None if the source is unchanged, missing or unreadable, or if the data set has no inventory.
    """
    if recorded is None:
        return None
    before = Inventory(**recorded)
    if not any(os.path.exists(root) for root in before.roots):
        return None
    try:
        if before.files > MANY_FILES and _folder_digest(before.roots, excluded) == before.folder_digest:
            return None
        now = take_inventory(before.roots, excluded)
    except OSError:
        return None
    if now.digest == before.digest:
        return None
    count = f'{before.files:,} files before, {now.files:,} now'
    changes = _changes(before, now)
    more = f', and changes in {len(changes) - SHOWN_FOLDERS:,} more folders' if len(changes) > SHOWN_FOLDERS else ''
    return f'{count}{": " if changes else ""}{", ".join(changes[:SHOWN_FOLDERS])}{more}'


def _folder_digest(roots: Sequence[str], excluded: str) -> str:
    """Returns Inventory.folder_digest without looking at the files."""
    base = _base(roots)
    walked = (found for root in roots for found in _walk(root, excluded, ()))
    return json_digest({os.path.relpath(folder, base): time for folder, time, _ in walked})


def _changes(before: Inventory, now: Inventory) -> list[str]:
    """Returns one text for each folder with changes: first new and missing folders, then the others."""
    texts = []
    for name in before.folders.keys() | now.folders.keys():
        (old, old_digest), (new, new_digest) = (found.folders.get(name, (0, '')) for found in (before, now))
        if name not in before.folders:
            texts.append((0, name, f'new folder {shown(name)} ({_files(new)})'))
        elif name not in now.folders:
            texts.append((1, name, f'folder {shown(name)} is gone ({_files(old)})'))
        elif new != old:
            texts.append((2, name, f'{_files(abs(new - old), "more" if new > old else "fewer")} in {shown(name)}'))
        elif new_digest != old_digest:
            texts.append((3, name, f'changed files in {shown(name)}'))
    return [text for _, _, text in sorted(texts)]


def _files(count: int, adjective: str = '') -> str:
    return ' '.join(filter(None, [f'{count:,}', adjective, 'file' if count == 1 else 'files']))
