"""Batches for training and validation, read in threads from a prepared data set."""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from alexnet_jax.data.dataset import Batch, DatasetError, aligned_empty


def training_batches(
    source: Any, *, seed: int, batch_size: int, first_step: int, threads: int, share: int = 0, shares: int = 1
) -> Iterator[Batch]:
    """Yields endless batches from step `first_step` on, restricted to shard `share` of `shares` equal shards per batch.

    Every epoch is a new permutation of all images. A batch may span two epochs, so every epoch visits all images. The
    next intact record of the data set replaces a corrupt record.

    Args:
      source: see Split.
      seed: seed of the permutations.
      batch_size: global batch size over all shards.
      first_step: number of batches to skip.
      threads: number of reader threads; an in-memory split uses none.
      share: index of this shard.
      shares: number of shards of a batch.

    Yields:
      image (B, S, S, C) uint8, label (B,) int32 and number (B,) uint32, where B is batch_size // shares and `number` is
      the number of images before this one since step 0.
    """
    import grain

    rows, whole = batch_size // shares, _SkipCorrupt(source)

    @functools.lru_cache(2)  # a batch takes a fifth of the time of grain's shuffle()
    def order(epoch):
        return np.random.default_rng((seed, epoch)).permutation(len(source))

    def batch(part):
        numbers = np.arange(part * rows, (part + 1) * rows)
        epochs, places = np.divmod(numbers, len(source))
        indices = np.concatenate([order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()])
        found = source.take_cached(indices) or _stack_batch(whole, indices)
        return found | {'example_id': numbers.astype(np.uint32)}

    batches = iter(
        grain.MapDataset.range(sys.maxsize)[share::shares].map(batch).to_iter_dataset(_reading(source, threads))
    )
    batches.set_state({'next_index': first_step})
    return batches


def validation_batches(
    source: Any, *, batch_size: int, threads: int, share: int = 0, shares: int = 1, first_batch: int = 0
) -> Iterator[Batch]:
    """Yields every image once, in order, restricted to shard `share` of `shares` equal shards per batch.

    Black images with label -1 pad the last batch and replace corrupt records. `first_batch` is the number of batches to
    skip.

    Yields:
      image (B, S, S, C) uint8 and label (B,) int32, where B is batch_size // shares.
    """
    import grain

    padded = _Padded(source, batch_size)
    return iter(
        grain.MapDataset.range(len(padded))
        .batch(batch_size // shares)[first_batch * shares + share :: shares]
        .map(lambda indices: _stack_batch(padded, indices))
        .to_iter_dataset(_reading(source, threads))
    )


def _reading(source: Any, threads: int) -> Any:
    """Returns Grain's options to read a Split: no threads for an in-memory split, where they would wait for the GIL."""
    import grain

    threads = 0 if source.keeps else threads
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _stack_batch(source: Any, indices: Sequence[int] | np.ndarray) -> Batch:
    """Copies the images at `indices` into one array: three times as fast as np.stack."""
    labels = np.empty(len(indices), np.int32)
    for row, index in enumerate(np.asarray(indices).tolist()):
        example = source[index]
        if row == 0:
            images = aligned_empty((len(indices), *example['image'].shape))
        images[row], labels[row] = example['image'], example['label']
    return {'image': images, 'label': labels}


class _SkipCorrupt:
    """`source` with each corrupt record replaced by the next intact record."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for other in range(index, index + len(self.source)):
            example = self.source[other % len(self.source)]
            if example is not None:
                return example
        raise DatasetError('no record can be read: copy the data set again, or remove it to prepare it again')


class _Padded:
    """`source` padded to a multiple of `batch_size` with black images, label -1, also in place of corrupt records."""

    def __init__(self, source: Any, batch_size: int):
        self.source = source
        self.length = -(-len(source) // batch_size) * batch_size
        self.blank = {'image': np.zeros_like(_SkipCorrupt(source)[0]['image']), 'label': np.int32(-1)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index] if index < len(self.source) else None
        return self.blank if example is None else example
