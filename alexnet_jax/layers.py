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


def unshared_convolution(
    x: jax.Array, kernel: jax.Array, size: int, *, stride: int = 1, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """A convolution with kernels of its own at each pixel: the layer `local` of cuda-convnet.

    Args:
      x: (B, H, W, I).
      kernel: (H', W', I * size * size, O); of the weights of a window the input channel is the slowest dimension.
      size: pixels a side of the windows.

    Returns:
      (B, H', W', O).
    """
    return lax.conv_general_dilated_local(
        x, kernel, (stride, stride), padding, (size, size), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


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
    window = (1,) * (x.ndim - 1) + (n,)
    return _response_norm(x.astype(jnp.float32), k, window, alpha, beta).astype(x.dtype)


def spatial_response_norm(x: jax.Array, *, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    """As local_response_norm(), over the `n` x `n` pixels around each one of the same map: `rnorm` of cuda-convnet.

    The sum is not divided by the pixels of the window, which is cut off at the edges.

    Args:
      x: (B, H, W, C).

    Raises:
      ValueError: `n` is even.
    """
    if n % 2 == 0:
        raise ValueError(f'n={n} is even: the window has no middle')
    return _response_norm(x.astype(jnp.float32), k, (1, n, n, 1), alpha, beta).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _response_norm(x: jax.Array, k: float, window: tuple[int, ...], alpha: float, beta: float) -> jax.Array:
    return x * _negative_power(k + alpha * _window_sum(x * x, window), beta)


def _response_norm_forward(x, k, window, alpha, beta):
    denominator = k + alpha * _window_sum(x * x, window)
    return x * _negative_power(denominator, beta), (x, denominator)


def _response_norm_backward(k, window, alpha, beta, saved, gradient):
    # Written out because the derived one keeps five arrays of the size of x and takes the roots apart again.
    x, denominator = saved
    scaled = gradient * _negative_power(denominator, beta)
    return (scaled - 2 * alpha * beta * x * _window_sum(scaled * x / denominator, window),)


_response_norm.defvjp(_response_norm_forward, _response_norm_backward)


def _window_sum(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    padding = [(size // 2, size // 2) for size in window]
    return lax.reduce_window(x, 0.0, lax.add, window, (1,) * x.ndim, padding)


def _negative_power(x: jax.Array, exponent: float) -> jax.Array:
    if exponent == 0.75:  # the paper's; two roots cost half of a power
        root = lax.rsqrt(x)
        return root * lax.sqrt(root)
    return x**-exponent


def max_pool(x: jax.Array, window: int, stride: int, *, overhang: bool = False) -> jax.Array:
    """Maximum over windows of `window` x `window` pixels, `stride` apart, without padding (section 3.4).

    Rows first, then columns, by elementwise maxima: on a CPU the gradient of a windowed reduction takes three times as
    long. Where values tie, the gradient is shared among them instead of going to the first.

    Args:
      x: (B, H, W, C).
      overhang: whether a last window that reaches over the edge counts too, as in cuda-convnet.

    Returns:
      (B, (H - window) // stride + 1, (W - window) // stride + 1, C); with `overhang` the quotients are rounded up.
    """
    for axis in (1, 2):
        missing = (window - x.shape[axis]) % stride if overhang else 0
        if missing:
            lowest = jnp.array(-jnp.inf, x.dtype)
            x = lax.pad(x, lowest, [(0, missing if i == axis else 0, 0) for i in range(x.ndim)])
        last = x.shape[axis] - window + 1
        pooled = lax.slice_in_dim(x, 0, last, stride, axis)
        for offset in range(1, window):
            pooled = jnp.maximum(pooled, lax.slice_in_dim(x, offset, last + offset, stride, axis))
        x = pooled
    return x
