"""An implementation that XLA for GPUs fuses well; the values are those of reference.py."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.layers import custom_gradient


def _sum_of_slices(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """Sums over windows of the last dimension. XLA of jax 0.12 writes each lax.reduce_window to memory."""
    size = window[-1]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 1) + [(size // 2, size // 2, 0)])
    return reduce(jnp.add, (padded[..., start : start + x.shape[-1]] for start in range(size)))


local_response_norm = partial(custom_gradient.local_response_norm, window_sum=_sum_of_slices)
