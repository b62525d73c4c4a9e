"""Image sources with random access to the examples of each split, for several storage formats.

The classes FileExamples, ArrayExamples and TfdsExamples implement the protocol Examples.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Integer, UInt8

from alexnet_jax.data.images import read_file

Labels = Integer[np.ndarray, ' n']
Indices = range | Integer[np.ndarray, ' m']
RawExample = tuple[bytes | UInt8[np.ndarray, 'h w'], int]  # (content of a file or pixels, label)
TfdsRecord = dict[str, Any]  # the value of each feature by name


class SourceError(ValueError):
    """Raised for an unreadable source. The message is one line with the problem and the remedy."""


class Examples(Protocol):
    """Random access to the raw labeled images of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawExample: ...

    def name(self, index: int) -> str:
        """Returns a human-readable name of the example."""

    def subset(self, indices: range) -> 'Examples':
        """Returns the examples at `indices`, which are contiguous; can be pickled for a worker process."""

    def digest(self) -> str:
        """Returns a digest for the detection of changed images or labels."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of labeled images.

    Attributes:
      splits: the examples of 'train' and 'validation'.
      class_names: one name per label.
      holds_out_validation: whether the validation images are held out from the training images of the source.
    """

    splits: Mapping[str, Examples]
    class_names: list[str]
    holds_out_validation: bool

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


@dataclasses.dataclass(frozen=True)
class TfdsExamples:
    """Examples of a TFDS data set that is stored as ArrayRecord files.

    Attributes:
      directory: folder of the data set.
      split: the split in the syntax of TFDS, such as 'train[10%:]'.
      image, label: names of the features.
      start, stop: range of records in the split.
      metadata_digest: digest of the TFDS metadata of the data set.
    """

    directory: str
    split: str
    image: str
    label: str
    start: int
    stop: int
    metadata_digest: str

    def __len__(self) -> int:
        return self.stop - self.start

    def _record(self, index: int) -> TfdsRecord:
        return _data_source(self.directory, self.split, self.image)[self.start + index]

    def __getitem__(self, index: int) -> RawExample:
        record = self._record(index)
        return record[self.image], int(record[self.label])

    def name(self, index: int) -> str:
        """Returns the file name if the record contains one, as in ImageNet, otherwise the position in the split."""
        position = f'record {self.start + index} of {self.split}'
        try:
            record = self._record(index)
        except RuntimeError:  # corrupt record
            return position
        return record['file_name'].decode() if 'file_name' in record else position

    def subset(self, indices: range) -> 'TfdsExamples':
        """Returns the examples at `indices`, which must be contiguous."""
        return dataclasses.replace(self, start=self.start + indices.start, stop=self.start + indices.stop)

    def digest(self) -> str:
        """Returns the digest of the TFDS metadata, the split and the range, which does not depend on `directory`."""
        return digest(self.metadata_digest, self.split, self.start, self.stop)


@functools.lru_cache(maxsize=4)
def _data_source(directory: str, split: str, image: str) -> Sequence[TfdsRecord]:
    builder = tfds.builder_from_directory(directory)
    return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
