"""The data card: what a data set contains and where it comes from, before or after its preparation."""

import dataclasses

import numpy as np
from jaxtyping import Integer

from alexnet_jax.config import shown_classes
from alexnet_jax.data.manifest import Manifest
from alexnet_jax.prepare.classes import labels_of
from alexnet_jax.prepare.raw_sources import Source
from alexnet_jax.runtime.files import JsonObject


@dataclasses.dataclass(frozen=True)
class DataCard:
    """The content of a data set.

    Attributes:
      source: config.data.source.
      class_names: one name per label.
      images: number of images by split; {} if it is unknown until TFDS has downloaded the data.
      origins: where the images of each split come from, see raw_sources.Source.
      holds_out_validation: whether the validation images are held out from the training images of the source.
      class_counts: (classes,) int64, training images per class; None if it is unknown before the preparation.
      notes: what the program chose or ignores, one line each.
    """

    source: str
    class_names: tuple[str, ...]
    images: dict[str, int]
    origins: dict[str, str]
    holds_out_validation: bool
    class_counts: Integer[np.ndarray, ' classes'] | None
    notes: tuple[str, ...] = ()

    def splits(self) -> list[str]:
        """Returns the number of images and the origin of each split."""
        if not self.images:
            return ['the number of images is unknown until TFDS has downloaded the data']
        share = self.images['validation'] / max(1, sum(self.images.values()))
        held_out = f'held out, {share:.1%} of all images' if self.holds_out_validation else ''
        lines = []
        for split, what in (('train', 'training'), ('validation', 'validation')):
            origin = ': '.join(filter(None, [held_out if split == 'validation' else '', self.origins.get(split, '')]))
            lines.append(f'{self.images[split]:,} {what} images{f" ({origin})" if origin else ""}')
        return lines

    def classes(self) -> str:
        """Returns the number of classes and their names in the order of the labels."""
        return f'{len(self.class_names):,} classes in this order: {shown_classes(self.class_names)}'

    def class_sizes(self) -> list[str]:
        """Returns the smallest and the largest class."""
        if self.class_counts is None:
            return ['training images per class: unknown before the preparation']
        least, most = int(np.argmin(self.class_counts)), int(np.argmax(self.class_counts))
        names, counts = self.class_names, self.class_counts
        if counts[least] == counts[most]:
            return [f'{counts[least]:,} training images in each class']
        return [
            f'smallest class: {names[least]}, {counts[least]:,} training images;'
            f' largest class: {names[most]}, {counts[most]:,}'
        ]

    def lines(self) -> list[str]:
        """Returns all that the card says, one fact per line."""
        return [*self.splits(), self.classes(), *self.class_sizes(), *self.notes]

    def summary(self) -> list[str]:
        """Returns the card in short, for a log."""
        splits = ', '.join(self.splits())
        return [f'{self.source}: {splits}; {self.classes()}', *(f'{self.source}: {note}' for note in self.notes)]

    def to_json(self) -> JsonObject:
        """Returns the card as a JSON object."""
        counts = None if self.class_counts is None else self.class_counts.tolist()
        return dataclasses.asdict(self) | {'class_counts': counts}


def card_of_source(described: str, source: Source) -> DataCard:
    """Returns the card of a source that is not prepared; `described` is config.data.source."""
    images = {split: len(examples) for split, examples in source.splits.items()}
    labels = labels_of(source.splits['train']) if source.splits else None
    counts = None
    if labels is not None:
        classes = len(source.class_names)
        counts = np.bincount(labels[(labels >= 0) & (labels < classes)], minlength=classes)
    return DataCard(
        described,
        tuple(source.class_names),
        images,
        dict(source.origins),
        source.holds_out_validation,
        counts,
        tuple(source.notes),
    )


def card_of_prepared(manifest: Manifest, class_counts: Integer[np.ndarray, ' classes']) -> DataCard:
    """Returns the card of a prepared data set; `class_counts` is that of its statistics."""
    return DataCard(
        manifest.source,
        tuple(manifest.class_names),
        manifest.images,
        manifest.origins,
        manifest.validation_fraction is not None,
        class_counts,
        tuple(manifest.notes),
    )
