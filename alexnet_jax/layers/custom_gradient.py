"""Layers with custom gradients, which save memory and memory traffic, and do not round the gradients of dense kernels.

The values are those of reference.py; alexnet_jax.layers documents arguments and shapes.
"""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped


def compute_after(x: Float[Array, '*dims'], other: Float[Array, '...']) -> Float[Array, '*dims']:
    """Returns `x` with a data dependency on `other`, so that XLA computes the result after `other`.

    lax.optimization_barrier() does not suffice, because XLA for CPUs removes the barrier before it eliminates common
    subexpressions and plans memory. With the barrier, the gradient of LRN reuses arrays of the forward pass, and a step
    of `paper` with 128 images needs 979 MB instead of 831 MB (jaxlib 0.10.2 and 0.12.0.1). XLA does not simplify the
    condition below, which is always true; LLVM does, so that the condition costs no time.
    """
    first = other[(0,) * other.ndim]
    bits = lax.bitcast_convert_type(first, jnp.dtype(f'int{8 * first.dtype.itemsize}'))
    return jnp.where((bits | 1) != 0, x, jnp.zeros((), x.dtype))


def _window_sum(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    padding = [(size // 2, size // 2) for size in window]
    return lax.reduce_window(x, 0.0, lax.add, window, (1,) * x.ndim, padding)


def local_response_norm(
    x: Float[Array, '*dims c'],
    *,
    k: float,
    n: int,
    alpha: float,
    beta: float,
    window_sum: Callable[[jax.Array, tuple[int, ...]], jax.Array] = _window_sum,
) -> Float[Array, '*dims c']:
    """Normalizes over `n` adjacent feature maps.

    `window_sum`: a function of the array and the size of the windows in each dimension that returns the sum over the
    window around each element.
    """
    window = (1,) * (x.ndim - 1) + (n,)
    return _response_norm(x.astype(jnp.float32), k, window, alpha, beta, window_sum).astype(x.dtype)


def within_channel_lrn(
    x: Float[Array, 'b h w c'], *, k: float, n: int, alpha: float, beta: float
) -> Float[Array, 'b h w c']:
    """Normalizes over `n` x `n` pixels of one feature map."""
    return _response_norm(x.astype(jnp.float32), k, (1, n, n, 1), alpha, beta, _window_sum).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _response_norm(x, k, window, alpha, beta, window_sum):
    return x * _negative_power(k + alpha * window_sum(x * x, window), beta)


def _response_norm_forward(x, k, window, alpha, beta, window_sum):
    return _response_norm(x, k, window, alpha, beta, window_sum), x


def _response_norm_backward(k, window, alpha, beta, window_sum, x, gradient):
    # Automatic differentiation would save five arrays of the size of x and differentiate each root. The
    # window sums are recomputed, because saving them and their roots takes a third of a step's memory.
    x_recomputed = compute_after(x, gradient)
    denominator = k + alpha * window_sum(x_recomputed * x_recomputed, window)
    scaled = gradient * _negative_power(denominator, beta)
    return (scaled - 2 * alpha * beta * x * window_sum(scaled * x / denominator, window),)


_response_norm.defvjp(_response_norm_forward, _response_norm_backward)


def _negative_power(x: jax.Array, exponent: float) -> jax.Array:
    if exponent == 0.75:  # the paper's beta; two roots take half the time of a power
        return lax.rsqrt(x * lax.sqrt(x))
    return x**-exponent


def max_pool(
    x: Float[Array, 'b h w c'],
    window: int,
    stride: int,
    *,
    ceil_mode: bool,
    write: Callable[[Shaped[Array, '...']], Shaped[Array, '...']] = lambda x: x,
) -> Float[Array, 'b h2 w2 c']:
    """Computes the maximum over windows of `window` x `window` pixels.

    `write`: an identity function that the forward pass applies to its result and to the array saved for the gradient.
    """
    if ceil_mode:
        missing = [(window - size) % stride for size in x.shape[1:3]]
        x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), *((0, pixels, 0) for pixels in missing), (0, 0, 0)])
    return _max_pool(x, window, stride, write)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: jax.Array, window: int, stride: int, write: Callable[[jax.Array], jax.Array]) -> jax.Array:
    return reduce(jnp.maximum, _window_slices(x, window, stride))


def _window_slices(x: jax.Array, window: int, stride: int) -> list[jax.Array]:
    """Returns the pixels at each position in the window, in row-major order: one (B, H', W', C) array per position."""
    height, width = (size - window + 1 for size in x.shape[1:3])
    strides = (1, stride, stride, 1)
    return [
        lax.slice(x, (0, row, column, 0), (x.shape[0], row + height, column + width, x.shape[3]), strides)
        for row in range(window)
        for column in range(window)
    ]


def _max_pool_forward(x, window, stride, write):
    # Automatic differentiation uses select-and-scatter, which saves x and is one instruction only on TPUs.
    largest, *pixels = _window_slices(x, window, stride)
    where = jnp.zeros(largest.shape, jnp.int8)  # the row-major position of the maximum in each window
    for number, pixel in enumerate(pixels, 1):
        where = jnp.where(pixel > largest, jnp.int8(number), where)
        largest = jnp.maximum(largest, pixel)
    return write(largest), (write(where), x.shape[1:3])


def _max_pool_backward(window, stride, write, saved, gradient):
    where, size = saved
    rows, columns = (jnp.arange(pixels) for pixels in size)
    total = jnp.zeros((), gradient.dtype)
    # A pixel is in the last window that starts at or before the pixel, and in earlier windows that extend to it.
    for up in range(-(-window // stride)):
        for left in range(-(-window // stride)):
            # The pixel's position in the window.
            row, column = rows % stride + up * stride, columns % stride + left * stride
            number = jnp.where(column[None] < window, row[:, None] * window + column[None], -2).astype(jnp.int8)
            here = _expand_to_input(where, size, stride, up, left) == number[None, :, :, None]
            total = total + jnp.where(here, _expand_to_input(gradient, size, stride, up, left), 0)
    return (total,)


def _expand_to_input(x: jax.Array, size: tuple[int, int], stride: int, up: int, left: int) -> jax.Array:
    """Expands one value per window, `x` (B, H', W', C), to one value per pixel, (B, *size, C).

    Pixel (i, j) gets the value of window (i // stride - up, j // stride - left), or -1 where that window is missing.
    """
    counts = [-(-pixels // stride) for pixels in size]
    padding = [(0, 0, 0), (up, counts[0] - x.shape[1] - up, 0), (left, counts[1] - x.shape[2] - left, 0), (0, 0, 0)]
    x = lax.pad(x, jnp.array(-1, x.dtype), padding)[:, :, None, :, None]
    x = jnp.broadcast_to(x, (x.shape[0], counts[0], stride, counts[1], stride, x.shape[-1]))
    x = x.reshape(x.shape[0], counts[0] * stride, counts[1] * stride, x.shape[-1])
    return x[:, : size[0], : size[1]]


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def dense(x: Float[Array, 'b i'], kernel: Float[Array, 'i o']) -> Float[Array, 'b o']:
    """Computes `x` @ `kernel`; the product that is the gradient of a float32 `kernel` returns float32."""
    return x @ kernel if x.dtype == kernel.dtype else _product_of_dtypes(x, kernel)


@jax.custom_vjp
def _product_of_dtypes(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


def _product_forward(x, kernel):
    rounded = kernel.astype(x.dtype)
    return x @ rounded, (x, rounded)


def _product_backward(saved, gradient):
    x, rounded = saved
    return gradient @ rounded.T, lax.dot(x.T, gradient, preferred_element_type=jnp.float32)


_product_of_dtypes.defvjp(_product_forward, _product_backward)
