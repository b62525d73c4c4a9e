"""The order of the classes: data.class_names gives the labels of the classes of a source, by name."""

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from alexnet_jax.config import ConfigError, check_class_names, shown_classes
from alexnet_jax.prepare.image_files import shortened
from alexnet_jax.prepare.raw_sources import Examples, Indices, Labels, RawExample, Source, digest


@dataclasses.dataclass(frozen=True)
class RelabeledExamples:
    """Examples with other labels: `new_labels` has the label for each label of `examples`."""

    examples: Examples
    new_labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> RawExample:
        content, label = self.examples[index]
        return content, self.new_labels[label] if 0 <= label < len(self.new_labels) else label

    @property
    def labels(self) -> Labels | None:
        """One label per example; None if the labels are unknown before the images are read."""
        labels = labels_of(self.examples)
        if labels is None:
            return None
        is_class = (labels >= 0) & (labels < len(self.new_labels))
        return np.where(is_class, np.array(self.new_labels, labels.dtype)[np.where(is_class, labels, 0)], labels)

    def name(self, index: int) -> str:
        """Returns the name of the example in its source."""
        return self.examples.name(index)

    def subset(self, indices: Indices) -> 'RelabeledExamples':
        """Returns the examples at `indices`."""
        return RelabeledExamples(self.examples.subset(indices), self.new_labels)

    def digest(self) -> str:
        """Returns the digest of the examples and their new labels."""
        return digest(self.examples.digest(), *self.new_labels)


def labels_of(examples: Examples) -> Labels | None:
    """Returns the label of each example, or None if the labels are unknown before the images are read."""
    return getattr(examples, 'labels', None)


def describe_empty_classes(source: Source) -> list[str]:
    """Returns a line for each split whose labels are known and that has no image of some classes."""
    lines, names = [], source.class_names
    for split, what in (('train', 'training'), ('validation', 'validation')):
        labels = labels_of(source.splits[split]) if split in source.splits else None
        present = set(range(len(names)) if labels is None else np.unique(labels).tolist())
        without = [name for label, name in enumerate(names) if label not in present]
        if without:
            number = f'{len(without)} of {len(names)} classes have' if len(without) > 1 else 'a class has'
            lines.append(f'{number} no {what} image: {shortened(without)}')
    return lines


def order_classes(source: Source, names: Sequence[str], described: str) -> Source:
    """Returns `source` with its classes in the order of `names`: the label of a class is the position of its name.

    If the source only numbers its classes, `names` become the names of the numbers.

    Args:
      source: the source.
      names: config.data.class_names; empty keeps the order of the source.
      described: config.data.source, for messages.

    Raises ConfigError: `names` are not the names of the classes of the source, each once; or the source has no names
      and another number of classes.
    """
    own = list(source.class_names)
    check_class_names(names)
    check_class_names(own, f'config.data.source: {described}')
    if not names:
        return source
    if not source.names_classes:
        if len(names) != len(own):
            raise ConfigError(
                f'config.data.class_names: {len(names)} names, but {described} has {len(own)} classes, which have only'
                ' numbers'
            )
        return dataclasses.replace(source, class_names=list(names))
    _check_same_names(names, own, described)
    if list(names) == own:
        return source
    positions = {name: label for label, name in enumerate(names)}
    new_labels = tuple(positions[name] for name in own)
    splits = {split: RelabeledExamples(examples, new_labels) for split, examples in source.splits.items()}
    return dataclasses.replace(source, splits=splits, class_names=list(names))


def _check_same_names(names: Sequence[str], own: Sequence[str], described: str) -> None:
    """Raises ConfigError unless `names` are the names `own` of the source in any order."""
    known, given = set(own), set(names)
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        left = [name for name in own if name not in given] or own
        near = (difflib.get_close_matches(unknown.lower(), [name.lower() for name in left], 1, 0.0) or [''])[0]
        nearest = next((name for name in left if name.lower() == near), left[0])
        raise ConfigError(
            f'config.data.class_names: {unknown!r} is not a class of {described}; the nearest is {nearest!r}.'
            ' The names give only the order of the classes: to rename a class, rename it in the source, such as its'
            ' folder; to keep the order of the source, leave class_names out'
        )
    missing = [name for name in own if name not in given]
    if missing:
        raise ConfigError(
            f'config.data.class_names: {shown_classes(list(map(repr, missing)))} of {described} is missing; name all of'
            f' its {len(own)} classes, or leave class_names out'
        )
