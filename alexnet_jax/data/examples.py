"""What a source of images gives: for each split random access to its examples, whatever they are kept in.

examples[i] is (content, label), where `content` is a file's bytes or an array of pixels; examples.name(i) is what a
person would look for; part() cuts out what one process is to work on, small enough to be sent to it.
"""

import dataclasses
import functools
import hashlib
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Example = tuple[bytes | np.ndarray, int]


class SourceError(ValueError):
    """A source that cannot be read: one line that says what is missing and what to do."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Images with labels.

    Attributes:
      splits: 'train' and 'validation', each Files, Pixels or Records.
      class_names: one a label.
      holds_out_validation: whether the validation images are a fraction of those that the source has to train on.
    """

    splits: dict[str, Any]
    class_names: list[str]
    holds_out_validation: bool

    @property
    def fingerprint(self) -> str:
        """Changes when the images do, as far as names and sizes of files, or TFDS, tell."""
        return digest(*self.class_names, *(f'{split} {part.digest()}' for split, part in self.splits.items()))


def digest(*values: Any) -> str:
    """sha256 of `values` as text, a line each."""
    return hashlib.sha256('\n'.join(map(str, values)).encode(errors='surrogateescape')).hexdigest()


@dataclasses.dataclass(frozen=True)
class Files:
    """Examples that are files below `root`, of `sizes` in bytes."""

    root: str
    names: list[str]
    sizes: list[int]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        with open(os.path.join(self.root, self.names[index]), 'rb') as file:
            return file.read(), int(self.labels[index])

    def name(self, index: int) -> str:
        """The path below `root`."""
        return self.names[index]

    def part(self, indices: Any) -> 'Files':
        """The examples at `indices`."""
        names, sizes = ([values[i] for i in indices] for values in (self.names, self.sizes))
        return Files(self.root, names, sizes, self.labels[indices])

    def digest(self) -> str:
        """Of names, sizes and labels."""
        return digest(*zip(self.names, self.sizes, self.labels.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Examples in memory: images (N, H, W) uint8."""

    images: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray  # which of the file they are

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        """The place in the file."""
        return f'image {self.numbers[index]}'

    def part(self, indices: Any) -> 'Pixels':
        """The examples at `indices`."""
        return Pixels(self.images[indices], self.labels[indices], self.numbers[indices])

    def digest(self) -> str:
        """Of all there is."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes() + self.numbers.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Records:
    """Examples of a TFDS data set in ArrayRecord, in `directory`; `split` as TFDS writes it, as 'train[10%:]'."""

    directory: str
    split: str
    image: str  # names of the features
    label: str
    start: int
    stop: int
    about: str  # what TFDS says of the data set, which changes with it

    def __len__(self) -> int:
        return self.stop - self.start

    def _record(self, index: int) -> dict[str, Any]:
        return _data_source(self.directory, self.split, self.image)[self.start + index]

    def __getitem__(self, index: int) -> Example:
        record = self._record(index)
        return record[self.image], int(record[self.label])

    def name(self, index: int) -> str:
        """The file's name where the data set keeps it, as ImageNet does; otherwise the place in the split."""
        place = f'record {self.start + index} of {self.split}'
        try:
            record = self._record(index)
        except RuntimeError:  # damaged
            return place
        return record['file_name'].decode() if 'file_name' in record else place

    def part(self, indices: range) -> 'Records':
        """The examples at `indices`, which follow one another."""
        return dataclasses.replace(self, start=self.start + indices.start, stop=self.start + indices.stop)

    def digest(self) -> str:
        """Of what TFDS says; the folder may be another."""
        return digest(self.about, self.split, self.start, self.stop)


@functools.lru_cache(maxsize=4)
def _data_source(directory: str, split: str, image: str) -> Any:
    builder = tfds.builder_from_directory(directory)
    return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
