"""Pictures as the methods of TrainedModel take them: files, Pillow images and arrays."""

import os
from collections.abc import Iterable
from typing import TypedDict

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from alexnet_jax.config import ConfigError, DataConfig
from alexnet_jax.data.images import UnreadableImage, read_image, resize_and_center_crop
from alexnet_jax.inference.images import read_image_file

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
ClassProbability = TypedDict('ClassProbability', {'class': str, 'probability': float})


def is_one_picture(pictures: Picture | Iterable[Picture]) -> bool:
    """Returns whether `pictures` is a single picture; an array of four dimensions is many."""
    return isinstance(pictures, str | bytes | os.PathLike | Image.Image) or (
        isinstance(pictures, np.ndarray) and pictures.ndim < 4
    )


def list_pictures(pictures: Picture | Iterable[Picture]) -> list[Picture]:
    """Returns `pictures` as a list. Raises ConfigError: there are none, or `pictures` has another type."""
    if is_one_picture(pictures):
        return [pictures]  # type: ignore[list-item]
    if not isinstance(pictures, Iterable):
        raise ConfigError(f'pictures: {type(pictures).__name__} is not a picture; {_WANTED}')
    listed = list(pictures)
    if not listed:
        raise ConfigError('pictures: the list is empty; give at least one picture')
    return listed


def prepare_picture(picture: Picture, position: int, data: DataConfig) -> UInt8[np.ndarray, 's s c']:
    """Returns `picture`, scaled and cropped like the images of the data set with the settings `data`.

    Args:
      picture: a file, a Pillow image, or pixels, uint8 (H, W), (H, W, 1) or (H, W, 3) RGB.
      position: position among the pictures of the caller, for messages.
      data: `image_size` and `channels` determine the shape of the result.

    Raises:
      UnreadableImage: the message has the name of the file, or the position, and the reason.
      ConfigError: `picture` has another type, dtype or shape.
    """
    name = f'picture {position}'
    try:
        if isinstance(picture, str | os.PathLike):
            name = os.fspath(picture)
            if not isinstance(name, str):
                raise ConfigError(f'picture {position}: a path of bytes; give the path as text')
            return read_image_file(os.path.expanduser(name), data)
        if isinstance(picture, np.ndarray):
            content: np.ndarray | Image.Image = _check_pixels(picture, name)
        elif isinstance(picture, Image.Image):
            content = picture
        else:
            raise ConfigError(f'{name}: {type(picture).__name__} is not a picture; {_WANTED}')
        if 0 in picture.shape if isinstance(picture, np.ndarray) else 0 in picture.size:
            raise UnreadableImage('it has no pixels')
        return resize_and_center_crop(read_image(content), data.image_size, data.channels)
    except UnreadableImage as error:
        raise UnreadableImage(f'{name}: {error}') from None


_WANTED = 'give a path, a Pillow image or a NumPy array of uint8 (H, W, 3) or (H, W), or a list of them'


def _check_pixels(pixels: np.ndarray, name: str) -> UInt8[np.ndarray, 'h w'] | UInt8[np.ndarray, 'h w 3']:
    """Returns `pixels` without a last dimension of 1. Raises ConfigError: another dtype or shape."""
    if pixels.dtype != np.uint8:
        raise ConfigError(
            f'{name}: the dtype is {pixels.dtype}; give uint8 from 0 to 255, for values from 0 to 1'
            ' (255 * x).round().astype(np.uint8)'
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        return pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise ConfigError(f'{name}: the shape is {pixels.shape}; give (H, W, 3) with channels RGB, or (H, W)')
    return pixels


def check_images(images: object, data: DataConfig) -> UInt8[np.ndarray, 'n s s c']:
    """Returns `images`. Raises ConfigError: they are not a uint8 array (N, image_size, image_size, channels)."""
    wanted = f'uint8 (N, {data.image_size}, {data.image_size}, {data.channels})'
    remedy = f'give {wanted}, which the method images() makes of pictures of any size'
    if not isinstance(images, np.ndarray):
        raise ConfigError(f'images: {type(images).__name__} is not a NumPy array; {remedy}')
    if images.dtype != np.uint8:
        raise ConfigError(f'images: the dtype is {images.dtype}; {remedy}')
    if images.shape[1:] != (data.image_size, data.image_size, data.channels):
        raise ConfigError(f'images: the shape is {images.shape}; {remedy}')
    if not len(images):
        raise ConfigError(f'images: there are none; {remedy}')
    return images
