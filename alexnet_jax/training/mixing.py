"""Mixup and CutMix: mixtures of pairs of training images, and the loss of the mixed labels.

The partner of the example e is e XOR 1. A batch is a random selection of the images, so a neighbor is a random partner,
which is on the same device. The mixture is a pure function of the key of the example and of the two images.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, Key, Shaped

from alexnet_jax.augment import window_mask
from alexnet_jax.config import TrainConfig


def swap_pairs(rows: Shaped[Array, ' b *dims']) -> Shaped[Array, ' b *dims']:
    """Returns `rows` in the order 1, 0, 3, 2, ..., so that each row has its partner's place."""
    return rows.reshape(-1, 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)


def mix_pairs(
    images: Float32[Array, 'b crop crop c'], keys: Key[Array, ' b'], config: TrainConfig
) -> tuple[Float32[Array, 'b crop crop c'], Float32[Array, ' b']]:
    """Mixes each training input with that of its partner, see swap_pairs().

    Mixup (Zhang et al. 2017) takes the mean of both images with the factors f and 1 - f. CutMix (Yun et al. 2019)
    replaces a box of the image by the same box of the partner. The factor f has the distribution
    Beta(config.mixup, config.mixup) or Beta(config.cutmix, config.cutmix). If both are on, each example has either with
    probability 1/2.

    Args:
      images: the training inputs, the results of augment().
      keys: one key per image.
      config: `mixup` and `cutmix`, at least one of which is not 0.

    Returns:
      (mixed images, factors): the factor of an image is the fraction that it contributes to its mixture; for CutMix
      that is the fraction of the pixels outside the box.
    """
    side = images.shape[1]

    def one(image, partner, key):
        weights = factor = jnp.ones(())
        if config.mixup:
            weights = factor = jax.random.beta(jax.random.fold_in(key, 0), config.mixup, config.mixup)
        if config.cutmix:
            kept = _cutmix_mask(jax.random.fold_in(key, 1), side, config.cutmix)
            is_cut = jax.random.bernoulli(jax.random.fold_in(key, 2)) if config.mixup else jnp.array(True)
            weights, factor = jnp.where(is_cut, kept, weights), jnp.where(is_cut, kept.mean(), factor)
        weights = jnp.broadcast_to(weights, (side, side))[:, :, None]
        return weights * image + (1 - weights) * partner, factor

    return jax.vmap(one)(images, swap_pairs(images), keys)


def _cutmix_mask(key: Key[Array, ''], side: int, parameter: float) -> Float32[Array, 'side side']:
    """Returns 0 in the box of CutMix and 1 elsewhere.

    As in the program of the authors, the sides of the box are those of the image times sqrt(1 - f), rounded down, with
    f from Beta(parameter, parameter); its center is uniform, and the box is clipped at the edges of the image.
    """
    fraction = jnp.sqrt(1 - jax.random.beta(jax.random.fold_in(key, 0), parameter, parameter))
    half = jnp.floor(side * fraction).astype(jnp.int32) // 2
    center = jax.random.randint(jax.random.fold_in(key, 1), (2,), 0, side)
    start, stop = jnp.maximum(center - half, 0), jnp.minimum(center + half, side)
    return 1 - window_mask(start, stop - start, side).astype(jnp.float32)


def smoothed_losses(
    logits: Float32[Array, 'b classes'], labels: Int32[Array, ' b'], smoothing: float
) -> Float32[Array, ' b']:
    """Returns the cross entropy of each image with (1 - smoothing) * onehot(label) + smoothing / classes.

    The source is section 7 of Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision".
    """
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)
