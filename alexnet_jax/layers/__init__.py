"""The layers of the paper's section 3 as pure functions on (B, H, W, C) arrays.

An operation has up to four implementations, whose results differ only in rounding errors. The argument
`implementation` selects one:
  'reference'        the definition in plain JAX, with automatic differentiation: reference.py
  'custom_gradient'  a custom gradient that saves memory traffic: custom_gradient.py
  'cpu'              an implementation that XLA for CPUs schedules well: cpu.py
  'gpu'              an implementation that XLA for GPUs fuses well: gpu.py
  'auto'             the implementation in PLATFORMS for platform() at the time of tracing.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jaxtyping import Array, Float

from alexnet_jax.layers import cpu, custom_gradient, gpu, reference
from alexnet_jax.layers.cpu import materialize
from alexnet_jax.layers.reference import Padding

__all__ = [
    'add_bias',
    'convolution',
    'dense',
    'for_platform',
    'local_response_norm',
    'locally_connected',
    'materialize',
    'max_pool',
    'platform',
    'within_channel_lrn',
]

MODULES = {'reference': reference, 'custom_gradient': custom_gradient, 'cpu': cpu, 'gpu': gpu}

# The default implementation on each platform; 'gpu' is CUDA or ROCm, and other platforms use the reference. The choices
# for CPUs are based on measured times, see cpu.py. The choices for GPUs and TPUs are based on the bytes that the train
# step of `paper` accesses when jaxlib 0.12.0.1 compiles it (`alexnet audit --target`); times were not measured. The
# list gives the bytes of the float32 step that one other implementation adds:
#   H100 (layout `data`, 128 images, 7.01 GB): max_pool: reference 49 %, cpu 0.4 %; local_response_norm: custom_gradient
#     6 %, reference 5 %; convolution: cpu 9 %; dense: cpu 0.4 %; add_bias: cpu 0 %.
#   TPU v5e (`towers`, 64 images, 3.72 GB, libtpu 0.0.52): max_pool: custom_gradient 33 %, cpu 41 %; convolution: cpu
#     43 %; dense: cpu 0.2 %; local_response_norm: custom_gradient 6 %; gpu -8 %, but 39 % more cycles of the step by
#     the compiler's estimate.
# fmt: off
PLATFORMS = {
    'convolution':         {'cpu': 'cpu',             'gpu': 'reference',       'tpu': 'reference'},
    'add_bias':            {'cpu': 'cpu',             'gpu': 'reference',       'tpu': 'reference'},
    'local_response_norm': {'cpu': 'custom_gradient', 'gpu': 'gpu',             'tpu': 'reference'},
    'within_channel_lrn':  {'cpu': 'custom_gradient', 'gpu': 'custom_gradient', 'tpu': 'reference'},
    'max_pool':            {'cpu': 'cpu',             'gpu': 'custom_gradient', 'tpu': 'reference'},
    'dense':               {'cpu': 'cpu',             'gpu': 'custom_gradient', 'tpu': 'custom_gradient'},
    'locally_connected':   {'cpu': 'reference',       'gpu': 'reference',       'tpu': 'reference'},
}
# fmt: on

_traced_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar('traced_platform', default=None)


def platform() -> str:
    """Returns the platform of the program that is traced: that of for_platform(), or else jax.default_backend()."""
    return _traced_platform.get() or jax.default_backend()


@contextlib.contextmanager
def for_platform(name: str) -> Iterator[None]:
    """Within the context, layers are traced for the platform `name` ('cpu', 'gpu', 'tpu'), for any backend of JAX."""
    token = _traced_platform.set(name)
    try:
        yield
    finally:
        _traced_platform.reset(token)


def _function(operation: str, implementation: str) -> Callable[..., Any]:
    """Returns the function of `operation`. Raises ValueError: the operation has no such implementation."""
    if implementation == 'auto':
        implementation = PLATFORMS[operation].get(platform(), 'reference')
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
    """Computes a 2-D convolution; the number of groups is the number of channels of `x` divided by I.

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
      stride, padding: see convolution().

    Returns:
      (B, H', W', O).
    """
    return _function('locally_connected', implementation)(x, kernel, size, stride=stride, padding=padding)


def add_bias(
    x: Float[Array, '*dims c'], bias: Float[Array, '*pixels c'], *, implementation: str = 'auto'
) -> Float[Array, '*dims c']:
    """Adds `bias` to `x` of the same dtype; the shape of `bias` is (C,) or that of one example."""
    return _function('add_bias', implementation)(x, bias)


def local_response_norm(
    x: Float[Array, '*dims c'], *, k: float, n: int, alpha: float, beta: float, implementation: str = 'auto'
) -> Float[Array, '*dims c']:
    """Normalizes over `n` adjacent feature maps (section 3.3): x / (k + alpha * sum of squares) ** beta.

    The sum is not divided by `n`; the window is truncated at the first and the last map. The operation computes in
    float32 and returns the dtype of `x`.

    Args:
      x: the feature maps of one tower.
      k, alpha, beta: constants of the formula.
      n: number of feature maps in a window, odd.

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

    The sum is not divided by the number of pixels; the window is truncated at the edges.

    Raises ValueError: `n` is even.
    """
    if n % 2 == 0:
        raise ValueError(f'n={n} is even: the window has no middle')
    return _function('within_channel_lrn', implementation)(x, k=k, n=n, alpha=alpha, beta=beta)


def max_pool(
    x: Float[Array, 'b h w c'], window: int, stride: int, *, ceil_mode: bool = False, implementation: str = 'auto'
) -> Float[Array, 'b h2 w2 c']:
    """Computes the maximum over windows of `window` x `window` pixels, `stride` apart, without padding (section 3.4).

    The gradient of a window goes to the maximum; among equal values, to the first in row-major order. `ceil_mode` adds
    a last window that extends beyond the edge, as in cuda-convnet.

    Returns:
      (B, (H - window) // stride + 1, (W - window) // stride + 1, C); `ceil_mode` rounds the quotients up instead.
    """
    return _function('max_pool', implementation)(x, window, stride, ceil_mode=ceil_mode)


def dense(x: Float[Array, 'b i'], kernel: Float[Array, 'i o'], *, implementation: str = 'auto') -> Float[Array, 'b o']:
    """Computes `x` @ `kernel` in the dtype of `x`.

    All implementations but the reference compute the gradient of a float32 `kernel` in float32 also for a bfloat16 `x`.
    """
    return _function('dense', implementation)(x, kernel)
