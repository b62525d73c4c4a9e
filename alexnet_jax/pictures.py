"""Pictures to show a trained network: any file or folder, and the validation images of its data."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from alexnet_jax.config import ConfigError
from alexnet_jax.data import pipeline
from alexnet_jax.data.images import UnreadableImage, read_image, square


def picture_files(names: Iterable[str]) -> list[str]:
    """The files that `names` stand for: those below a folder sorted, without hidden ones. Raises ConfigError: none."""
    files = []
    for name in map(os.path.expanduser, names):
        if not os.path.isdir(name):
            files.append(name)
            continue
        below = list(_files_below(name))
        if not below:
            raise ConfigError(f'{name}: a folder without files; name pictures or a folder with some')
        files += sorted(below)
    return files


def _files_below(folder: str) -> Iterator[str]:
    """Files, and folders that cannot be looked into, so that reading them says why."""
    closed: list[str] = []
    for where, folders, found in os.walk(folder, onerror=lambda error: closed.append(error.filename)):
        folders[:] = [each for each in folders if not each.startswith('.')]
        yield from (os.path.join(where, file) for file in found if not file.startswith('.'))
    yield from closed


def read_picture(file: str, data: Any) -> np.ndarray:
    """The picture in `file` as `prepare` would store it: (S, S, C) uint8. Raises UnreadableImage, which says why.

    data: of the run's configuration.
    """
    try:
        with open(file, 'rb') as opened:
            return square(read_image(opened.read()), data.image_size, data.channels)
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from None


def true_label(file: str, class_names: Sequence[str]) -> str | None:
    """The class that the folder of `file` is named after, or None."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(file)))
    return folder if folder in class_names else None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to look at.

    Attributes:
      name: of its file, or where in the data it is.
      pixels: (S, S, C) uint8 as the network's data have it.
      label: its true class, where that is known.
      problem: why it cannot be read, in words; then there are no pixels.
    """

    name: str
    pixels: np.ndarray
    label: str | None
    problem: str = ''


def of_files(files: Iterable[str], data: Any, class_names: Sequence[str]) -> Iterator[Picture]:
    """The pictures in `files`, read when it is their turn; labelled where their folder has the name of a class."""
    for file in files:
        label = true_label(file, class_names)
        try:
            yield Picture(file, read_picture(file, data), label)
        except UnreadableImage as error:
            yield Picture(file, np.empty(0, np.uint8), label, str(error))


def of_validation(store: pipeline.Store, count: int) -> list[Picture]:
    """About `count` validation images, evenly spread over them."""
    return [
        Picture(f'validation {number}', example['image'], store.class_names[example['label']])
        for number, example in pipeline.spread(store.validation, count)
    ]
