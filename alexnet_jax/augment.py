"""Augmentation on the device (section 4.1): crops, horizontal flips, color noise, mean subtraction, ten test views.

Crops of random size and random erasing are of later recipes. The augmentation of an image is a pure function of its
keys, and does not depend on the mesh or the batch.
"""

import math
from collections.abc import Mapping
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, UInt8, UInt32

from alexnet_jax.config import DataConfig
from alexnet_jax.layers import platform

# Fractions of the input's area, and ratios width / height, of the rectangles of random erasing: the defaults of
# torchvision's RandomErasing (Zhong et al. 2017, "Random Erasing Data Augmentation"), whose ratios are height / width.
ERASED_AREA, ERASED_ASPECT_RATIO = (0.02, 0.33), (1 / 3.3, 1 / 0.3)


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

    With config.random_erasing, a rectangle of some of the results is 0.

    Args:
      images: the images of the prepared data set.
      keys: keys of the color noise and of random erasing.
      crop_keys: keys of the crop and the horizontal flip; images with the same key get the same crop and flip.
      preprocessing: see make_preprocess_params().
      config: `crop`, `crop_scale`, `flip`, `color` and `random_erasing` select the operations, and `crop_size` the size
        of the result.

    Returns:
      The training inputs in gray levels minus the mean, times preprocessing['scale'].
    """
    size, crop = images.shape[1], config.crop_size

    def one(image, key, crop_key):
        offset = jnp.full((2,), (size - crop) // 2)
        if config.crop:
            offset = jax.random.randint(jax.random.fold_in(crop_key, 0), (2,), 0, size - crop + 1)
        if config.crop_scale is None:
            x = _crop_minus_mean(image, offset, preprocessing, config)
        else:
            x = _random_resized_crop(image, jax.random.fold_in(crop_key, 3), preprocessing, config)
        if config.flip:
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(crop_key, 1)), x[:, ::-1], x)
        if config.color != 'none':
            color = preprocessing['color']
            strengths = jax.random.normal(jax.random.fold_in(key, 2), color.shape[:1])
            # With a matrix product, XLA would run the whole function in its matrix library, on one core.
            x = x + jnp.sum(color * strengths[None], 1)[None, None]
        x = x / preprocessing['divisor'] * preprocessing['scale'][None, None]
        return _random_erasing(x, jax.random.fold_in(key, 4), config.random_erasing) if config.random_erasing else x

    return jax.vmap(one)(images, keys, crop_keys)


def random_window(
    key: Key[Array, ''], side: int, area: tuple[float, ...], aspect_ratio: tuple[float, ...], largest: int
) -> tuple[Int32[Array, '2'], Int32[Array, '2'], Bool[Array, '']]:
    """Draws a rectangle in a square of `side` pixels, as get_params() of torchvision's random transformations.

    Each of ten tries draws the area uniformly and the logarithm of the aspect ratio uniformly, and rounds height and
    width to whole pixels. The first try whose height and width are 1 to `largest` pixels counts.

    Args:
      key: key of the random numbers.
      side: height and width of the square in pixels.
      area: minimum and maximum of the area / the area of the square.
      aspect_ratio: minimum and maximum of width / height.
      largest: maximum height and width in pixels.

    Returns:
      (offset, size, fits): top and left, height and width in pixels, and whether one of the tries fits.
    """
    area_key, aspect_key, offset_key = jax.random.split(key, 3)
    areas = side * side * jax.random.uniform(area_key, (10,), minval=area[0], maxval=area[1])
    least, greatest = map(math.log, aspect_ratio)
    ratios = jnp.exp(jax.random.uniform(aspect_key, (10,), minval=least, maxval=greatest))
    sizes = jnp.round(jnp.sqrt(jnp.stack([areas / ratios, areas * ratios], 1))).astype(jnp.int32)
    fits = jnp.all((sizes >= 1) & (sizes <= largest), 1)
    size = sizes[jnp.argmax(fits)]
    return jax.random.randint(offset_key, (2,), 0, side + 1 - size), size, fits.any()


def window_mask(offset: Int32[Array, '2'], size: Int32[Array, '2'], side: int) -> Bool[Array, 'side side']:
    """Returns a mask of a square of `side` pixels, which is True in the rectangle of `size` pixels at `offset`."""
    pixels = jnp.arange(side)[None]
    rows, columns = (pixels >= offset[:, None]) & (pixels < (offset + size)[:, None])
    return rows[:, None] & columns[None]


def _random_resized_crop(
    image: UInt8[Array, 's s c'], key: Key[Array, ''], preprocessing: PreprocessParams, config: DataConfig
) -> Float32[Array, 'crop crop c']:
    """Returns a crop of random size and aspect ratio, minus the mean, scaled to config.crop_size.

    The distribution of the crop is that of torchvision's RandomResizedCrop on the stored square. If none of ten tries
    fits, the crop is the largest central rectangle whose aspect ratio is allowed. The scaling is bilinear with
    antialiasing; pixels next to the crop contribute to its border, as in Pillow's resize() with a box.
    """
    side, crop = image.shape[0], config.crop_size
    assert config.crop_scale is not None
    offset, size, fits = random_window(key, side, config.crop_scale, config.crop_aspect_ratio, side)
    least, greatest = config.crop_aspect_ratio
    whole = jnp.array([round(side / max(least, 1.0)), round(side * min(greatest, 1.0))], jnp.int32)
    offset, size = jnp.where(fits, offset, (side - whole) // 2), jnp.where(fits, size, whole)
    scale = crop / size.astype(jnp.float32)
    translation = -offset.astype(jnp.float32) * scale
    x = image.astype(jnp.float32)
    if config.mean_crop == 'matching':
        x = x - preprocessing['mean']
    x = jax.image.scale_and_translate(x, (crop, crop, x.shape[2]), (0, 1), scale, translation, 'linear')
    return x - _mean(preprocessing, offset, config) if config.mean_crop == 'center' else x


def _random_erasing(
    x: Float32[Array, 'crop crop c'], key: Key[Array, ''], probability: float
) -> Float32[Array, 'crop crop c']:
    """Returns `x` with a random rectangle set to 0 with `probability`; the source is given at ERASED_AREA."""
    side = x.shape[0]
    offset, size, fits = random_window(jax.random.fold_in(key, 0), side, ERASED_AREA, ERASED_ASPECT_RATIO, side - 1)
    erases = fits & jax.random.bernoulli(jax.random.fold_in(key, 1), probability)
    return jnp.where((erases & window_mask(offset, size, side))[:, :, None], 0.0, x)


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


def _crop_minus_mean(
    image: UInt8[Array, 's s c'], offset: Int[Array, '2'], preprocessing: PreprocessParams, config: DataConfig
) -> Float32[Array, 'crop crop c']:
    """Returns the crop of `image` at `offset`, minus the mean.

    On TPUs, the mean is subtracted before the crop: XLA crops a batch in a loop over its images, in which it would copy
    the whole batch of uint8 (43 % of the modeled step of `paper` on a v5e), and would crop the mean in another loop.
    """
    if platform() != 'tpu':
        return _crop(image, offset, config.crop_size).astype(jnp.float32) - _mean(preprocessing, offset, config)
    x = image.astype(jnp.float32)
    if config.mean_crop == 'center':
        return _crop(x, offset, config.crop_size) - _mean(preprocessing, offset, config)
    return _crop(x - preprocessing['mean'], offset, config.crop_size)


def _crop(image: jax.Array | np.ndarray, offset: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, image.shape[2]))
