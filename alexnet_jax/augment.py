"""Augmentation on the device (section 4.1): windows, reflections, colour noise, mean, and the ten views of a test.

Each image's window, reflection and noise are a pure function of its key: mesh and batch do not matter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def example_keys(seed: int, number: jax.Array, purpose: int) -> jax.Array:
    """One key (B,) an image: from the run's seed and `number` (B,) uint32, which counts images seen since the start."""
    key = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(number)


def preprocessing(statistics: Any, config: Any) -> dict[str, Any]:
    """What augment() and view() need of the training set's `statistics`, by `config` (`data` of a configuration).

    Returns:
      mean: (S, S, C) float32, subtracted from every pixel: mean image, channel means or zeros.
      color: (C, C) float32, what a vector of C standard normal numbers is multiplied with to give the noise in grey
        levels. Its columns are 0.1 times the eigenvectors of the covariance of RGB values, and times
        `original`: the square roots of the eigenvalues (convdata_jpeg.py of the original program);
        `fb`: the eigenvalues with pixels from 0 to 1 (fb.resnet.torch);
        `paper`: the eigenvalues with pixels from 0 to 255, which is what the sentence in the paper says.
      divisor: float32, of training inputs: 1.1 with `original`, as the original program does to make up for the noise's
        variance, otherwise 1.
      scale: (C,) float32, what inputs of training and of tests are multiplied with, 1 / config.divisor.
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
        'scale': np.broadcast_to(1 / np.array(config.divisor), shape[-1:]).astype(np.float32),
    }


def disable_color_augmentation(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """The same without colour noise and what makes up for it, as the original program went on for its last epochs."""
    return preprocessing | {'color': np.zeros_like(preprocessing['color']), 'divisor': np.float32(1)}


def augment(
    images: jax.Array, keys: jax.Array, crop_keys: jax.Array, preprocessing: dict[str, jax.Array], config: Any
) -> jax.Array:
    """Training inputs: a random window, reflected or not, less the mean, with colour noise.

    Args:
      images: (B, S, S, C) uint8.
      keys: (B,), one an image, for its noise.
      crop_keys: (B,), for window and reflection; images with the same key have the same.
      preprocessing: see preprocessing().
      config: `data` of a configuration; `crop`, `flip` and `color` switch the parts.

    Returns:
      (B, crop_size, crop_size, C) float32 in grey levels around zero.
    """
    size, crop = images.shape[1], config.crop_size

    def one(image, key, window_key):
        offset = jnp.full((2,), (size - crop) // 2)
        if config.crop:
            offset = jax.random.randint(jax.random.fold_in(window_key, 0), (2,), 0, size - crop + 1)
        x = _window(image, offset, crop).astype(jnp.float32) - _mean(preprocessing, offset, config)
        if config.flip:
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(window_key, 1)), x[:, ::-1], x)
        if config.color != 'none':
            color = preprocessing['color']
            strengths = jax.random.normal(jax.random.fold_in(key, 2), color.shape[:1])
            # Not a product of matrices: XLA's library for those would take the whole function with it, on one core.
            x = x + jnp.sum(color * strengths[None], 1)[None, None]
        return x / preprocessing['divisor'] * preprocessing['scale'][None, None]

    return jax.vmap(one)(images, keys, crop_keys)


def view(images: jax.Array, preprocessing: dict[str, jax.Array], config: Any, index: jax.Array | int) -> jax.Array:
    """One view of each image for testing: index 0 the centre, 1 to 4 the corners, 5 to 9 the same reflected.

    `images` (B, S, S, C) uint8 give (B, crop_size, crop_size, C) float32, less the mean, without noise; `config` is
    `data` of a configuration.
    """
    crop = config.crop_size
    far = images.shape[1] - crop
    offsets = jnp.array([(far // 2, far // 2), (0, 0), (0, far), (far, 0), (far, far)])
    offset = offsets[index % 5]
    batch = jax.vmap(lambda image: _window(image, offset, crop))(images)
    x = batch.astype(jnp.float32) - _mean(preprocessing, offset, config)[None]
    return jnp.where(index >= 5, x[:, :, ::-1], x) * preprocessing['scale'][None, None, None]


def _mean(preprocessing: dict[str, jax.Array], offset: jax.Array, config: Any) -> jax.Array:
    """What is subtracted from a window at `offset`: that window of the mean, or as the original program its centre."""
    if config.mean_window == 'centre':
        offset = jnp.full((2,), (preprocessing['mean'].shape[0] - config.crop_size) // 2)
    return _window(preprocessing['mean'], offset, config.crop_size)


def _window(image: jax.Array, offset: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, image.shape[2]))
