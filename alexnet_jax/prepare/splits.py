"""The splits of a source: their names in any habit, and the choice of the training and validation splits."""

import dataclasses
from collections.abc import Iterable

from alexnet_jax.data.split_names import TEST, TRAIN, VALIDATION, is_plain_split, split_kind
from alexnet_jax.paths import shown
from alexnet_jax.prepare.raw_sources import SourceError


@dataclasses.dataclass(frozen=True)
class SplitChoice:
    """The names of the splits to use.

    Attributes:
      train: name of the training split in the source.
      validation: name of the validation split in the source; None if validation images must be held out.
      notes: what was chosen and what is ignored, one line each.
    """

    train: str
    validation: str | None
    notes: tuple[str, ...]


def choose_splits(names: Iterable[str], validation_split: str | None, where: str) -> SplitChoice:
    """Chooses the training and the validation split among the splits of a source.

    The validation split is `validation_split` if it is not None, otherwise the split whose name says validation. A test
    split is used only if `validation_split` names it. A plain name such as 'train' precedes one with further words,
    such as 'train_small'.

    Args:
      names: names of the splits.
      validation_split: config.data.validation_split.
      where: name of the source at the beginning of messages.

    Raises SourceError: there is no training split or more than one, or no such validation split or more than one.
    """
    names = sorted(names)
    kinds: dict[str | None, list[str]] = {}
    for name in names:
        kinds.setdefault(split_kind(name), []).append(name)
    kinds = {kind: [name for name in found if is_plain_split(name)] or found for kind, found in kinds.items()}
    listed = ', '.join(names)
    if TRAIN not in kinds:
        raise SourceError(
            f'config.data.source: {where} has no training split; its splits are {listed};'
            ' the name of the training split must contain the word train or training'
        )
    if len(kinds[TRAIN]) > 1:
        raise SourceError(
            f'config.data.source: {where} has several training splits, {" and ".join(kinds[TRAIN])}; keep one of them,'
            ' or rename the others'
        )
    train = kinds[TRAIN][0]
    if validation_split is not None:
        same = [name for name in names if name == validation_split] or [
            name for name in names if name.lower() == validation_split.lower() and name != train
        ]
        kind = split_kind(validation_split)
        same = same or [name for name in kinds.get(kind, []) if kind is not None and name != train]
        if len(same) != 1 or same[0] == train:
            raise SourceError(
                f'config.data.validation_split: {validation_split!r} is not a validation split of {where}; its splits'
                f' are {listed}'
            )
        validation: str | None = same[0]
    else:
        found = kinds.get(VALIDATION, [])
        if len(found) > 1:
            raise SourceError(
                f'config.data.validation_split: {where} has several validation splits, {", ".join(found)}; set the'
                ' field to one of them'
            )
        validation = found[0] if found else None
    notes = []
    for name in names:
        if name not in (train, validation):
            how = f'; config.data.validation_split={name} validates on it' if split_kind(name) == TEST else ''
            notes.append(f'{name} is not used{how}')
    return SplitChoice(train, validation, tuple(notes))


def choose_one_split(names: Iterable[str], split: str | None, where: str) -> str:
    """Returns the name of the split to evaluate on: `split`, else the validation split, else the only split.

    `split` may be the name in another case or another word for the same kind, such as 'test' for 't10k'.

    Raises SourceError: there is no such split, or there are several; the message has the names.
    """
    names = sorted(names)
    listed = ', '.join(map(shown, names))
    if split is not None:
        kind = split_kind(split)
        of_kind = [name for name in names if kind is not None and split_kind(name) == kind]
        found = [name for name in names if name == split] or [name for name in names if name.lower() == split.lower()]
        found = found or [name for name in of_kind if is_plain_split(name)] or of_kind
        if len(found) != 1:
            raise SourceError(f'--split: {split!r} is not a split of {where}; its splits are {listed}')
        return found[0]
    validation = [name for name in names if split_kind(name) == VALIDATION]
    candidates = [name for name in validation if is_plain_split(name)] or validation or names
    if len(candidates) != 1:
        raise SourceError(
            f'--split: {where} has the splits {listed}; name one of them, such as --split={candidates[0]}'
        )
    return candidates[0]
