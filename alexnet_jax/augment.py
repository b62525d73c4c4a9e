"""Augmentation on the device (section 4.1): crops, horizontal flips, color noise, mean subtraction, ten test views.

The crop, flip and noise of an image are a pure function of its keys, and do not depend on the mesh or the batch.
"""

from collections.abc import Mapping
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Key, UInt8, UInt32

from alexnet_jax.config import DataConfig


def example_keys(seed: int, number: UInt32[Array, ' b'], purpose: int) -> Key[Array, ' b']:
    """Returns one random key per image.

    Args:
      seed: seed of the run.
      number: index of each image in the run, or of a group of images that share a key.
      purpose: makes the keys for different uses of the same `number` independent.
    """
    key = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(number)


class PreprocessParams(TypedDict):
    """The constants of augment() and eval_crop(), see make_preprocess_params().

    In training with config.class_weights, `class_weights` are the factors of the loss by label.
    """

    mean: Float32[Array | np.ndarray, 's s c']
    color: Float32[Array | np.ndarray, 'c c']
    divisor: Float32[Array | np.ndarray | np.float32, '']
    scale: Float32[Array | np.ndarray, ' c']
    class_weights: NotRequired[Float32[Array | np.ndarray, ' classes']]


def make_preprocess_params(statistics: Mapping[str, np.ndarray], config: DataConfig) -> PreprocessParams:
    """Computes the constants of augment() and eval_crop() from the training set's `statistics`.

    `statistics`: see dataset.PreparedDataset.

    Returns:
      mean: the mean image, channel means or zeros; augment() and eval_crop() subtract them.
      color: the matrix that maps C standard normal numbers to the color noise in gray levels. The columns are the
        eigenvectors of the covariance of RGB values, times 0.1 and times a factor that depends on config.color:
        `original`: the square roots of the eigenvalues (convdata_jpeg.py of the original program);
        `fb`: the eigenvalues for pixels from 0 to 1 (fb.resnet.torch), converted to gray levels: divided by 255;
        `paper`: the eigenvalues for pixels from 0 to 255, as printed in the paper;
        `none`: 0.
      divisor: the divisor of training inputs: 1.1 for `original`, where it compensates for the variance of the noise as
        in the original program, otherwise 1.
      scale: the factor of training and test inputs, 1 / config.std.
    """
    shape = statistics['mean_image'].shape
    means = {
        'image': statistics['mean_image'],
        'channel': np.broadcast_to(statistics['mean_rgb'], shape),
        'none': np.zeros(shape),
    }
    eigenvalues = np.maximum(statistics['eigenvalues'], 0)
    scales = {'none': 0 * eigenvalues, 'original': np.sqrt(eigenvalues), 'fb': eigenvalues / 255, 'paper': eigenvalues}
    color = 0.1 * statistics['eigenvectors'] * scales[config.color]
    return {
        'mean': means[config.mean].astype(np.float32),
        'color': color.astype(np.float32),
        'divisor': np.float32(1.1 if config.color == 'original' else 1.0),
        'scale': np.broadcast_to(1 / np.array(config.std), shape[-1:]).astype(np.float32),
    }


def disable_color_augmentation(preprocessing: PreprocessParams) -> PreprocessParams:
    """Returns `preprocessing` without color noise and with divisor 1, as in the last epochs of the original program."""
    return {**preprocessing, 'color': np.zeros_like(preprocessing['color']), 'divisor': np.float32(1)}


def augment(
    images: UInt8[Array, 'b s s c'],
    keys: Key[Array, ' b'],
    crop_keys: Key[Array, ' b'],
    preprocessing: PreprocessParams,
    config: DataConfig,
) -> Float32[Array, 'b crop crop c']:
    """Computes training inputs: takes a random crop, subtracts the mean, flips at random, adds color noise, and scales.

    Args:
      images: the images of the prepared data set.
      keys: keys of the color noise.
      crop_keys: keys of the crop and the horizontal flip; images with the same key get the same crop and flip.
      preprocessing: see make_preprocess_params().
      config: `crop`, `flip` and `color` select the operations, and `crop_size` the size of the result.

    Returns:
      The training inputs in gray levels minus the mean, times preprocessing['scale'].
    """
    size, crop = images.shape[1], config.crop_size

    def one(image, key, crop_key):
        offset = jnp.full((2,), (size - crop) // 2)
        if config.crop:
            offset = jax.random.randint(jax.random.fold_in(crop_key, 0), (2,), 0, size - crop + 1)
        x = _crop(image, offset, crop).astype(jnp.float32) - _mean(preprocessing, offset, config)
        if config.flip:
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(crop_key, 1)), x[:, ::-1], x)
        if config.color != 'none':
            color = preprocessing['color']
            strengths = jax.random.normal(jax.random.fold_in(key, 2), color.shape[:1])
            # With a matrix product, XLA would run the whole function in its matrix library, on one core.
            x = x + jnp.sum(color * strengths[None], 1)[None, None]
        return x / preprocessing['divisor'] * preprocessing['scale'][None, None]

    return jax.vmap(one)(images, keys, crop_keys)


def eval_crop(
    images: UInt8[Array, 'b s s c'], preprocessing: PreprocessParams, config: DataConfig, index: Int[Array, ''] | int
) -> Float32[Array, 'b crop crop c']:
    """Computes one test view of each image, without color noise.

    Args:
      images: the images of the prepared data set.
      preprocessing: see make_preprocess_params().
      config: provides `crop_size` and `mean_crop`.
      index: 0 for the center crop, 1 to 4 for the corners, 5 to 9 for horizontal flips of the same five crops.

    Returns:
      The crops in gray levels minus the mean, times preprocessing['scale'].
    """
    crop = config.crop_size
    far = images.shape[1] - crop
    offsets = jnp.array([(far // 2, far // 2), (0, 0), (0, far), (far, 0), (far, far)])
    offset = offsets[index % 5]
    batch = jax.vmap(lambda image: _crop(image, offset, crop))(images)
    x = batch.astype(jnp.float32) - _mean(preprocessing, offset, config)[None]
    return jnp.where(index >= 5, x[:, :, ::-1], x) * preprocessing['scale'][None, None, None]


def _mean(preprocessing: PreprocessParams, offset: jax.Array, config: DataConfig) -> jax.Array:
    """Returns the crop of the mean at `offset`, or at the center if config.mean_crop is 'center'."""
    if config.mean_crop == 'center':
        offset = jnp.full((2,), (preprocessing['mean'].shape[0] - config.crop_size) // 2)
    return _crop(preprocessing['mean'], offset, config.crop_size)


def _crop(image: jax.Array | np.ndarray, offset: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, image.shape[2]))
