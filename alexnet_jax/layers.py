"""The layers of the paper's section 3 as pure functions on (B, H, W, C) arrays."""

import math
from functools import partial, reduce

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
    """Computes a 2-D convolution; the number of groups is the channels of `x` divided by the inputs I of `kernel`.

    Args:
      x: (B, H, W, groups * I).
      kernel: (height, width, I, O); the g-th group of output channels reads only the g-th group of input channels.
      stride: pixels between windows, in both directions.
      padding: 'SAME', 'VALID', or the zero padding in pixels ((top, bottom), (left, right)).

    Returns:
      (B, H', W', O), in the dtype of the operands.

    Raises:
      ValueError: the channels of `x` are not a multiple of I, or O is not a multiple of the number of groups.
    """
    channels, inputs, outputs = x.shape[-1], kernel.shape[2], kernel.shape[3]
    groups, rest = divmod(channels, inputs)
    if rest or outputs % groups:
        raise ValueError(f'{channels} channels do not fit a kernel of {inputs} inputs and {outputs} outputs')
    if isinstance(padding, str):
        top_and_bottom, left_and_right = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), padding)
        padding = top_and_bottom, left_and_right
    # One dense convolution per group is four times as fast on a CPU as feature_group_count, for which the SPMD
    # partitioner would also all-gather the batch.
    pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([_convolve(part, part_kernel, stride, padding) for part, part_kernel in pairs], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    if stride > 1:
        x, kernel = _space_to_depth_rows(x, kernel, stride, padding)
        return _dense(x, kernel, (1, stride), ((0, 0), (0, 0)))
    return _dense(x, kernel, (1, 1), padding)


def _convolve_forward(x, kernel, stride, padding):
    # Otherwise the weight gradient recomputes x, in an order that takes four times as long.
    x = materialize(x)
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(stride, padding, saved, gradient):
    # Differentiates the convolution without space-to-depth, which would copy more and not speed up the weight gradient.
    x, kernel = saved
    (to_x,) = jax.vjp(lambda x: _dense(x, kernel, (stride, stride), padding), x)[1](gradient)

    def by_kernel(x, gradient):
        return jax.vjp(lambda kernel: _dense(x, kernel, (stride, stride), padding), kernel)[1](gradient)[0]

    def in_parts(x, gradient):
        # For a stride above 1, 16 weight gradients of 8 images each take a CPU 0.7 of the time of one of 128 images.
        parts = math.gcd(x.shape[0], 128) // 8
        if parts < 4:
            return by_kernel(x, gradient)
        sums = map(by_kernel, jnp.split(x, parts), jnp.split(gradient, parts))
        return sum(part.astype(jnp.float32) for part in sums).astype(kernel.dtype)

    if stride == 1:
        return to_x, by_kernel(x, gradient)
    return to_x, lax.platform_dependent(x, gradient, cpu=in_parts, default=by_kernel)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _dense(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _space_to_depth_rows(x, kernel, stride, padding):
    """Pads `x` and moves each group of `stride` rows into the channels; reshapes `kernel` to match, for row stride 1.

    The convolution library for CPUs copies all windows before it multiplies them, and copies longer contiguous runs
    faster: 132 numbers instead of 33, a row of a window, in conv1.
    """
    (batch, *sizes, channels), (rows, columns, inputs, outputs) = x.shape, kernel.shape
    pads = []
    for size, (before, after), window in zip(sizes, padding, (rows, columns), strict=True):
        steps = (size + before + after - window) // stride
        pads.append((before, (steps - (-window // stride)) * stride - size - before, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    if jax.__version_info__ < (0, 11):
        x = x.reshape(batch, -1, stride, x.shape[2], channels).swapaxes(2, 3)
        x = x.reshape(*x.shape[:3], stride * channels)
    else:
        # Since jaxlib 0.11 the transpose takes a CPU four times as long as before; this sum takes only twice as long.
        zero = jnp.zeros((), x.dtype)
        pads = [(i * channels, (stride - 1 - i) * channels, 0) for i in range(stride)]
        x = reduce(jnp.add, (lax.pad(x[:, i::stride], zero, [(0, 0, 0)] * 3 + [pad]) for i, pad in enumerate(pads)))
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [(0, -rows % stride, 0), *[(0, 0, 0)] * 3])
    kernel = kernel.reshape(-1, stride, columns, inputs, outputs).swapaxes(1, 2)
    return x, kernel.reshape(-1, columns, stride * inputs, outputs)


def locally_connected(
    x: jax.Array, kernel: jax.Array, size: int, *, stride: int = 1, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """Computes a convolution with unshared weights, one kernel per output pixel: the layer `local` of cuda-convnet.

    Args:
      x: (B, H, W, I).
      kernel: (H', W', I * size * size, O); the input channel is the slowest-varying index of a window's weights.
      size: height and width of the windows in pixels.

    Returns:
      (B, H', W', O).
    """
    return lax.conv_general_dilated_local(
        x, kernel, (stride, stride), padding, (size, size), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def local_response_norm(x: jax.Array, *, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    """Normalizes over `n` adjacent feature maps (section 3.3): x / (k + alpha * sum of squares) ** beta.

    The sum is not divided by `n`; the window is truncated at the first and the last map. Computes in float32.

    Args:
      x: (..., C), the feature maps of one tower.
      k, alpha, beta: constants of the formula.
      n: feature maps in a window, odd.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: `n` is even.
    """
    if n % 2 == 0:
        raise ValueError(f'n={n} is even: the window has no middle')
    window = (1,) * (x.ndim - 1) + (n,)
    return _response_norm(x.astype(jnp.float32), k, window, alpha, beta).astype(x.dtype)


def within_channel_lrn(x: jax.Array, *, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    """Normalizes like local_response_norm(), but over `n` x `n` pixels of one feature map: cuda-convnet's `rnorm`.

    The sum is not divided by the number of pixels in the window, which is truncated at the edges.

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
    return _response_norm(x, k, window, alpha, beta), x


def _response_norm_backward(k, window, alpha, beta, x, gradient):
    # Automatic differentiation would save five arrays of the size of x and differentiate the roots one by one. The
    # window sums are recomputed, because saving them and their roots takes a third of a step's memory. Without the
    # term 0 * gradient, which XLA cannot fold as it may be NaN, XLA would reuse the sums of the forward pass.
    late = x + 0 * gradient[(0,) * x.ndim]
    denominator = k + alpha * _window_sum(late * late, window)
    scaled = gradient * _negative_power(denominator, beta)
    return (scaled - 2 * alpha * beta * x * _window_sum(scaled * x / denominator, window),)


_response_norm.defvjp(_response_norm_forward, _response_norm_backward)


def _window_sum(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    padding = [(size // 2, size // 2) for size in window]
    return lax.reduce_window(x, 0.0, lax.add, window, (1,) * x.ndim, padding)


def _negative_power(x: jax.Array, exponent: float) -> jax.Array:
    if exponent == 0.75:  # the paper's beta; two roots take half the time of a power
        return lax.rsqrt(x * lax.sqrt(x))
    return x**-exponent


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds `bias`, of shape (C,) or of the shape of one example, to `x` (..., C); both have the same dtype."""
    if bias.ndim == 1:
        return _add_bias_of_maps(x, bias)
    return x + bias[None]


@jax.custom_vjp
def _add_bias_of_maps(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _add_bias_backward(_, gradient):
    # A matrix product with ones sums over all pixels in a quarter of the time that a reduction takes a CPU.
    rows = gradient.reshape(-1, gradient.shape[-1])
    ones = jnp.ones((1, rows.shape[0]), rows.dtype)
    return gradient, lax.dot(ones, rows, precision=lax.Precision.HIGHEST)[0]


_add_bias_of_maps.defvjp(lambda x, bias: (_add_bias_of_maps(x, bias), None), _add_bias_backward)


def materialize(x: jax.Array) -> jax.Array:
    """Identity that makes XLA write `x` to memory. Otherwise XLA for CPUs recomputes `x` in each loop that reads it.

    Implemented as a maximum over windows of one value and one padding value, which no XLA pass simplifies. XLA for
    CPUs removes lax.optimization_barrier() before it fuses loops.
    """
    window, padding = (2,) + (1,) * x.ndim, ((0, 1),) + ((0, 0),) * x.ndim
    lowest = jnp.array(-jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min, x.dtype)
    return lax.reduce_window(x[None], lowest, lax.max, window, (1,) * (x.ndim + 1), padding)[0]


@jax.custom_vjp
def order_weight_gradient_after_input_gradient(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Identity whose backward pass makes dW depend on dx.

    Otherwise XLA may update the kernel before dx has read it, and then copies the kernel every step.
    """
    return x, kernel


def _read_before_update_backward(_, gradients):
    to_x, to_kernel = gradients
    # XLA cannot remove the dependency: 0 * to_x is NaN where to_x is NaN or infinite.
    return to_x, to_kernel + 0 * to_x[(0,) * to_x.ndim].astype(to_kernel.dtype)


order_weight_gradient_after_input_gradient.defvjp(lambda x, kernel: ((x, kernel), None), _read_before_update_backward)


def max_pool(x: jax.Array, window: int, stride: int, *, ceil_mode: bool = False) -> jax.Array:
    """Computes the maximum over windows of `window` x `window` pixels, `stride` apart, without padding (section 3.4).

    The gradient of a window goes to its maximum; among equal values, to the first in row-major order.

    Args:
      x: (B, H, W, C), floating point.
      ceil_mode: whether to add a last window that extends beyond the edge, as in cuda-convnet.

    Returns:
      (B, (H - window) // stride + 1, (W - window) // stride + 1, C); `ceil_mode` rounds the quotients up instead.
    """
    if ceil_mode:
        missing = [(window - size) % stride for size in x.shape[1:3]]
        x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), *((0, pixels, 0) for pixels in missing), (0, 0, 0)])
    return _max_pool(x, window, stride)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    return reduce(jnp.maximum, _window_slices(x, window, stride))


def _window_slices(x: jax.Array, window: int, stride: int) -> list[jax.Array]:
    """Returns one (B, H', W', C) array per position in the window, in row-major order: that pixel of every window."""
    height, width = (size - window + 1 for size in x.shape[1:3])
    strides = (1, stride, stride, 1)
    return [
        lax.slice(x, (0, row, column, 0), (x.shape[0], row + height, column + width, x.shape[3]), strides)
        for row in range(window)
        for column in range(window)
    ]


def _max_pool_forward(x, window, stride):
    largest, *pixels = _window_slices(x, window, stride)
    where = jnp.zeros(largest.shape, jnp.int8)  # the row-major position of the maximum in each window
    for number, pixel in enumerate(pixels, 1):
        where = jnp.where(pixel > largest, jnp.int8(number), where)
        largest = jnp.maximum(largest, pixel)
    return materialize(largest), (materialize(where), x.shape[1:3])


def _max_pool_backward(window, stride, saved, gradient):
    where, size = saved
    rows, columns = (jnp.arange(pixels) for pixels in size)
    total = jnp.zeros((), gradient.dtype)
    # A pixel lies in the last window that starts at or before the pixel, and in earlier windows that extend to it.
    for up in range(-(-window // stride)):
        for left in range(-(-window // stride)):
            # The pixel's position in the window.
            row, column = rows % stride + up * stride, columns % stride + left * stride
            number = jnp.where(column[None] < window, row[:, None] * window + column[None], -2).astype(jnp.int8)
            here = _expand_to_input(where, size, stride, up, left) == number[None, :, :, None]
            total = total + jnp.where(here, _expand_to_input(gradient, size, stride, up, left), 0)
    return (total,)


def _expand_to_input(x: jax.Array, size: tuple[int, int], stride: int, up: int, left: int) -> jax.Array:
    """Expands values per window `x` (B, H', W', C) to values per pixel (B, *size, C).

    Pixel (i, j) gets the value of window (i // stride - up, j // stride - left), or -1 where that window is missing.
    """
    counts = [-(-pixels // stride) for pixels in size]
    padding = [(0, 0, 0), (up, counts[0] - x.shape[1] - up, 0), (left, counts[1] - x.shape[2] - left, 0), (0, 0, 0)]
    x = lax.pad(x, jnp.array(-1, x.dtype), padding)[:, :, None, :, None]
    x = jnp.broadcast_to(x, (x.shape[0], counts[0], stride, counts[1], stride, x.shape[-1]))
    x = x.reshape(x.shape[0], counts[0] * stride, counts[1] * stride, x.shape[-1])
    return x[:, : size[0], : size[1]]


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
