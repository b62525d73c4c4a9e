"""Prepared stores and the batches read from them with Grain, without TensorFlow.

Which image comes when is a pure function of the seed and of how many images came before it, whatever the number of
processes, so the whole state of the input is the number of steps taken.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Store:
    """A data set as `prepare` wrote it.

    Attributes:
      train, validation: random access to {'image': (S, S, 3) uint8, 'label': int}.
      statistics: of the training images, see prepare.Statistics.
      class_names: one a label.
    """

    train: Any
    validation: Any
    statistics: dict[str, np.ndarray]
    class_names: list[str]


def store_directory(data_dir: str, source: str, image_size: int) -> str:
    """Where the prepared store of `source` lies."""
    name = re.sub(r'\W+', '_', source.removeprefix('tfds:'))
    return os.path.join(os.path.abspath(os.path.expanduser(data_dir)), 'prepared', f'{name}_{image_size}px')


def open_store(directory: str) -> Store:
    """The store in `directory`. Raises FileNotFoundError where there is none."""
    with np.load(os.path.join(directory, 'statistics.npz')) as file:
        statistics = dict(file)
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    train, validation = (builder.as_data_source(split) for split in ('train', 'validation'))
    return Store(train, validation, statistics, builder.info.features['label'].names)


def training_batches(
    source: Any, *, seed: int, batch_size: int, first_step: int, threads: int, share: int = 0, shares: int = 1
) -> Iterator[Batch]:
    """Endless batches from step `first_step` on: of each the rows of part number `share` of the `shares` equal ones.

    Every epoch is a new permutation of all images; a batch may end one epoch and begin the next, so none is left out.

    Yields:
      image (B, S, S, 3) uint8, label (B,) int32 and number (B,) uint32, the count of images given out before this one
      since step 0; B is batch_size // shares.
    """
    import grain

    images = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    numbered = images.map_with_index(
        lambda number, example: {
            'image': example['image'],
            'label': np.int32(example['label']),
            'number': np.uint32(number),
        }
    )
    batches = iter(
        numbered.batch(batch_size // shares)[share::shares].to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
    )
    batches.set_state({'next_index': first_step})
    return batches


def validation_batches(
    source: Any, *, batch_size: int, threads: int, share: int = 0, shares: int = 1
) -> Iterator[Batch]:
    """Every image once, in order, in batches filled up with black images labelled -1; of each the rows of `share`.

    Yields:
      image (B, S, S, 3) uint8 and label (B,) int32; B is batch_size // shares.
    """
    import grain

    return iter(
        grain.MapDataset.source(_Padded(source, batch_size))
        .batch(batch_size // shares)[share::shares]
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    )


class _Padded:
    """`source` lengthened to a multiple of `batch_size`."""

    def __init__(self, source: Any, batch_size: int):
        self.source = source
        self.length = -(-len(source) // batch_size) * batch_size
        self.blank = {'image': np.zeros_like(source[0]['image']), 'label': np.int32(-1)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self.source):
            return self.blank
        example = self.source[index]
        return {'image': example['image'], 'label': np.int32(example['label'])}
