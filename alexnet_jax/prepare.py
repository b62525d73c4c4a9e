"""Prepare a data set once for training: square uint8 images in ArrayRecord and statistics of the training set.

    python -m alexnet_jax.prepare --source=tfds:imagenet2012 --data_dir=~/tensorflow_datasets

The only part of the package that uses TensorFlow (through TFDS, to write); training runs it as a process of its own.
"""

import contextlib
import fcntl
import io
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags, logging
from PIL import Image

from alexnet_jax.data.pipeline import store_directory
from alexnet_jax.monitor import Progress, log

IMAGENET_TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')


class SourceError(ValueError):
    """A source that cannot be read: one line that says what is missing and what to do."""


class Statistics:
    """Sums over images, in float64 and in order, so that the result does not depend on the number of threads.

    result() holds mean_image (S, S, 3), mean_rgb (3,), the eigenvalues (3,), ascending, and the eigenvectors (3, 3), in
    columns, of the covariance of RGB values over all pixels, all float64 in grey levels, and class_counts (classes,).
    """

    def __init__(self, image_size: int, classes: int):
        self.images = np.zeros((image_size, image_size, 3))
        self.products = np.zeros((3, 3))
        self.class_counts = np.zeros(classes, np.int64)

    def add(self, image: np.ndarray, label: int) -> None:
        """Count one training image (S, S, 3)."""
        image = image.astype(np.float64)
        pixels = image.reshape(-1, 3)
        self.images += image
        self.products += pixels.T @ pixels
        self.class_counts[label] += 1

    def result(self) -> dict[str, np.ndarray]:
        """The statistics; see the class."""
        mean_image = self.images / self.class_counts.sum()
        mean_rgb = mean_image.mean((0, 1))
        pixels = self.class_counts.sum() * mean_image[..., 0].size
        eigenvalues, eigenvectors = np.linalg.eigh(self.products / pixels - np.outer(mean_rgb, mean_rgb))
        return {
            'mean_image': mean_image,
            'mean_rgb': mean_rgb,
            'eigenvalues': eigenvalues,
            'eigenvectors': eigenvectors,
            'class_counts': self.class_counts,
        }


def square(image: Image.Image, size: int) -> np.ndarray:
    """Section 2 of the paper: the shorter side scaled to `size` (bicubic), then the central square.

    The result is (size, size, 3) uint8; grey and CMYK images become RGB.
    """
    image = image.convert('RGB')
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Prepared(tfds.core.GeneratorBasedBuilder):
    """Square uint8 images of another TFDS data set, in its order."""

    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, *, source: Any, image_size: int, threads: int, data_dir: str):
        self.source, self.image_size, self.threads = source, image_size, threads
        self.names = source.info.features['label'].names
        self.statistics = Statistics(image_size, len(self.names))
        super().__init__(data_dir=data_dir, file_format='array_record')

    def _info(self) -> tfds.core.DatasetInfo:
        shape, encoding = (self.image_size, self.image_size, 3), tfds.features.Encoding.BYTES
        features = {
            'image': tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=encoding),
            'label': tfds.features.ClassLabel(names=self.names),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f'{self.source.info.full_name}, shorter side {self.image_size} pixels, centre square',
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        held_out = held_out_split(self.source)
        return {'train': self._generate_examples('train'), 'validation': self._generate_examples(held_out)}

    def _generate_examples(self, split):
        images = self.source.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
        progress = Progress(f'prepare {split}', len(images), 'images')
        # TFDS sorts by key in 1,000 buckets, each in memory: keys from 0 up would put all images into the first.
        spread = 2**128 // max(len(images), 1)

        def convert(index):
            example = images[index]
            try:
                return square(Image.open(io.BytesIO(example['image'])), self.image_size), int(example['label'])
            except OSError as error:
                where = example.get('file_name', f'record {index}')
                raise SourceError(f'{self.source.name}, {split}: {where} is no readable image: {error}') from None

        for index, (image, label) in enumerate(in_order(convert, range(len(images)), self.threads)):
            if split == 'train':
                self.statistics.add(image, label)
            progress.update()
            yield index * spread, {'image': image, 'label': label}
        progress.close()


def in_order(function: Callable, items: Iterable, threads: int) -> Iterator:
    """function(item) for every item, computed by threads a few items ahead, given out in order."""
    with ThreadPoolExecutor(threads) as executor:
        pending: deque = deque()
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 8 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def held_out_split(source: Any) -> str:
    """The split to validate on: 'validation', else 'test'. Raises SourceError: neither is there."""
    for split in ('validation', 'test'):
        if source.info.splits and split in source.info.splits and source.info.splits[split].num_examples:
            return split
    raise SourceError(f'{source.name}: no validation or test split; there are {sorted(source.info.splits)}')


def imagenet_tars(data_dir: str) -> str:
    """The folder with ImageNet's tars: data_dir/downloads/manual as TFDS has it, or data_dir itself.

    Raises SourceError: one is missing; says which, and where it goes.
    """
    folders = [os.path.join(data_dir, 'downloads', 'manual'), data_dir]
    for folder in folders:
        if all(os.path.exists(os.path.join(folder, tar)) for tar in IMAGENET_TARS):
            return folder
    missing = [tar for tar in IMAGENET_TARS if not any(os.path.exists(os.path.join(f, tar)) for f in folders)]
    what = ' and '.join(missing or IMAGENET_TARS)
    raise SourceError(f'ImageNet: put {what} (ILSVRC2012, from image-net.org) into {folders[0]}')


def source_builder(source: str, data_dir: str) -> Any:
    """The TFDS builder of `source` ('photos' or 'tfds:NAME'), its data ready to be read.

    Raises SourceError: tars are missing, the name is unknown, or it was prepared in a format without random access.
    """
    config = tfds.download.DownloadConfig()
    name = source.removeprefix('tfds:').replace(':', '/')
    try:
        if source == 'photos':
            from alexnet_jax.data.photos import Photos

            builder: Any = Photos(data_dir=data_dir, file_format='array_record')
        else:
            builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except tfds.core.registered.DatasetNotFoundError:
        raise SourceError(f"config.data.source: TFDS has no data set {name!r}; see 'tfds.list_builders()'") from None
    except ValueError as error:
        if 'File format is already set' not in str(error):
            raise
        raise SourceError(
            f'{name} in {data_dir} is there in another format than array_record, which has no random access:'
            ' name another config.data.data_dir, or remove it'
        ) from None
    features = builder.info.features
    if not {'image', 'label'} <= set(features) or not hasattr(features['label'], 'names'):
        raise SourceError(f'config.data.source: {name!r} has no images with class labels, but {sorted(features)}')
    if builder.name == 'imagenet2012' and not builder.is_prepared():
        config.manual_dir = imagenet_tars(data_dir)
    if not builder.is_prepared():
        log(f'reading {source} with TFDS into {builder.data_dir}')
    builder.download_and_prepare(download_config=config)
    return builder


def prepare(source: str, data_dir: str, image_size: int, threads: int) -> str:
    """Write the store of `source` unless it is there, and return its folder.

    It is made aside and renamed when complete. Raises SourceError: see source_builder, or the disk is too small.
    """
    data_dir = os.path.abspath(os.path.expanduser(data_dir))
    target = store_directory(data_dir, source, image_size)
    if os.path.exists(target):
        return target
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(f'{target}.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f'{target}: another process prepares it; waiting until it is there')
            fcntl.flock(lock, fcntl.LOCK_EX)  # also when the other one ends without it
        if not os.path.exists(target):
            _prepare(source, data_dir, image_size, threads, target)
    return target


def _prepare(source: str, data_dir: str, image_size: int, threads: int, target: str) -> None:
    aside = f'{target}.incomplete'
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    builder = source_builder(source, data_dir)
    examples = sum(builder.info.splits[split].num_examples for split in ('train', held_out_split(builder)))
    needed, free = examples * image_size**2 * 3, shutil.disk_usage(os.path.dirname(target)).free
    if needed > free:
        raise SourceError(
            f'{target} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: name another data_dir'
        )
    tfds.disable_progress_bar()
    prepared = Prepared(source=builder, image_size=image_size, threads=threads, data_dir=aside)
    prepared.download_and_prepare()
    folder = str(prepared.data_dir)
    np.savez(os.path.join(folder, 'statistics.npz'), allow_pickle=False, **prepared.statistics.result())
    os.rename(folder, target)
    shutil.rmtree(aside)
    log(f'prepared {target}: {needed / 1e9:.2f} GB')


def main(argv: list[str]) -> None:
    """Run as a command; exit code 2 and one line where the source cannot be read."""
    del argv
    logging.set_verbosity(logging.ERROR)
    args = flags.FLAGS
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints sizes it does not know
            prepare(args.source, args.data_dir, args.image_size, args.threads)
    except (SourceError, OSError) as error:
        print(f'alexnet_jax: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    flags.DEFINE_string('source', 'photos', "'photos' or 'tfds:NAME'.")
    flags.DEFINE_string('data_dir', '~/tensorflow_datasets', 'Where data sets and prepared stores lie.')
    flags.DEFINE_integer('image_size', 256, 'Pixels a side.', lower_bound=8)
    flags.DEFINE_integer('threads', os.cpu_count() or 1, 'That decode and scale.', lower_bound=1)
    app.run(main)
