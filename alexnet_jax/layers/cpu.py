"""Implementations that XLA for CPUs schedules well; the values are those of reference.py.

The docstrings and comments say what XLA does otherwise; their times are wall-clock times of the operation alone. The
table lists how much more CPU time and memory a train step of `paper` needs without one of the optimizations. The step
has 128 images, float32, jaxlib 0.12.0.1 and two cores, and uses 831 MB. CPU times do not count idle cores; they are the
minimum of two steps on a shared machine.
  materialize() in convolution                 1 %
  materialize() in max_pool                    3 %
  _space_to_depth_rows()                       0 %
  chunks in _weight_gradient()                 -1 %, -6 MB
  matrix product in add_bias()                 1 %, -48 MB
  order of the gradients in dense()            0 %, 36 MB
In custom_gradient.py:
  max_pool                                     27 %, 1119 MB
  local_response_norm                          18 %, 441 MB
  compute_after() in local_response_norm       -1 %, 391 MB
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from alexnet_jax.layers import custom_gradient
from alexnet_jax.layers.custom_gradient import compute_after
from alexnet_jax.layers.reference import NHWC, Padding


def convolution(
    x: Float[Array, 'b h w c'], kernel: Float[Array, 'kh kw i o'], *, stride: int, padding: str | Padding
) -> Float[Array, 'b h2 w2 o']:
    """Computes one dense convolution per group; in XLA for CPUs, a grouped convolution takes four times as long."""
    groups = x.shape[-1] // kernel.shape[2]
    if isinstance(padding, str):
        top_and_bottom, left_and_right = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), padding)
        padding = top_and_bottom, left_and_right
    pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([_convolve(part, part_kernel, stride, padding) for part, part_kernel in pairs], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    if stride > 1:
        x, kernel = _space_to_depth_rows(x, kernel, stride, padding)
        return _dense(x, kernel, (1, stride), ((0, 0), (0, 0)))
    return _dense(x, kernel, (1, 1), padding)


def _convolve_forward(x, kernel, stride, padding):
    # Without materialize(), the weight gradient recomputes x, in an order that takes four times as long.
    x = materialize(x)
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(stride, padding, saved, gradient):
    # These are the gradients without space-to-depth, which would copy more and not speed up the weight gradient.
    x, kernel = saved
    (dx,) = jax.vjp(lambda x: _dense(x, kernel, (stride, stride), padding), x)[1](gradient)
    return dx, _weight_gradient(x, kernel, stride, padding, gradient)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _dense(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def _weight_gradient(x, kernel, stride, padding, gradient):
    """Returns the gradient of `kernel`; for strides above 1, as a float32 sum over up to 16 chunks of the batch.

    XLA's convolution library for CPUs computes 16 weight gradients of 8 images in 0.7 times the time of one of 128.
    """

    def dw(x, gradient):
        return jax.vjp(lambda kernel: _dense(x, kernel, (stride, stride), padding), kernel)[1](gradient)[0]

    chunks = math.gcd(x.shape[0], 128) // 8
    if stride == 1 or chunks < 4:
        return dw(x, gradient)
    sums = map(dw, jnp.split(x, chunks), jnp.split(gradient, chunks))
    return sum(part.astype(jnp.float32) for part in sums).astype(kernel.dtype)


def _space_to_depth_rows(x, kernel, stride, padding):
    """Pads `x` and moves each group of `stride` rows into the channels; reshapes `kernel` to match a row stride of 1.

    XLA's convolution library for CPUs copies all windows before it multiplies them, and longer contiguous runs are
    faster to copy. In conv1, a run is a row of a window: 132 numbers instead of 33.
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


def add_bias(x: Float[Array, '*dims c'], bias: Float[Array, '*pixels c']) -> Float[Array, '*dims c']:
    """Adds `bias`; the gradient of a bias of shape (C,) is a matrix product with ones.

    The product sums over all pixels in float32, in a quarter of the time of XLA's reduction.
    """
    return _add_bias_of_maps(x, bias) if bias.ndim == 1 else x + bias[None]


@jax.custom_vjp
def _add_bias_of_maps(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _add_bias_backward(_, gradient):
    rows = gradient.reshape(-1, gradient.shape[-1])
    ones = jnp.ones((1, rows.shape[0]), rows.dtype)
    return gradient, lax.dot(ones, rows, precision=lax.Precision.HIGHEST)[0]


_add_bias_of_maps.defvjp(lambda x, bias: (_add_bias_of_maps(x, bias), None), _add_bias_backward)


def materialize(x: Shaped[Array, '*dims']) -> Shaped[Array, '*dims']:
    """Returns `x`, which XLA must write to memory; otherwise XLA for CPUs recomputes `x` in each loop that reads it.

    The function computes a maximum over windows of one value and one padding value, which no XLA pass simplifies.
    lax.optimization_barrier() does not suffice, because XLA for CPUs removes the barrier before it fuses loops.
    """
    window, padding = (2,) + (1,) * x.ndim, ((0, 1),) + ((0, 0),) * x.ndim
    lowest = jnp.array(-jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min, x.dtype)
    return lax.reduce_window(x[None], lowest, lax.max, window, (1,) * (x.ndim + 1), padding)[0]


max_pool = partial(custom_gradient.max_pool, write=materialize)


def dense(x: Float[Array, 'b i'], kernel: Float[Array, 'i o']) -> Float[Array, 'b o']:
    """Computes `x` @ `kernel`; the backward pass computes the gradient of `kernel` after the gradient of `x`.

    Otherwise XLA may update `kernel` before the gradient of `x` has read it, and then copies `kernel` every step.
    """
    return custom_gradient.dense(*_order_weight_gradient_after_input_gradient(x, kernel))


@jax.custom_vjp
def _order_weight_gradient_after_input_gradient(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, kernel


def _keep_whether_x_has_a_gradient(x, kernel):
    return (x.value, kernel.value), () if x.perturbed else None


def _order_gradients(saved, gradients):
    dx, dw = gradients
    if saved is None:  # all layers before this one are frozen; the data dependency would make XLA compute dx
        return dx, dw
    return dx, compute_after(dw, dx)


_order_weight_gradient_after_input_gradient.defvjp(
    _keep_whether_x_has_a_gradient, _order_gradients, symbolic_zeros=True
)
