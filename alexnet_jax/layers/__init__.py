"""The layers of the paper's section 3 as pure functions on (B, H, W, C) arrays.

An operation has up to three implementations, whose results differ only in rounding errors. The argument
`implementation` names one:
  'reference'        the definition, differentiated by JAX: reference.py
  'custom_gradient'  a written-out gradient that saves memory traffic: custom_gradient.py
  'cpu'              what XLA for CPUs schedules well: cpu.py
  'auto'             the one in PLATFORMS for jax.default_backend() at the time of tracing.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from alexnet_jax.layers import cpu, custom_gradient, reference
from alexnet_jax.layers.cpu import materialize
from alexnet_jax.layers.reference import Padding

__all__ = [
    'add_bias',
    'convolution',
    'local_response_norm',
    'locally_connected',
    'materialize',
    'max_pool',
    'order_weight_gradient_after_input_gradient',
    'within_channel_lrn',
]

MODULES = {'reference': reference, 'custom_gradient': custom_gradient, 'cpu': cpu}

# The implementation that each platform takes, 'gpu' for CUDA and ROCm; other platforms take the reference. The choice
# for CPUs is measured: see cpu.py. Those for GPUs and TPUs are not measured here. They follow from the bytes that the
# train step accesses when compiled for an H100 and for a TPU v5e (jaxlib 0.10.2). On the H100 the references of
# max_pool and local_response_norm access 41 % and 3 % more, the `cpu` implementations of the other operations 2 % more
# than the references. On the TPU, which has an instruction for the gradient of max_pool, everything but the references
# accesses 1.6 times as many bytes.
# fmt: off
PLATFORMS = {
    'convolution':         {'cpu': 'cpu',             'gpu': 'reference',       'tpu': 'reference'},
    'add_bias':            {'cpu': 'cpu',             'gpu': 'reference',       'tpu': 'reference'},
    'local_response_norm': {'cpu': 'custom_gradient', 'gpu': 'custom_gradient', 'tpu': 'reference'},
    'within_channel_lrn':  {'cpu': 'custom_gradient', 'gpu': 'custom_gradient', 'tpu': 'reference'},
    'max_pool':            {'cpu': 'cpu',             'gpu': 'custom_gradient', 'tpu': 'reference'},
    'order_weight_gradient_after_input_gradient': {'cpu': 'cpu', 'gpu': 'reference', 'tpu': 'reference'},
    'locally_connected':   {'cpu': 'reference',       'gpu': 'reference',       'tpu': 'reference'},
}
# fmt: on


def _function(operation: str, implementation: str) -> Callable[..., Any]:
    """Returns the function `operation` of the module that `implementation` names."""
    if implementation == 'auto':
        implementation = PLATFORMS[operation].get(jax.default_backend(), 'reference')
    names = [name for name, module in MODULES.items() if hasattr(module, operation)]
    if implementation not in names:
        raise ValueError(f'implementation={implementation!r}: {operation} has {", ".join(names)}')
    return getattr(MODULES[implementation], operation)


def convolution(
    x: Float[Array, 'b h w c'],
    kernel: Float[Array, 'kh kw i o'],
    *,
    stride: int = 1,
    padding: str | Padding = 'SAME',
    implementation: str = 'auto',
) -> Float[Array, 'b h2 w2 o']:
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
    return _function('convolution', implementation)(x, kernel, stride=stride, padding=padding)


def locally_connected(
    x: Float[Array, 'b h w i'],
    kernel: Float[Array, 'h2 w2 weights o'],
    size: int,
    *,
    stride: int = 1,
    padding: Padding,
    implementation: str = 'auto',
) -> Float[Array, 'b h2 w2 o']:
    """Computes a convolution with unshared weights, one kernel per output pixel: the layer `local` of cuda-convnet.

    Args:
      x: (B, H, W, I).
      kernel: (H', W', I * size * size, O); the input channel is the slowest-varying index of a window's weights.
      size: height and width of the windows in pixels.

    Returns:
      (B, H', W', O).
    """
    return _function('locally_connected', implementation)(x, kernel, size, stride=stride, padding=padding)


def add_bias(
    x: Float[Array, '*dims c'], bias: Float[Array, '*pixels c'], *, implementation: str = 'auto'
) -> Float[Array, '*dims c']:
    """Adds `bias`, of shape (C,) or of the shape of one example, to `x` (..., C); both have the same dtype."""
    return _function('add_bias', implementation)(x, bias)


def local_response_norm(
    x: Float[Array, '*dims c'], *, k: float, n: int, alpha: float, beta: float, implementation: str = 'auto'
) -> Float[Array, '*dims c']:
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
    return _function('local_response_norm', implementation)(x, k=k, n=n, alpha=alpha, beta=beta)


def within_channel_lrn(
    x: Float[Array, 'b h w c'], *, k: float, n: int, alpha: float, beta: float, implementation: str = 'auto'
) -> Float[Array, 'b h w c']:
    """Normalizes like local_response_norm(), but over `n` x `n` pixels of one feature map: cuda-convnet's `rnorm`.

    The sum is not divided by the number of pixels in the window, which is truncated at the edges.

    Args:
      x: (B, H, W, C).

    Raises:
      ValueError: `n` is even.
    """
    if n % 2 == 0:
        raise ValueError(f'n={n} is even: the window has no middle')
    return _function('within_channel_lrn', implementation)(x, k=k, n=n, alpha=alpha, beta=beta)


def max_pool(
    x: Float[Array, 'b h w c'], window: int, stride: int, *, ceil_mode: bool = False, implementation: str = 'auto'
) -> Float[Array, 'b h2 w2 c']:
    """Computes the maximum over windows of `window` x `window` pixels, `stride` apart, without padding (section 3.4).

    The gradient of a window goes to its maximum; among equal values, to the first in row-major order.

    Args:
      x: (B, H, W, C), floating point.
      ceil_mode: whether to add a last window that extends beyond the edge, as in cuda-convnet.

    Returns:
      (B, (H - window) // stride + 1, (W - window) // stride + 1, C); `ceil_mode` rounds the quotients up instead.
    """
    return _function('max_pool', implementation)(x, window, stride, ceil_mode=ceil_mode)


def order_weight_gradient_after_input_gradient(
    x: Float[Array, '*dims i'], kernel: Float[Array, 'i o'], *, implementation: str = 'auto'
) -> tuple[Float[Array, '*dims i'], Float[Array, 'i o']]:
    """Identity that lets an optimizer update `kernel` in place: see cpu.py.

    Its backward pass computes the gradient by `kernel` after the gradient by `x`, which reads `kernel`.
    """
    return _function('order_weight_gradient_after_input_gradient', implementation)(x, kernel)
