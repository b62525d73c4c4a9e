"""Image sources with random access to the examples of each split.

FileExamples, ArrayExamples and the classes of the modules for single formats implement the protocol Examples.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from alexnet_jax.data.images import read_file

Labels = Integer[np.ndarray, ' n']
Indices = range | Integer[np.ndarray, ' m']
RawExample = tuple[bytes | UInt8[np.ndarray, 'h w'], int]  # (content of a file or pixels, label)


class SourceError(ValueError):
    """Raised for an unreadable source. The message is one line with the problem and the remedy."""


class Examples(Protocol):
    """Random access to the raw labeled images of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawExample: ...

    def name(self, index: int) -> str:
        """Returns a human-readable name of the example."""

    def subset(self, indices: Indices) -> 'Examples':
        """Returns the examples at `indices`, for a worker process to which they are pickled."""

    def digest(self) -> str:
        """Returns a digest for the detection of changed images or labels."""


class LabeledExamples(Examples, Protocol):
    """Examples whose labels are known before the images are read."""

    @property
    def labels(self) -> Labels:
        """One label per example."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of labeled images.

    Attributes:
      splits: the examples of 'train' and 'validation'; or those of one split, by its name, see sources.open_split().
      class_names: one name per label.
      holds_out_validation: whether the validation images are held out from the training images of the source.
      origins: where the images of 'train' and 'validation' come from, such as 'valid/' or
        '10% of each class of train/'.
      notes: what the program chose or ignores, one line each, such as 'test/ is not used'.
      names_classes: whether the source has names for its classes; otherwise `class_names` are numbers.
      roots: absolute paths of the files and folders that the images come from, see data.inventory.
    """

    splits: Mapping[str, Examples]
    class_names: list[str]
    holds_out_validation: bool
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    names_classes: bool = True
    roots: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Digest of the class names and the splits, for the detection of changed images; see Examples.digest()."""
        return digest(*self.class_names, *(f'{split} {part.digest()}' for split, part in self.splits.items()))


def digest(*values: object) -> str:
    """Returns the SHA-256 hex digest of `values` as text, one value per line."""
    return hashlib.sha256('\n'.join(map(str, values)).encode(errors='surrogateescape')).hexdigest()


@dataclasses.dataclass(frozen=True)
class FileExamples:
    """Examples in files below `root`. `names` are paths relative to `root`, and `sizes` are in bytes."""

    root: str
    names: list[str]
    sizes: list[int]
    labels: Labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> RawExample:
        return read_file(os.path.join(self.root, self.names[index])), int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns the path of the file relative to `root`."""
        return self.names[index]

    def subset(self, indices: Indices) -> 'FileExamples':
        """Returns the examples at `indices`."""
        names, sizes = [self.names[i] for i in indices], [self.sizes[i] for i in indices]
        return FileExamples(self.root, names, sizes, self.labels[indices])

    def digest(self) -> str:
        """Returns the digest of names, sizes and labels."""
        return digest(*zip(self.names, self.sizes, self.labels.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class ArrayExamples:
    """Examples in memory. `numbers` are the positions of the examples in the IDX file."""

    images: UInt8[np.ndarray, 'n h w']
    labels: Labels
    numbers: Integer[np.ndarray, ' n']

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> RawExample:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns the position of the example in the IDX file."""
        return f'image {self.numbers[index]}'

    def subset(self, indices: Indices) -> 'ArrayExamples':
        """Returns the examples at `indices`."""
        return ArrayExamples(self.images[indices], self.labels[indices], self.numbers[indices])

    def digest(self) -> str:
        """Returns the digest of images, labels and numbers."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes() + self.numbers.tobytes()).hexdigest()


def holdout_mask(labels: Labels, fraction: float) -> Bool[np.ndarray, ' n']:
    """Returns the mask of the examples to hold out: `fraction` of each class, chosen with a fixed seed."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels == label)
        chosen[np.random.default_rng(label).permutation(of_label)[: round(fraction * len(of_label))]] = True
    return chosen


def check_held_out(held_out: int, images: int, fraction: float, where: str, part: str = '') -> None:
    """Raises SourceError if none or all of the `images` of the source `where` are held out for validation.

    `part` says of what `fraction` is held out, if not of all images.
    """
    if held_out in (0, images):
        empty = 'validation' if held_out == 0 else 'training'
        raise SourceError(
            f'config.data.validation_fraction: {fraction:g} of {part}the {images:,} images of {where}, which has no'
            f' validation split, leaves no image for {empty}; change the fraction, or add a validation split'
        )


def held_out_share(fraction: float, origin: str) -> str:
    """Returns the origin of the images that hold_out() takes from those of `origin`, see Source."""
    return f'{100 * fraction:g}% of each class of {origin}'


def hold_out(examples: LabeledExamples, fraction: float, where: str) -> dict[str, Examples]:
    """Returns the splits after `fraction` of each class of `examples` is held out for validation.

    Raises SourceError: a split would be empty; the message begins with `where`.
    """
    chosen = holdout_mask(examples.labels, fraction)
    check_held_out(int(chosen.sum()), len(chosen), fraction, where, 'each class of ')
    return {'train': examples.subset(np.flatnonzero(~chosen)), 'validation': examples.subset(np.flatnonzero(chosen))}
