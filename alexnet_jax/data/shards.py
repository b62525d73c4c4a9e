"""The work of one process of `prepare`: a run of examples becomes one file of square images and the sums over them.

Everything is integers, so sums are the same in any order and the files the same with any number of processes.
"""

import collections
import contextlib
import dataclasses
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from alexnet_jax.data.images import UnreadableImage, read_image, square
from alexnet_jax.monitor import write_json

# Of JPEG stores; chroma at half resolution. About 33 kB an image of 256 pixels.
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Format:
    """What the images of a store are: pixels a side, channels (1 or 3), encoding ('raw' or 'jpeg'), class names."""

    image_size: int
    channels: int
    encoding: str
    class_names: tuple[str, ...]

    def features(self) -> Any:
        """The features that TFDS describes a record with."""
        shape = (self.image_size, self.image_size, self.channels)
        if self.encoding == 'jpeg':
            image: Any = tfds.features.Image(shape=shape, encoding_format='jpeg')
        else:
            image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        return tfds.features.FeaturesDict(
            {'image': image, 'label': tfds.features.ClassLabel(names=list(self.class_names))}
        )

    def encode(self, pixels: np.ndarray) -> tuple[Any, np.ndarray]:
        """What is stored for `pixels` (S, S, C) uint8, and the pixels that a reader will get from it."""
        if self.encoding == 'raw':
            return pixels, pixels
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels).save(
            file, 'JPEG', quality=JPEG_QUALITY, subsampling='4:2:0'
        )
        return file.getvalue(), np.asarray(Image.open(file)).reshape(pixels.shape)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Number `index` of the `count` parts that a split is cut into, and the examples in it."""

    split: str
    index: int
    count: int
    examples: Any

    @property
    def file(self) -> str:
        """The name that TFDS gives it."""
        return f'prepared-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}'

    @property
    def report(self) -> str:
        """The file that says what is in it; it is written last, so where it is the shard is whole."""
        return f'{self.split}-{self.index:05d}.json'

    @property
    def sums(self) -> str:
        """The file of what Sums has added up."""
        return f'{self.split}-{self.index:05d}.npz'


class Sums:
    """Sums over images (S, S, C), as integers.

    Attributes:
      images: (S, S, C) int64.
      products: (C, C) float64, of channels with channels over all pixels; whole numbers, exact up to 2^53, which is
        twice what ImageNet has at 256 pixels.
      class_counts: (classes,) int64.
    """

    def __init__(self, format: Format):
        self.images = np.zeros((format.image_size, format.image_size, format.channels), np.int64)
        self.products = np.zeros((format.channels, format.channels))
        self.class_counts = np.zeros(len(format.class_names), np.int64)

    def add(self, pixels: np.ndarray, label: int) -> None:
        """Count one image (S, S, C) uint8."""
        self.images += pixels
        flat = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64)
        self.products += flat.T @ flat
        self.class_counts[label] += 1


def end_with_parent() -> None:
    """Begin as a worker: Ctrl-C is the parent's to answer, and when the parent is gone this process ends at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Errors of ArrayRecord's writer, such as a full disk, as OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f'{folder}: {str(error).splitlines()[0]}') from None


def write_shard(shard: Shard, format: Format, folder: str, reports: str) -> dict[str, Any]:
    """Convert the examples of `shard` into a file in `folder`, whole or not at all, and return its report.

    The report, also written into `reports` with the sums, has: examples (stored), bytes (of the file), skipped (a
    list of split, name and reason), digest (of the shard's examples). Raises OSError: it cannot be written.
    """
    features, sums, skipped = format.features(), Sums(format), []
    serializer = ExampleSerializer(features.get_serialized_info())
    aside = os.path.join(folder, f'.{shard.file}.{os.getpid()}')  # of a process that may outlive its parent a moment
    # Without compression, which would make reading three times as slow; one record a group, for random access.
    writer = ArrayRecordWriter(aside, 'group_size:1,uncompressed')
    try:
        for index in range(len(shard.examples)):
            try:
                content, label = shard.examples[index]
                if not 0 <= label < len(format.class_names):
                    raise UnreadableImage(f'its label is {label}, no class')
                pixels = square(read_image(content), format.image_size, format.channels)
            except (UnreadableImage, OSError, RuntimeError) as error:  # the last from a damaged record of TFDS
                reason = getattr(error, 'strerror', None) or (str(error).splitlines() or [type(error).__name__])[0]
                skipped.append({'split': shard.split, 'name': shard.examples.name(index), 'reason': reason})
                continue
            stored, read_back = format.encode(pixels)
            sums.add(read_back, label)
            example = serializer.get_tf_example(features.encode_example({'image': stored, 'label': label}))
            record = example.SerializeToString(deterministic=True)  # otherwise in any order of the features
            with _writing(folder):
                writer.write(record)
    finally:
        with _writing(folder):
            writer.close()
    _to_disk(aside)
    os.replace(aside, os.path.join(folder, shard.file))
    _save(os.path.join(reports, shard.sums), vars(sums))
    report = {
        'examples': int(sums.class_counts.sum()),
        'bytes': os.path.getsize(os.path.join(folder, shard.file)),
        'skipped': skipped,
        'digest': shard.examples.digest(),
    }
    write_json(os.path.join(reports, shard.report), report)
    return report


def statistics(reports: str, shards: list[Shard]) -> dict[str, np.ndarray]:
    """Statistics of the training images, from the sums of all their shards.

    Returns mean_image (S, S, C), mean_rgb (C,), the eigenvalues (C,), ascending, and the eigenvectors (C, C), in
    columns, of the covariance of channels over all pixels, all float64 in grey levels, and class_counts (classes,)
    int64.
    """
    sums: dict[str, Any] = collections.Counter()
    for shard in shards:
        if shard.split == 'train':
            with np.load(os.path.join(reports, shard.sums)) as file:
                sums = {name: sums[name] + file[name] for name in file.files}
    count = sums['class_counts'].sum()
    mean_image = sums['images'] / count
    mean_rgb = mean_image.mean((0, 1))
    pixels = count * mean_image[..., 0].size
    eigenvalues, eigenvectors = np.linalg.eigh(sums['products'] / pixels - np.outer(mean_rgb, mean_rgb))
    # An eigenvector's sign is anyone's choice; libraries differ.
    eigenvectors = eigenvectors * np.where(eigenvectors.sum(0) < 0, -1.0, 1.0)
    return {
        'mean_image': mean_image,
        'mean_rgb': mean_rgb,
        'eigenvalues': eigenvalues,
        'eigenvectors': eigenvectors,
        'class_counts': sums['class_counts'],
    }


def _to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _save(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` as .npz, whole or not at all."""
    aside = f'{path}.{os.getpid()}'
    with open(aside, 'wb') as file:
        np.savez(file, allow_pickle=False, **arrays)
    _to_disk(aside)
    os.replace(aside, path)
