"""The splits of a source: their names in any habit, and the choice of the training and validation splits."""

import dataclasses
import re
from collections.abc import Iterable

from alexnet_jax.prepare.raw_sources import SourceError

TRAIN, VALIDATION, TEST = 'train', 'validation', 'test'
_WORDS = {
    'train': TRAIN,
    'training': TRAIN,
    'val': VALIDATION,
    'valid': VALIDATION,
    'validate': VALIDATION,
    'validation': VALIDATION,
    'dev': VALIDATION,
    'eval': VALIDATION,
    'evaluation': VALIDATION,
    'test': TEST,
    'testing': TEST,
    't10k': TEST,
}
_FILLERS = ('set', 'data', 'dataset', 'split', 'images', 'imgs', 'folder')


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


def split_kind(name: str) -> str | None:
    """Returns 'train', 'validation' or 'test' if `name` is a usual name of such a split, otherwise None.

    Case and separators do not matter: 'Training_Set', 'test-images' and 'VAL' are names of splits.
    """
    words = [word for word in re.split(r'[\W_]+', name.lower()) if word]
    words = [word for word in words if word not in _FILLERS]
    if len(words) != 1:
        return None
    word = words[0]
    for filler in _FILLERS:
        word = word.removesuffix(filler) if word.removesuffix(filler) in _WORDS else word
    return _WORDS.get(word)


def choose_splits(names: Iterable[str], validation_split: str | None, where: str) -> SplitChoice:
    """Chooses the training and the validation split among the splits of a source.

    The validation split is `validation_split` if it is not None, otherwise the split whose name says validation. A test
    split is used only if `validation_split` names it.

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
    listed = ', '.join(names)
    if len(kinds.get(TRAIN, [])) != 1:
        problem = 'no training split' if TRAIN not in kinds else 'several training splits'
        raise SourceError(f'config.data.source: {where} has {problem}; its splits are {listed}')
    train = kinds[TRAIN][0]
    if validation_split is not None:
        same = [name for name in names if name == validation_split] or [
            name for name in names if name.lower() == validation_split.lower() and name != train
        ]
        same = same or [name for name in kinds.get(split_kind(validation_split), []) if name != train]
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
