"""Splits and classes of sources whose files contain many examples each: parquet files and tar files."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Integer

from alexnet_jax.data.split_names import TRAIN, split_kind, split_word
from alexnet_jax.paths import shown
from alexnet_jax.prepare.raw_sources import LabeledExamples, Labels, Source, SourceError, held_out_share, hold_out
from alexnet_jax.prepare.splits import choose_one_split, choose_splits

_SHARD_NUMBER = re.compile(r'(^|[-_.])(\d+-of-\d+(-[0-9a-f]+)?|\d+)$')  # Hub: train-00000-of-00002-4bcb11a4f1ba6de3
_MAX_CLASSES = 100_000  # if classes are numbered without names


@dataclasses.dataclass(frozen=True)
class LabelColumn:
    """The labels of a split as its files write them.

    Attributes:
      values: the distinct labels: numbers, or names of classes.
      codes: for each example the position of its label in `values`; -1 if the example has no label.
    """

    values: Sequence[int | str]
    codes: Integer[np.ndarray, ' n']


@dataclasses.dataclass(frozen=True)
class RawSplit:
    """The examples of a split before the classes are numbered.

    Attributes:
      column: the labels.
      examples: returns the examples at the given positions, with the given labels.
      name: returns the name of the example at a position.
      class_names: the class names in the files of the split; None if the files have none.
      notes: what is ignored, one line each.
    """

    column: LabelColumn
    examples: Callable[[Integer[np.ndarray, ' m'], Labels], LabeledExamples]
    name: Callable[[int], str]
    class_names: list[str] | None = None
    notes: tuple[str, ...] = ()


# The first four arguments of open_splits() and open_one_split().
FoundFiles = tuple[str, Sequence[str], Callable[[Sequence[str]], RawSplit], tuple[str, ...]]


def find_files(root: str, endings: tuple[str, ...]) -> list[str]:
    """Returns the sorted paths, relative to `root`, of the files with `endings`, except those in hidden folders.

    Links to folders are followed, and each folder is read once. Raises SourceError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise SourceError(f'{error.filename} cannot be read ({error.strerror})')

    files: list[str] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith('.')]
        if real in seen:
            continue
        seen.add(real)
        found = [name for name in names if name.lower().endswith(endings) and not name.startswith('.')]
        files += [os.path.relpath(os.path.join(folder, name), root) for name in found]
    return sorted(files)


def files_by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Groups the relative paths `files` by split; the name of a file, otherwise its folders, tell the split.

    'data/train-00000-of-00005.parquet', 'train/0000.parquet' and 'imagenet-train-0001.tar' belong to the split 'train'.
    If no path tells a split, all files belong to 'train'. Files that tell no split among others that do are splits of
    their own.
    """
    groups: dict[str, list[str]] = {}
    words = {}
    for file in files:
        folder, base = os.path.split(os.path.splitext(file)[0])
        stem = _SHARD_NUMBER.sub('', base)
        parts = [stem, *reversed(folder.split(os.sep))]
        name = next((part for part in parts if split_word(part)), None)
        groups.setdefault(name or stem or folder or base, []).append(file)
        words[name or stem or folder or base] = split_word(name) if name else None
    if not any(words.values()):
        return {TRAIN: list(files)}
    named = {}
    for name, group in groups.items():
        word = words[name]
        same = [other for other in groups if word and split_kind(words[other] or '') == split_kind(word)]
        named[word if word and len(same) == 1 else name] = group  # train and train_extra are two splits
    return named


def number_classes(
    splits: Mapping[str, RawSplit], names: list[str] | None, where: str
) -> tuple[list[str], dict[str, Labels]]:
    """Returns the class names, and the labels by split; the label of an example that belongs to no class is -1.

    Args:
      splits: the splits by name, 'train' first.
      names: the class names of the source. Without them, names in the columns are sorted, and numbers remain.
      where: name of the source at the beginning of messages.

    Raises SourceError: validation has a class that training has not, or the numbers are no labels of classes.
    """
    values: dict[str, Sequence[int | str]] = {split: part.column.values for split, part in splits.items()}
    if names is None and any(isinstance(value, str) for column in values.values() for value in column):
        values = {split: [str(value) for value in column] for split, column in values.items()}
        names = sorted({str(value) for value in values['train']})
        unknown = sorted({value for column in values.values() for value in column} - set(names))
        if unknown:
            raise SourceError(f'{where}: {shown(str(unknown[0]))} is a class of the validation split only')
    elif names is None:
        largest = max((int(value) for column in values.values() for value in column), default=-1)
        if largest >= _MAX_CLASSES:
            part = next(part for part in splits.values() if largest in part.column.values)
            example = part.name(int(np.argmax(part.column.codes == list(part.column.values).index(largest))))
            raise SourceError(
                f'{where}: the label of {shown(example)} is {shown(str(largest))}, but the labels of classes are below'
                f' {_MAX_CLASSES:,}'
            )
        names = [str(label) for label in range(largest + 1)]
    positions: dict[int | str, int] = {str(label): label for label in range(len(names))}
    positions |= {label: label for label in range(len(names))} | {name: label for label, name in enumerate(names)}
    labels = {}
    for split, part in splits.items():
        table = np.array([positions.get(value, -1) for value in values[split]] + [-1], np.int32)
        labels[split] = table[part.column.codes]  # a code of -1 selects the last entry
    return names, labels


def open_splits(
    where: str,
    files: Sequence[str],
    open_split: Callable[[Sequence[str]], RawSplit],
    roots: tuple[str, ...],
    fraction: float,
    validation_split: str | None,
) -> Source:
    """Opens a source whose examples are in the relative paths `files`.

    Args:
      where: name of the source at the beginning of messages.
      files: the files of all splits.
      open_split: opens the files of one split.
      roots: see Source.
      fraction, validation_split: see sources.open_source().

    Raises SourceError: see splits.choose_splits() and number_classes(), or a split has no labels.
    """
    groups = files_by_split(files)
    choice = choose_splits(groups, validation_split, where)
    used = {'train': choice.train} | ({} if choice.validation is None else {'validation': choice.validation})
    raw = {split: open_split(groups[name]) for split, name in used.items()}
    given = raw['train'].class_names
    if any(part.class_names != given for part in raw.values()):
        raise SourceError(f'{where}: the class names of {used["train"]} and {used["validation"]} differ')
    names, labels = number_classes(raw, given, where)
    notes, splits = list(choice.notes), {}
    for split, part in raw.items():
        field = 'config.data.source' if split == 'train' else 'config.data.validation_split'
        splits[split], more = _labeled(part, labels[split], groups[used[split]], field, f'{used[split]} of {where}')
        notes += more
    origins = {split: _described(groups[name]) for split, name in used.items()}
    held_out = choice.validation is None
    if held_out:
        origins['validation'] = held_out_share(fraction, origins['train'])
    return Source(
        hold_out(splits['train'], fraction, where) if held_out else splits,
        names,
        held_out,
        origins,
        tuple(notes),
        _has_names(raw.values()),
        roots,
    )


def open_one_split(
    where: str,
    files: Sequence[str],
    open_split: Callable[[Sequence[str]], RawSplit],
    roots: tuple[str, ...],
    split: str | None,
) -> Source:
    """Opens one split, see sources.open_split(), of a source whose examples are in the relative paths `files`.

    The other arguments are those of open_splits(). Raises SourceError: see splits.choose_one_split() and
    number_classes(), or the split has no labels.
    """
    groups = files_by_split(files)
    chosen = choose_one_split(groups, split, where)
    raw = open_split(groups[chosen])
    names, labels = number_classes({'train': raw}, raw.class_names, where)
    examples, notes = _labeled(raw, labels['train'], groups[chosen], '--split', f'{chosen} of {where}')
    origins = {chosen: _described(groups[chosen])}
    return Source({chosen: examples}, names, False, origins, tuple(notes), _has_names([raw]), roots)


def _labeled(
    part: RawSplit, labels: Labels, files: Sequence[str], field: str, what: str
) -> tuple[LabeledExamples, list[str]]:
    """Returns the examples of `part` that have a label, and notes about the others and about missing files.

    Raises SourceError: no example has a label; `field` is the setting to change, `what` the name of the split.
    """
    split = what.partition(' of ')[0]
    notes = [*part.notes, *_missing_files(files, split)]
    kept = labels >= 0
    if not kept.any():
        raise SourceError(f'{field}: {what} has no image with a label; choose another split')
    if not kept.all():
        first = part.name(int(np.argmin(kept)))
        values = np.array([*(value != -1 for value in part.column.values), False])
        kind = 'the label of a class' if values[part.column.codes[~kept]].any() else 'a label'
        notes.append(f'images of {split} without {kind}: {np.sum(~kept)}; the first is {first}')
    return part.examples(np.flatnonzero(kept), labels[kept]), notes


def _has_names(parts: Iterable[RawSplit]) -> bool:
    """Returns whether the classes have names, not only numbers."""
    return any(
        part.class_names is not None or any(isinstance(value, str) for value in part.column.values) for part in parts
    )


def _missing_files(files: Sequence[str], split: str) -> list[str]:
    """Returns a note if the names of the files, such as train-00000-of-00005.parquet, say that files are missing."""
    numbers = [match for file in files for match in re.findall(r'(\d+)-of-(\d+)', os.path.basename(file))]
    total = max((int(total) for _, total in numbers), default=0)
    return [f'{split} has only {len(files)} of its {total} files'] if len(numbers) < total else []


def _described(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f'{files[0]} to {files[-1]} ({len(files)} files)'
