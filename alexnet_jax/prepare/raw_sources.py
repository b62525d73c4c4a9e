"""Image sources with random access to the examples of each split, for several storage formats.

examples[i] is (content, label), where `content` is the bytes of a file or an array of pixels. examples.name(i) is a
human-readable name. examples.subset(indices) is a subset that can be pickled and sent to one worker process.
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
    """Raised for an unreadable source. The message is one line with the problem and the remedy."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Labeled images.

    Attributes:
      splits: 'train' and 'validation', each Files, Pixels or Records.
      class_names: one name per label.
      holds_out_validation: whether the validation images are held out from the training images of the source.
    """

    splits: dict[str, Any]
    class_names: list[str]
    holds_out_validation: bool

    @property
    def fingerprint(self) -> str:
        """Digest that detects changed images: from file names and sizes, IDX contents, or TFDS metadata."""
        return digest(*self.class_names, *(f'{split} {part.digest()}' for split, part in self.splits.items()))


def digest(*values: Any) -> str:
    """Returns the sha256 of `values` as text, one value per line."""
    return hashlib.sha256('\n'.join(map(str, values)).encode(errors='surrogateescape')).hexdigest()


@dataclasses.dataclass(frozen=True)
class FileExamples:
    """Examples stored as one file each below `root`. `sizes` are in bytes."""

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
        """Returns the path relative to `root`."""
        return self.names[index]

    def subset(self, indices: Any) -> 'FileExamples':
        """Returns the examples at `indices`."""
        names, sizes = ([values[i] for i in indices] for values in (self.names, self.sizes))
        return FileExamples(self.root, names, sizes, self.labels[indices])

    def digest(self) -> str:
        """Returns the digest of names, sizes and labels."""
        return digest(*zip(self.names, self.sizes, self.labels.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class ArrayExamples:
    """Examples in memory, with images (N, H, W) uint8."""

    images: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray  # positions of the examples in the IDX file

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns the position in the IDX file."""
        return f'image {self.numbers[index]}'

    def subset(self, indices: Any) -> 'ArrayExamples':
        """Returns the examples at `indices`."""
        return ArrayExamples(self.images[indices], self.labels[indices], self.numbers[indices])

    def digest(self) -> str:
        """Returns the digest of images, labels and numbers."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes() + self.numbers.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class TfdsExamples:
    """Examples of a TFDS data set in ArrayRecord in `directory`. `split` has TFDS syntax, such as 'train[10%:]'."""

    directory: str
    split: str
    image: str  # feature names, as is `label`
    label: str
    start: int
    stop: int
    about: str  # digest of the TFDS metadata, which changes with the data set

    def __len__(self) -> int:
        return self.stop - self.start

    def _record(self, index: int) -> dict[str, Any]:
        return _data_source(self.directory, self.split, self.image)[self.start + index]

    def __getitem__(self, index: int) -> Example:
        record = self._record(index)
        return record[self.image], int(record[self.label])

    def name(self, index: int) -> str:
        """Returns the file name if the data set stores it, like ImageNet, otherwise the position in the split."""
        place = f'record {self.start + index} of {self.split}'
        try:
            record = self._record(index)
        except RuntimeError:  # corrupt record
            return place
        return record['file_name'].decode() if 'file_name' in record else place

    def subset(self, indices: range) -> 'TfdsExamples':
        """Returns the examples at `indices`, which must be contiguous."""
        return dataclasses.replace(self, start=self.start + indices.start, stop=self.start + indices.stop)

    def digest(self) -> str:
        """Returns the digest of the TFDS metadata and the range, independent of `directory`."""
        return digest(self.about, self.split, self.start, self.stop)


@functools.lru_cache(maxsize=4)
def _data_source(directory: str, split: str, image: str) -> Any:
    builder = tfds.builder_from_directory(directory)
    return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
