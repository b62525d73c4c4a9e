"""The definitions of the operations in plain JAX. alexnet_jax.layers documents arguments and shapes."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

NHWC = ('NHWC', 'HWIO', 'NHWC')

Padding = tuple[tuple[int, int], tuple[int, int]]  # pixels ((top, bottom), (left, right))


def convolution(
    x: Float[Array, 'b h w c'], kernel: Float[Array, 'kh kw i o'], *, stride: int, padding: str | Padding
) -> Float[Array, 'b h2 w2 o']:
    """Computes a 2-D convolution; `x` has as many channels per group as `kernel` has inputs."""
    groups = x.shape[-1] // kernel.shape[2]
    strides = (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC, feature_group_count=groups)


def locally_connected(
    x: Float[Array, 'b h w i'], kernel: Float[Array, 'h2 w2 weights o'], size: int, *, stride: int, padding: Padding
) -> Float[Array, 'b h2 w2 o']:
    """Computes a convolution with one kernel per output pixel."""
    return lax.conv_general_dilated_local(x, kernel, (stride, stride), padding, (size, size), dimension_numbers=NHWC)


def add_bias(x: Float[Array, '*dims c'], bias: Float[Array, '*pixels c']) -> Float[Array, '*dims c']:
    """Adds `bias` in float32, so that the gradient of a bfloat16 bias is summed in float32."""
    bias = bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def local_response_norm(
    x: Float[Array, '*dims c'], *, k: float, n: int, alpha: float, beta: float
) -> Float[Array, '*dims c']:
    """Normalizes over `n` adjacent feature maps."""
    return _response_norm(x, (1,) * (x.ndim - 1) + (n,), k, alpha, beta)


def within_channel_lrn(
    x: Float[Array, 'b h w c'], *, k: float, n: int, alpha: float, beta: float
) -> Float[Array, 'b h w c']:
    """Normalizes over `n` x `n` pixels of one feature map."""
    return _response_norm(x, (1, n, n, 1), k, alpha, beta)


def _response_norm(x: jax.Array, window: tuple[int, ...], k: float, alpha: float, beta: float) -> jax.Array:
    y = x.astype(jnp.float32)
    sums = lax.reduce_window(y * y, 0.0, lax.add, window, (1,) * x.ndim, 'SAME')
    return (y / (k + alpha * sums) ** beta).astype(x.dtype)


def max_pool(x: Float[Array, 'b h w c'], window: int, stride: int, *, ceil_mode: bool) -> Float[Array, 'b h2 w2 c']:
    """Computes the maximum over windows of `window` x `window` pixels."""
    beyond = [(0, (window - size) % stride if ceil_mode else 0) for size in x.shape[1:3]]
    sizes, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, strides, ((0, 0), *beyond, (0, 0)))


def dense(x: Float[Array, 'b i'], kernel: Float[Array, 'i o']) -> Float[Array, 'b o']:
    """Computes `x` @ `kernel`."""
    return x @ kernel.astype(x.dtype)
