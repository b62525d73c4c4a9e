"""The layers of the paper's section 3 as pure functions on (B, H, W, C) arrays."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: str | tuple[tuple[int, int], tuple[int, int]] = 'SAME',
) -> jax.Array:
    """Convolution whose number of groups is told by the shapes: channels of `x` over input channels of `kernel`.

    Args:
      x: (B, H, W, groups * I).
      kernel: (height, width, I, O); the g-th group of outputs sees the g-th group of inputs alone.
      stride: pixels between windows, in both directions.
      padding: 'SAME', 'VALID' or pixels of zeros ((top, bottom), (left, right)).

    Returns:
      (B, H', W', O), in the dtype of the operands.

    Raises:
      ValueError: the channels of `x` are no multiple of I, or O no multiple of the groups.
    """
    channels, inputs, outputs = x.shape[-1], kernel.shape[2], kernel.shape[3]
    groups, rest = divmod(channels, inputs)
    if rest or outputs % groups:
        raise ValueError(f'{channels} channels do not fit a kernel of {inputs} inputs and {outputs} outputs')
    # One dense convolution a group: on a CPU four times as fast as feature_group_count, which the partitioner also
    # answers by gathering the batch on every device.
    parts = [
        lax.conv_general_dilated(
            part, part_kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        for part, part_kernel in zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    ]
    return jnp.concatenate(parts, -1)


def local_response_norm(x: jax.Array, *, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    """Response normalisation over `n` adjacent maps (section 3.3): x / (k + alpha * sum of squares) ** beta.

    The sum is not divided by `n`; the window is cut off at the first and the last map. Computed in float32.

    Args:
      x: (..., C), the maps of one tower.
      k, alpha, beta: constants of the formula.
      n: maps in a window, odd.

    Returns:
      Same shape and dtype as `x`.

    Raises:
      ValueError: `n` is even.
    """
    if n % 2 == 0:
        raise ValueError(f'n={n} is even: the window has no middle')
    return _response_norm(x.astype(jnp.float32), k, n, alpha, beta).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _response_norm(x: jax.Array, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    return x * _negative_power(k + alpha * _window_sum(x * x, n), beta)


def _response_norm_forward(x, k, n, alpha, beta):
    denominator = k + alpha * _window_sum(x * x, n)
    return x * _negative_power(denominator, beta), (x, denominator)


def _response_norm_backward(k, n, alpha, beta, saved, gradient):
    # Written out because the derived one keeps five arrays of the size of x and takes the roots apart again.
    x, denominator = saved
    scaled = gradient * _negative_power(denominator, beta)
    return (scaled - 2 * alpha * beta * x * _window_sum(scaled * x / denominator, n),)


_response_norm.defvjp(_response_norm_forward, _response_norm_backward)


def _window_sum(x: jax.Array, n: int) -> jax.Array:
    padding = [(0, 0)] * (x.ndim - 1) + [(n // 2, n // 2)]
    return lax.reduce_window(x, 0.0, lax.add, (1,) * (x.ndim - 1) + (n,), (1,) * x.ndim, padding)


def _negative_power(x: jax.Array, exponent: float) -> jax.Array:
    if exponent == 0.75:  # the paper's; two roots cost half of a power
        root = lax.rsqrt(x)
        return root * lax.sqrt(root)
    return x**-exponent


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Maximum over windows of `window` x `window` pixels, `stride` apart, without padding (section 3.4).

    Rows first, then columns, by elementwise maxima: on a CPU the gradient of a windowed reduction takes three times as
    long. Where values tie, the gradient is shared among them instead of going to the first.

    Args:
      x: (B, H, W, C).

    Returns:
      (B, (H - window) // stride + 1, (W - window) // stride + 1, C).
    """
    for axis in (1, 2):
        last = x.shape[axis] - window + 1
        pooled = lax.slice_in_dim(x, 0, last, stride, axis)
        for offset in range(1, window):
            pooled = jnp.maximum(pooled, lax.slice_in_dim(x, offset, last + offset, stride, axis))
        x = pooled
    return x
