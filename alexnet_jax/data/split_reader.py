"""Reads the examples of a split of a prepared data set, and counts its corrupt records."""

import math
import threading
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import simplejpeg
from jaxtyping import Bool, Integer, UInt8

from alexnet_jax.runtime.console import log_error

Batch = dict[str, np.ndarray]  # see loader.training_batches() and loader.validation_batches()

IN_MEMORY_LIMIT_BYTES = 1 << 28  # a split with more bytes of pixels is not cached in memory


class DatasetError(RuntimeError):
    """Raised if data could not be prepared or are corrupt. The message is one line with the cause and the remedy."""


class Example(TypedDict):
    """A labeled image."""

    image: UInt8[np.ndarray, 's s c']
    label: np.int32


class SplitReader:
    """Random access to the examples of a split; a corrupt record reads as None.

    ArrayRecord detects corrupt records by their checksums. The reader logs and counts each of them once. If the pixels
    of all images take at most IN_MEMORY_LIMIT_BYTES, the reader caches each image after its first read, because reading
    dominates the cost of a batch.

    Args:
      records: serialized tf.train.Examples.
      shape: shape of an image, (S, S, C).
      encoding: encoding of the image in a record, 'raw' or 'jpeg'.
      name: name of the split in messages.
      max_corrupt_fraction: maximum fraction of corrupt records. If more are found, every read raises DatasetError.
    """

    def __init__(
        self,
        records: Sequence[bytes],
        shape: tuple[int, int, int],
        encoding: str,
        name: str,
        max_corrupt_fraction: float,
    ):
        from tensorflow_datasets.proto import tf_example_pb2

        # Parse the protobuf directly: the remaining steps of TFDS's decoder take twice as long and hold the GIL.
        self.parse = tf_example_pb2.Example.FromString
        self.records, self.shape, self.encoding, self.name = records, shape, encoding, name
        self.max_corrupt_fraction = max_corrupt_fraction
        self.in_memory = len(records) * math.prod(shape) <= IN_MEMORY_LIMIT_BYTES
        self.cached = np.zeros(len(records), bool)
        self.images = np.empty((len(records) if self.in_memory else 0, *shape), np.uint8)
        self.labels = np.empty(len(records), np.int32)
        self.corrupt: set[int] = set()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def corrupt_mask(self) -> Bool[np.ndarray, ' n']:
        """Returns the mask of the records that this process found corrupt."""
        found = np.zeros(len(self), bool)
        found[list(self.corrupt)] = True
        return found

    def __getitem__(self, index: int) -> Example | None:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._check_corrupt()
        if self.cached[index]:
            return {'image': self.images[index], 'label': self.labels[index]}
        if index in self.corrupt:
            return None
        try:
            features = self.parse(self.records[index]).features.feature
            content = features['image'].bytes_list.value[0]
            if self.encoding == 'raw':
                image = np.frombuffer(content, np.uint8).reshape(self.shape)
            else:
                image = simplejpeg.decode_jpeg(content, 'GRAY' if self.shape[-1] == 1 else 'RGB')
            example: Example = {'image': image, 'label': np.int32(features['label'].int64_list.value[0])}
            if self.in_memory:
                self.images[index], self.labels[index] = image, example['label']
                self.cached[index] = True
        except MemoryError:
            raise
        except Exception as error:  # ArrayRecord, protobuf and the decoder raise different types
            self._count_corrupt(index, error)
            return None
        return example

    def take_cached(self, indices: Integer[np.ndarray, ' b']) -> Batch | None:
        """Returns the images and labels at `indices` if all are cached, otherwise None.

        The function takes a quarter of the time of reading the records one by one.
        """
        self._check_corrupt()
        if not self.cached[indices].all():
            return None
        images = aligned_empty((len(indices), *self.shape))
        np.take(self.images, indices, 0, out=images, mode='clip')  # other modes are slower with `out`
        return {'image': images, 'label': self.labels[indices]}

    def _count_corrupt(self, index: int, error: Exception) -> None:
        with self.lock:
            if index in self.corrupt:
                return
            self.corrupt.add(index)
        what = (str(error).splitlines() or [type(error).__name__])[0][:200]
        log_error(f'record {index} of {self.name} is corrupt and skipped: {what}')
        self._check_corrupt()

    def _check_corrupt(self) -> None:
        if len(self.corrupt) > self.max_corrupt_fraction * len(self):
            raise DatasetError(
                f'{len(self.corrupt)} of {len(self)} records of {self.name} are corrupt, more than'
                f' data.max_corrupt_fraction={self.max_corrupt_fraction:g} allows:'
                ' copy the data set again or remove it, and it will be prepared again'
            ) from None


def evenly_spaced(split: SplitReader, count: int) -> list[tuple[int, Example]]:
    """Returns at most `count` pairs (index, example), evenly spaced over `split`, without corrupt records."""
    numbers = dict.fromkeys(np.linspace(0, len(split) - 1, count).astype(int).tolist())
    return [(number, example) for number in numbers if (example := split[number]) is not None]


def aligned_empty(shape: tuple[int, ...]) -> UInt8[np.ndarray, '...']:
    """Returns an uninitialized uint8 array, aligned to 64 bytes so that JAX's CPU backend needs no copy."""
    size = math.prod(shape)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)
