"""Shards of a data set: image format, sums over the images of a shard, and statistics of the whole training set.

The sums are integers, so the statistics do not depend on the order of the images.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from alexnet_jax.prepare.raw_sources import Examples
from alexnet_jax.runtime.files import json_digest

# of JPEG data sets, whose chroma has half the resolution (4:2:0)
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Image format of a data set: side in pixels, channels (1 or 3), encoding ('raw' or 'jpeg') and class names."""

    image_size: int
    channels: int
    encoding: str
    class_names: tuple[str, ...]

    def features(self) -> tfds.features.FeaturesDict:
        """Returns the TFDS features of a record."""
        shape = (self.image_size, self.image_size, self.channels)
        if self.encoding == 'jpeg':
            image: tfds.features.FeatureConnector = tfds.features.Image(shape=shape, encoding_format='jpeg')
        else:
            image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        return tfds.features.FeaturesDict(
            {'image': image, 'label': tfds.features.ClassLabel(names=list(self.class_names))}
        )

    def encode(
        self, pixels: UInt8[np.ndarray, 's s c']
    ) -> tuple[bytes | UInt8[np.ndarray, 's s c'], UInt8[np.ndarray, 's s c']]:
        """Returns the value to store for `pixels`, and the pixels that a reader decodes from that value."""
        if self.encoding == 'raw':
            return pixels, pixels
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels).save(
            file, 'JPEG', quality=JPEG_QUALITY, subsampling='4:2:0'
        )
        return file.getvalue(), np.asarray(Image.open(file)).reshape(pixels.shape)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Shard `index` of the `count` shards of a split, with its examples."""

    split: str
    index: int
    count: int
    examples: Examples

    @property
    def file(self) -> str:
        """File name of the shard, as TFDS expects."""
        return f'prepared-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}'

    @property
    def report(self) -> str:
        """File name of the report of the shard. The report is written last, so a shard with a report is complete."""
        return f'{self.split}-{self.index:05d}.json'

    @property
    def sums(self) -> str:
        """File name of the sums from RunningMoments."""
        return f'{self.split}-{self.index:05d}.npz'


class RunningMoments:
    """Integer sums over images of shape (S, S, C).

    Attributes:
      images: (S, S, C) int64, sum of the images.
      products: (C, C) float64, sums over all pixels of the products of two channels. The sums are exact up to 2^53, 1.6
        times the maximum for ImageNet at 256 pixels.
      class_counts: (classes,) int64, images per class.
    """

    def __init__(self, format: ImageSpec):
        self.images = np.zeros((format.image_size, format.image_size, format.channels), np.int64)
        self.products = np.zeros((format.channels, format.channels))
        self.class_counts = np.zeros(len(format.class_names), np.int64)

    def add(self, pixels: UInt8[np.ndarray, 's s c'], label: int) -> None:
        """Adds one image."""
        self.images += pixels
        flat = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64)
        self.products += flat.T @ flat
        self.class_counts[label] += 1


class ContentDigest:
    """Digests of the stored images of a shard, with their classes and their split.

    Attributes:
      total: sum modulo 2^256 of the SHA-256 of the images, which does not depend on their order.
      order: SHA-256 of these digests in the order of the records.
    """

    def __init__(self, split: str, class_names: tuple[str, ...]):
        self.split, self.class_names = split, class_names
        self.total, self.order = 0, hashlib.sha256()

    def add(self, stored: bytes | UInt8[np.ndarray, 's s c'], label: int) -> None:
        """Adds one image as it is stored in its record."""
        digest = hashlib.sha256(f'{self.split}\0{self.class_names[label]}\0'.encode())
        digest.update(stored if isinstance(stored, bytes) else np.ascontiguousarray(stored).data)
        self.total = (self.total + int.from_bytes(digest.digest(), 'big')) % 2**256
        self.order.update(digest.digest())


def content_fingerprint(totals: Iterable[str], class_names: Sequence[str]) -> str:
    """Returns the SHA-256 of the class names and of the sum of `totals`, hexadecimal ContentDigest.total of all shards.

    The fingerprint is the same for the same images in any order and from any kind of source.
    """
    total = sum(int(value, 16) for value in totals) % 2**256
    return json_digest({'class_names': list(class_names), 'images': f'{total:064x}'})


def statistics(reports: str, shards: list[Shard]) -> dict[str, np.ndarray]:
    """Computes statistics of the training images from the sums of all training shards in the folder `reports`.

    Returns:
      mean_image: (S, S, C) float64, in gray levels (0 to 255), like the following arrays.
      mean_rgb: (C,) float64.
      eigenvalues: (C,) float64, ascending, of the covariance of the channels over all pixels.
      eigenvectors: (C, C) float64, one per column.
      class_counts: (classes,) int64, images per class.
    """
    sums: dict[str, np.ndarray] = {}
    for shard in shards:
        if shard.split == 'train':
            with np.load(os.path.join(reports, shard.sums)) as file:
                sums = {name: sums.get(name, 0) + file[name] for name in file.files}
    count = sums['class_counts'].sum()
    mean_image = sums['images'] / count
    mean_rgb = mean_image.mean((0, 1))
    pixels = count * mean_image[..., 0].size
    eigenvalues, eigenvectors = np.linalg.eigh(sums['products'] / pixels - np.outer(mean_rgb, mean_rgb))
    # The sign of an eigenvector is arbitrary and differs between libraries.
    eigenvectors = eigenvectors * np.where(eigenvectors.sum(0) < 0, -1.0, 1.0)
    return {
        'mean_image': mean_image,
        'mean_rgb': mean_rgb,
        'eigenvalues': eigenvalues,
        'eigenvectors': eigenvectors,
        'class_counts': sums['class_counts'],
    }
