"""The parts that a store is made of: their format, the sums over their images, and the statistics of all.

Sums are of whole numbers, so statistics are the same in any order.
"""

import collections
import dataclasses
import io
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# Of JPEG stores; chroma at half resolution.
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
        """The file of what RunningMoments has summed."""
        return f'{self.split}-{self.index:05d}.npz'


class RunningMoments:
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
