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
    if isinstance(padding, str):
        top_and_bottom, left_and_right = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), padding)
        padding = top_and_bottom, left_and_right
    # One dense convolution a group: on a CPU four times as fast as feature_group_count, which the partitioner also
    # answers by gathering the batch on every device.
    pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([_convolve(part, part_kernel, stride, padding) for part, part_kernel in pairs], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    if stride > 1:
        x, kernel = _space_to_depth_rows(x, kernel, stride, padding)
        return _dense(x, kernel, (1, stride), ((0, 0), (0, 0)))
    return _dense(x, kernel, (1, 1), padding)


def _convolve_forward(x, kernel, stride, padding):
    x = materialize(
        x
    )  # otherwise the gradient by the kernel works it out again, in an order that takes four times as long
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(stride, padding, saved, gradient):
    # Of the image as it is: with rows as channels the gradient by the kernel gains nothing, and more is copied.
    x, kernel = saved
    (to_x,) = jax.vjp(lambda x: _dense(x, kernel, (stride, stride), padding), x)[1](gradient)

    def by_kernel(x, gradient):
        return jax.vjp(lambda kernel: _dense(x, kernel, (stride, stride), padding), kernel)[1](gradient)[0]

    def in_parts(x, gradient):
        # Where windows are a stride apart a CPU takes 0.7 of the time for 8 images at once, 16 times.
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
    """`x`, padded, with the channels of `stride` rows side by side, and the kernel that moves over it row by row.

    A CPU's library copies all windows before it multiplies, which takes it less time in longer pieces: of conv1 132
    numbers, where a row of a window has 33.
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
        # From jaxlib 0.11 on, the transpose takes a CPU four times as long as before, and this sum twice as long.
        zero = jnp.zeros((), x.dtype)
        pads = [(i * channels, (stride - 1 - i) * channels, 0) for i in range(stride)]
        x = reduce(jnp.add, (lax.pad(x[:, i::stride], zero, [(0, 0, 0)] * 3 + [pad]) for i, pad in enumerate(pads)))
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [(0, -rows % stride, 0), *[(0, 0, 0)] * 3])
    kernel = kernel.reshape(-1, stride, columns, inputs, outputs).swapaxes(1, 2)
    return x, kernel.reshape(-1, columns, stride * inputs, outputs)


def locally_connected(
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


def within_channel_lrn(x: jax.Array, *, k: float, n: int, alpha: float, beta: float) -> jax.Array:
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
    return _response_norm(x, k, window, alpha, beta), x


def _response_norm_backward(k, window, alpha, beta, x, gradient):
    # Written out because the derived one keeps five arrays of the size of x, and takes the roots apart again. The sums
    # are taken anew: kept, they and their roots are a third of a step's memory. The compiler would do so, and find them
    # again in the forward pass, but for the 0, which might not be a number.
    late = x + 0 * gradient[(0,) * x.ndim]
    denominator = k + alpha * _window_sum(late * late, window)
    scaled = gradient * _negative_power(denominator, beta)
    return (scaled - 2 * alpha * beta * x * _window_sum(scaled * x / denominator, window),)


_response_norm.defvjp(_response_norm_forward, _response_norm_backward)


def _window_sum(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    padding = [(size // 2, size // 2) for size in window]
    return lax.reduce_window(x, 0.0, lax.add, window, (1,) * x.ndim, padding)


def _negative_power(x: jax.Array, exponent: float) -> jax.Array:
    if exponent == 0.75:  # the paper's; two roots cost half of a power
        return lax.rsqrt(x * lax.sqrt(x))
    return x**-exponent


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x` (..., C) plus `bias` (C,) or of the shape of an example of `x`, in the dtype of `x`."""
    if bias.ndim == 1:
        return _add_bias_of_maps(x, bias)
    return x + bias[None]


@jax.custom_vjp
def _add_bias_of_maps(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _add_bias_backward(_, gradient):
    # As a product with ones the sum over all pixels takes a CPU a quarter of the time of a reduction.
    rows = gradient.reshape(-1, gradient.shape[-1])
    ones = jnp.ones((1, rows.shape[0]), rows.dtype)
    return gradient, lax.dot(ones, rows, precision=lax.Precision.HIGHEST)[0]


_add_bias_of_maps.defvjp(lambda x, bias: (_add_bias_of_maps(x, bias), None), _add_bias_backward)


def materialize(x: jax.Array) -> jax.Array:
    """`x`, written to memory: otherwise a CPU's compiler works it out again in each loop that reads it.

    A maximum over windows of one value and one of padding, which none of the compiler's passes looks through; that for
    CPUs drops lax.optimization_barrier() before it joins loops.
    """
    window, padding = (2,) + (1,) * x.ndim, ((0, 1),) + ((0, 0),) * x.ndim
    lowest = jnp.array(-jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min, x.dtype)
    return lax.reduce_window(x[None], lowest, lax.max, window, (1,) * (x.ndim + 1), padding)[0]


@jax.custom_vjp
def order_weight_gradient_after_input_gradient(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` and `kernel` as they are, for a product of them whose gradient by the kernel waits for that by `x`.

    The latter reads the kernel: where it may come after the update, XLA copies the kernel first, in every step.
    """
    return x, kernel


def _read_before_update_backward(_, gradients):
    to_x, to_kernel = gradients
    # What it waits for is 0, but no compiler may say so, for it might not be a number.
    return to_x, to_kernel + 0 * to_x[(0,) * to_x.ndim].astype(to_kernel.dtype)


order_weight_gradient_after_input_gradient.defvjp(lambda x, kernel: ((x, kernel), None), _read_before_update_backward)


def max_pool(x: jax.Array, window: int, stride: int, *, overhang: bool = False) -> jax.Array:
    """Maximum over windows of `window` x `window` pixels, `stride` apart, without padding (section 3.4).

    The gradient of a window goes to its maximum, of equal ones to the first, row by row.

    Args:
      x: (B, H, W, C).
      overhang: whether a last window that reaches over the edge counts too, as in cuda-convnet.

    Returns:
      (B, (H - window) // stride + 1, (W - window) // stride + 1, C); with `overhang` the quotients are rounded up.
    """
    if overhang:
        missing = [(window - size) % stride for size in x.shape[1:3]]
        x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), *((0, pixels, 0) for pixels in missing), (0, 0, 0)])
    return _max_pool(x, window, stride)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    return reduce(jnp.maximum, _window_slices(x, window, stride))


def _window_slices(x: jax.Array, window: int, stride: int) -> list[jax.Array]:
    """The first pixels of all windows, the second ones, and so on, row by row: each (B, H', W', C)."""
    height, width = (size - window + 1 for size in x.shape[1:3])
    strides = (1, stride, stride, 1)
    return [
        lax.slice(x, (0, row, column, 0), (x.shape[0], row + height, column + width, x.shape[3]), strides)
        for row in range(window)
        for column in range(window)
    ]


def _max_pool_forward(x, window, stride):
    largest, *pixels = _window_slices(x, window, stride)
    where = jnp.zeros(largest.shape, jnp.int8)  # in each window, the number of its maximum
    for number, pixel in enumerate(pixels, 1):
        where = jnp.where(pixel > largest, jnp.int8(number), where)
        largest = jnp.maximum(largest, pixel)
    return materialize(largest), (materialize(where), x.shape[1:3])


def _max_pool_backward(window, stride, saved, gradient):
    where, size = saved
    rows, columns = (jnp.arange(pixels) for pixels in size)
    total = jnp.zeros((), gradient.dtype)
    # A pixel lies in the window that begins at or next before it, and in those before while they reach so far.
    for up in range(-(-window // stride)):
        for left in range(-(-window // stride)):
            row, column = rows % stride + up * stride, columns % stride + left * stride  # of the pixel in the window
            number = jnp.where(column[None] < window, row[:, None] * window + column[None], -2).astype(jnp.int8)
            here = _expand_to_input(where, size, stride, up, left) == number[None, :, :, None]
            total = total + jnp.where(here, _expand_to_input(gradient, size, stride, up, left), 0)
    return (total,)


def _expand_to_input(x: jax.Array, size: tuple[int, int], stride: int, up: int, left: int) -> jax.Array:
    """For each of `size` pixels the value of the window that begins at it or next before, less `up` and `left`."""
    counts = [-(-pixels // stride) for pixels in size]
    padding = [(0, 0, 0), (up, counts[0] - x.shape[1] - up, 0), (left, counts[1] - x.shape[2] - left, 0), (0, 0, 0)]
    x = lax.pad(x, jnp.array(-1, x.dtype), padding)[:, :, None, :, None]
    x = jnp.broadcast_to(x, (x.shape[0], counts[0], stride, counts[1], stride, x.shape[-1]))
    x = x.reshape(x.shape[0], counts[0] * stride, counts[1] * stride, x.shape[-1])
    return x[:, : size[0], : size[1]]


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
