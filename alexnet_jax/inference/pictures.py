"""Pictures as the methods of TrainedModel take them: files, Pillow images and arrays."""

import os
from collections.abc import Iterable
from typing import Protocol, TypedDict

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from alexnet_jax.config import ConfigError, DataConfig
from alexnet_jax.data.images import UnreadableImage, read_image, resize_and_center_crop
from alexnet_jax.inference.images import read_image_file
from alexnet_jax.paths import is_url, shown


class SupportsArray(Protocol):
    """An array of another library, such as JAX."""

    def __array__(self) -> np.ndarray:
        """Returns the values of the array."""


Picture = str | os.PathLike[str] | Image.Image | np.ndarray | SupportsArray
ClassProbability = TypedDict('ClassProbability', {'class': str, 'probability': float})
_WANTED = 'give a path, a Pillow image or a NumPy array of uint8 (H, W, 3) or (H, W), or a list of them'


def is_one_picture(pictures: Picture | Iterable[Picture]) -> bool:
    """Returns whether `pictures` is a single picture; an array of four dimensions is many."""
    if isinstance(pictures, str | bytes | os.PathLike | Image.Image):
        return True
    return hasattr(pictures, '__array__') and np.asarray(pictures).ndim < 4


def list_pictures(pictures: Picture | Iterable[Picture]) -> list[str | Image.Image | np.ndarray]:
    """Returns `pictures` as a list of files, Pillow images and pixels, uint8 (H, W) or (H, W, 3).

    Arrays of other libraries, such as JAX, become NumPy arrays. Files are not read.

    Raises ConfigError: there are none, or one has another type, dtype or shape.
    """
    if is_one_picture(pictures):
        every: Iterable = [pictures]
    elif isinstance(pictures, Iterable):
        every = np.asarray(pictures) if hasattr(pictures, '__array__') else pictures
    else:
        raise ConfigError(f'pictures: {type(pictures).__name__} is not a picture; {_WANTED}')
    listed = [_check_picture(picture, f'picture {position}') for position, picture in enumerate(every)]
    if not listed:
        raise ConfigError('pictures: the list is empty; give at least one picture')
    return listed


def _check_picture(picture: object, name: str) -> str | Image.Image | np.ndarray:
    """Returns `picture` in the form of list_pictures(). Raises ConfigError: it has another type, dtype or shape."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, str | os.PathLike):
        path = os.fspath(picture)
        if not isinstance(path, str) or not path or '\0' in path:
            raise ConfigError(f'{name}: {path!r} is not a path; give the path of a file as text')
        return path
    if not hasattr(picture, '__array__'):
        raise ConfigError(f'{name}: {type(picture).__name__} is not a picture; {_WANTED}')
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8:
        raise ConfigError(
            f'{name}: the dtype is {pixels.dtype}; give uint8 from 0 to 255, for values from 0 to 1'
            ' (255 * x).round().astype(np.uint8)'
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise ConfigError(f'{name}: the shape is {pixels.shape}; give (H, W, 3) with channels RGB, or (H, W)')
    return pixels


def prepare_picture(
    picture: str | Image.Image | np.ndarray, position: int, data: DataConfig
) -> UInt8[np.ndarray, 's s c']:
    """Returns `picture`, scaled and cropped like the images of the data set with the settings `data`.

    Args:
      picture: see list_pictures().
      position: position among the pictures of the caller, for messages.
      data: `image_size` and `channels` determine the shape of the result.

    Raises UnreadableImage: the message has the name of the file, or the position, and the reason.
    """
    name = shown(picture) if isinstance(picture, str) else f'picture {position}'
    try:
        if isinstance(picture, str):
            if is_url(picture) and not os.path.exists(picture):
                raise UnreadableImage('a URL, which is not read; download the picture and give its path')
            return read_image_file(os.path.expanduser(picture), data)
        if 0 in (picture.shape if isinstance(picture, np.ndarray) else picture.size):
            raise UnreadableImage('it has no pixels')
        return resize_and_center_crop(read_image(picture), data.image_size, data.channels)
    except UnreadableImage as error:
        raise UnreadableImage(f'{name}: {error}') from None
