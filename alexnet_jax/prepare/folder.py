"""Folders of images: one folder per class, a flat folder with a file of labels, or a table of images and classes."""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

from alexnet_jax.data.split_names import TEST, TRAIN, is_plain_split, split_kind
from alexnet_jax.prepare.folder_layout import enter, find_split_folders, inside_split, is_flat
from alexnet_jax.prepare.folder_reader import FolderReader
from alexnet_jax.prepare.image_files import (
    HEADER,
    Files,
    describe_ignored,
    examples_of,
    images_below,
    list_folder,
    shortened,
    sized,
)
from alexnet_jax.prepare.label_table import LabelTable, find_table, read_table
from alexnet_jax.prepare.raw_sources import FileExamples, Source, SourceError, held_out_share, hold_out
from alexnet_jax.prepare.splits import choose_one_split, choose_splits


def open_folder(root: Path, fraction: float, validation_split: str | None) -> Source:
    """Opens a folder of images.

    The folder has a table of images and classes, or folders of splits with one folder per class, or one folder per
    class. A flat folder of validation images gets its labels from label_files.label_flat_folder(). The function
    splits.choose_splits() chooses the splits. If there is no validation split, `fraction` of the training images is
    held out.

    Raises SourceError: the folder has another form, or its splits or classes are ambiguous.
    """
    reader = _enter(root)
    inner = reader.root
    table = find_table(inner)
    if table is not None:
        return _open_table(reader, table, fraction, validation_split)
    names = find_split_folders(inner)
    if names is not None:
        return _open_splits(reader, names, fraction, validation_split)
    if validation_split is not None:
        remedy = '; '.join(['its folders are classes', *_siblings(inner)])
        raise SourceError(
            f'config.data.validation_split: {validation_split!r}, but {inner} has no folders of splits; {remedy}'
        )
    classes, _ = reader.read_classes(inner)
    tables = [f'*{ending}' for ending in ('.csv', '.tsv') if reader.ignored[f'*{ending}']]
    if len(classes) == 1 and tables:
        raise SourceError(
            f'config.data.source: {inner} has one folder of images, {next(iter(classes))}/, and a table'
            f' ({tables[0]}) that is not read; to read the classes from it, name it labels.csv, with the header'
            f' {HEADER}'
        )
    reader.notes += [*_siblings(inner), *_classes_named_like_splits(list(classes))]
    return _source(
        reader, classes, None, ('the folders of the classes', f'{100 * fraction:g}% of each class'), fraction
    )


def _enter(root: Path) -> FolderReader:
    """Returns the reader of the folder in `root` that contains the splits or classes, see folder_layout.enter()."""
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        raise SourceError(
            f'config.data.source: {root} is not a folder; DIR of folder:DIR must contain one folder per class'
        )
    inner = enter(root)
    reader = FolderReader(inner)
    if inner != root:
        reader.notes.append(f'the images are read from {inner}')
        for folder in (root, *(parent for parent in inner.parents if root in parent.parents)):
            _, images = list_folder(folder, reader.ignored)
            reader.note_strays(folder, images)
    return reader


def open_folder_split(root: Path, split: str | None, labeled: bool = True) -> Source:
    """Opens one split of a folder of images, see sources.open_split().

    A folder of classes, and a table or a flat folder without splits, are one split, which is called 'all'.

    Raises SourceError: there is no such split, or it has another form than those that open_folder() reads.
    """
    reader = _enter(root)
    inner = reader.root
    table, names = find_table(inner), find_split_folders(inner)
    chosen, labels_from, numbered = 'all', '', False
    part = inner
    if table is not None:
        rows = read_table(table)
        if rows.splits is not None:
            chosen = choose_one_split(set(rows.splits), split, str(table))
        files, has_names = reader.read_table(rows, chosen)
        numbered, labels_from = not has_names, f' with {table.name}'
    else:
        if names is not None:
            chosen = choose_one_split(names, split, str(inner))
            part = inside_split(inner / chosen)
        if is_flat(part) and list_folder(part, Counter())[1]:
            files, labels_from = _read_flat(reader, part, names or [], labeled)
        else:
            files, has_names = reader.read_classes(part)
            numbered = not has_names
    if split is not None and chosen == 'all':
        raise SourceError(f'--split: {split!r}, but {inner} has no splits; omit the flag')
    classes = [name for name in files if name]
    examples = examples_of(str(inner), files, classes or [''])
    if not classes:
        examples = dataclasses.replace(examples, labels=np.full(len(examples), -1, np.int32))
    notes = tuple(reader.notes + describe_ignored(reader.ignored))
    place = 'the folders of the classes' if part == inner and not labels_from else _relative(part, inner)
    origins = {chosen: place + labels_from}
    return Source({chosen: examples}, classes, False, origins, notes, not numbered, tuple(reader.roots))


def _read_flat(reader: FolderReader, folder: Path, splits: list[str], labeled: bool) -> tuple[dict[str, Files], str]:
    """Returns the files of each class in a flat folder, and where the labels come from.

    Without labels, if `labeled` is False, all files belong to the class ''.
    """
    train = next((inside_split(reader.root / name) for name in splits if split_kind(name) == TRAIN), None)
    classes = [] if train is None or is_flat(train) else list_folder(train, Counter())[0]
    try:
        files, origin = reader.read_flat(folder, classes)
    except SourceError:
        if labeled:
            raise
        return {'': sized(str(reader.root), list_folder(folder, Counter())[1])}, ''
    return {name: files[name] for name in sorted(files)}, origin


def _open_splits(reader: FolderReader, names: list[str], fraction: float, validation_split: str | None) -> Source:
    """Opens the folders `names` as splits."""
    root = reader.root
    folders, images = list_folder(root, reader.ignored)
    reader.note_strays(root, images)
    parts = {name: inside_split(root / name) for name in names}
    unlabeled = [name for name, part in parts.items() if split_kind(name) == TEST and is_flat(part)]
    usable = [name for name in names if name not in unlabeled or validation_split is not None]
    choice = choose_splits(usable, validation_split, str(root))
    if choice.validation is not None and parts[choice.train].samefile(parts[choice.validation]):
        raise SourceError(
            f'config.data.source: {root / choice.train} and {root / choice.validation} are the same folder'
        )
    train, names_classes = reader.read_classes(parts[choice.train])
    origin = _relative(parts[choice.train], root)
    validation, labels_from = None, ''
    if choice.validation is None:
        held_origin = held_out_share(fraction, origin)
    else:
        part = parts[choice.validation]
        validation, labels_from = reader.read_labeled(part, parts[choice.train], list(train))
        held_origin = _relative(part, root) + labels_from
    reader.notes += choice.notes
    reader.notes += [f'{name} is not used; it has no classes' for name in unlabeled if name not in usable]
    others = [f'{name}/' for name in folders if name not in names and not reader.is_label_folder(name)]
    if others:
        reader.notes.append(f'{shortened(others)} {"are" if len(others) > 1 else "is"} not used')
    return _source(reader, train, validation, (origin, held_origin), fraction, names_classes)


def _open_table(reader: FolderReader, path: Path, fraction: float, validation_split: str | None) -> Source:
    """Opens a table of images and classes."""
    table = read_table(path)
    validation = None
    if table.splits is None:
        if validation_split is not None:
            raise SourceError(f'config.data.validation_split: {validation_split!r}, but {path} has no column split')
        train, names_classes = reader.read_table(table)
        origins = path.name, held_out_share(fraction, path.name)
    else:
        choice = choose_splits(set(table.splits), validation_split, str(path))
        train, names_classes = reader.read_table(table, choice.train)
        origins = f'{choice.train} in {path.name}', held_out_share(fraction, choice.train)
        if choice.validation is not None:
            validation, _ = reader.read_table(table, choice.validation)
            origins = origins[0], f'{choice.validation} in {path.name}'
            unknown = sorted(set(validation) - set(train))
            if unknown:
                raise SourceError(
                    f'{path}: the class {unknown[0]} has images in {choice.validation}, but none in {choice.train};'
                    ' add training images, or remove the rows of the class'
                )
        reader.notes += choice.notes
    reader.notes += _not_in_table(reader, table)
    return _source(reader, train, validation, origins, fraction, names_classes)


def _source(
    reader: FolderReader,
    train: Mapping[str, Files],
    validation: Mapping[str, Files] | None,
    origins: tuple[str, str],
    fraction: float,
    names_classes: bool = True,
) -> Source:
    """Returns the source with the files of each class, after part of them is held out if `validation` is None."""
    root, classes = str(reader.root), list(train)
    examples = examples_of(root, train, classes)
    splits: Mapping[str, FileExamples]
    if validation is None:
        splits = cast(dict[str, FileExamples], hold_out(examples, fraction, root))
    else:
        splits = {'train': examples, 'validation': examples_of(root, validation, classes)}
    notes = tuple(reader.notes + describe_ignored(reader.ignored))
    named_origins = dict(zip(('train', 'validation'), origins, strict=True))
    return Source(splits, classes, validation is None, named_origins, notes, names_classes, tuple(reader.roots))


def _not_in_table(reader: FolderReader, table: LabelTable) -> list[str]:
    """Returns lines about the folders and images that are not used because there is a table."""
    notes, listed = [], set(table.paths)
    if len(list_folder(reader.root, Counter())[0]) > 1:
        notes.append(f'{table.file.name} gives the classes of the images; the names of the folders do not')
    start = len(os.path.join(reader.root, ''))
    found = (image.path[start:] for image in images_below(reader.root, reader.ignored))
    unlisted = [path for path in found if path not in listed]
    reader.ignored -= Counter([f'*{table.file.suffix.lower()}'])  # the table itself, which is read
    if unlisted:
        notes.append(f'not used, because {table.file.name} does not list them: {shortened(sorted(unlisted), 1)}')
    return notes


def _siblings(root: Path) -> list[str]:
    """Returns a line about the splits next to `root` if `root` is itself a split."""
    if not is_plain_split(root.name):
        return []
    siblings, _ = list_folder(root.parent, Counter())
    others = [name for name in siblings if is_plain_split(name) and name != root.name]
    if not others:
        return []
    verb = 'are' if len(others) > 1 else 'is'
    return [f'{shortened(others)} next to {root} {verb} not used; folder:{root.parent} uses all splits']


def _classes_named_like_splits(classes: list[str]) -> list[str]:
    """Returns a line about the classes that have the name of a split."""
    names = [name for name in classes if is_plain_split(name)]
    return [f'{shortened(names)} is a class, because its folder contains no classes'] if names else []


def _relative(folder: Path, root: Path) -> str:
    return os.path.join(os.path.relpath(folder, root), '')
