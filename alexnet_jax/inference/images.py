"""Input images for a trained model: image files, folders, and validation images of the model's data set."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from alexnet_jax.config import ConfigError, DataConfig
from alexnet_jax.data.dataset import PreparedDataset
from alexnet_jax.data.images import UnreadableImage, read_file, read_image, resize_and_center_crop
from alexnet_jax.data.split_reader import evenly_spaced
from alexnet_jax.paths import is_url


def expand_paths(names: Iterable[str]) -> list[str]:
    """Returns `names` with each folder replaced by all files below the folder, sorted, without hidden files.

    Raises ConfigError: a folder has no files, or a name is a URL or stands for standard input.
    """
    files = []
    for name in map(os.path.expanduser, names):
        if (is_url(name) or name == '-') and not os.path.exists(name):
            what = 'standard input' if name == '-' else 'a URL'
            raise ConfigError(f'{name}: {what} is not read; save the image as a file and name the file')
        if not os.path.isdir(name):
            files.append(name)
            continue
        below = list(_files_below(name))
        if not below:
            raise ConfigError(f'{name}: the folder contains no files; name image files, or a folder that contains some')
        files += sorted(below)
    return files


def _files_below(folder: str) -> Iterator[str]:
    """Yields the files below `folder`, then the unreadable folders, for which read_image_file() reports the reason."""
    unreadable: list[str] = []
    for where, folders, found in os.walk(folder, onerror=lambda error: unreadable.append(error.filename)):
        folders[:] = [each for each in folders if not each.startswith('.')]
        yield from (os.path.join(where, file) for file in found if not file.startswith('.'))
    yield from unreadable


def read_image_file(file: str, data: DataConfig) -> UInt8[np.ndarray, 's s c']:
    """Returns the image in `file`, scaled and cropped like the images of the data set with the settings `data`.

    Raises UnreadableImage: the message gives the reason.
    """
    try:
        return resize_and_center_crop(read_image(read_file(file)), data.image_size, data.channels)
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from None


def label_from_folder(file: str, class_names: Sequence[str]) -> str | None:
    """Returns the name of the folder that contains `file` if the name is a class, otherwise None."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(file)))
    return folder if folder in class_names else None


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """An input image.

    Attributes:
      name: file name, or position in the validation split.
      pixels: image in the format of the model's data set; an array of shape (0, 0, 0) if the image is unreadable.
      label: true class, or None if unknown.
      problem: reason why the image is unreadable, or ''.
    """

    name: str
    pixels: UInt8[np.ndarray, 's s c']
    label: str | None
    problem: str = ''


def load_images(files: Iterable[str], data: DataConfig, class_names: Sequence[str]) -> Iterator[ImageInput]:
    """Reads the images in `files` on demand. An image has a label if its folder has the name of a class."""
    for file in files:
        label = label_from_folder(file, class_names)
        try:
            yield ImageInput(file, read_image_file(file, data), label)
        except UnreadableImage as error:
            yield ImageInput(file, np.empty((0, 0, 0), np.uint8), label, str(error))


def sample_validation(prepared: PreparedDataset, count: int) -> list[ImageInput]:
    """Returns at most `count` validation images, evenly spaced over the split."""
    return [
        ImageInput(f'validation {number}', example['image'], prepared.class_names[example['label']])
        for number, example in evenly_spaced(prepared.validation, count)
    ]
