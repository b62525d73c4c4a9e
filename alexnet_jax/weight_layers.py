"""The convolutional and fully connected layers, and the initialization of their parameters.

The features of several towers stay in separate arrays until a layer reads all of them.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Float32

from alexnet_jax.config import ModelConfig
from alexnet_jax.layers import add_bias, convolution, dense, locally_connected
from alexnet_jax.parallel import reduce_scatter_partial_sums
from alexnet_jax.shapes import LayerShape

# One array per tower on this device, or one array of the features of all towers: (B, H, W, C) or (B, units) each.
Towers = list[Float[Array, '...']]


def init_params(
    shape: LayerShape, initializer: str, rngs: nnx.Rngs
) -> tuple[Float32[Array, '*inputs c'], Float32[Array, '*pixels c']]:
    """Returns the initial kernel and bias; `initializer` is the field model.initializer of a configuration."""
    spec = shape.spec
    bias = jnp.full(shape.bias, spec.bias_init, jnp.float32)
    if initializer == 'normal':
        return spec.kernel_std * jax.random.normal(rngs.params(), shape.kernel), bias
    pixels = (0, 1) if spec.locally_connected else ()  # each output pixel has its own fan
    kernel = {
        'glorot_uniform': initializers.glorot_uniform(batch_axis=pixels),
        'he_normal': initializers.he_normal(batch_axis=pixels),
        'torch_default': initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', batch_axis=pixels),
    }[initializer](rngs.params(), shape.kernel, jnp.float32)
    if initializer == 'torch_default':
        bound = math.prod(shape.kernel[len(pixels) : -1]) ** -0.5
        bias = bias + jax.random.uniform(rngs.params(), shape.bias, minval=-bound, maxval=bound)
    return kernel, bias


def regroup_channels(towers: Towers, count: int) -> Towers:
    """Concatenates the channels of `towers`, and splits them into `count` arrays of equal size."""
    return towers if len(towers) == count else jnp.split(jnp.concatenate(towers, -1), count, -1)


class Layer(nnx.Module):
    """A kernel and a bias: in the train step, this device's shards of them, see parallel.param_specs().

    A layer without `cross_tower` concatenates the kernels of the towers in the output dimension.
    """

    def __init__(self, shape: LayerShape, config: ModelConfig, rngs: nnx.Rngs):
        kernel, bias = init_params(shape, config.initializer, rngs)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)
        self.spec, self.dtype = shape.spec, jnp.dtype(config.dtype)
        self.global_in_features, self.tower_features = shape.kernel[-2], shape.spec.features // config.towers

    @property
    def groups(self) -> int:
        """Number of kernel groups with separate inputs: 1 for `cross_tower`, otherwise the number of local towers."""
        return 1 if self.spec.cross_tower else self.kernel.shape[-1] // self.tower_features


class Conv(Layer):
    """A convolutional or locally connected layer."""

    @property
    def in_features(self) -> int:
        """Number of input channels that each output channel reads."""
        return self.kernel.shape[2] // (self.spec.kernel**2 if self.spec.locally_connected else 1)

    def __call__(self, towers: Towers) -> Towers:
        """Returns the outputs before the nonlinearity, (B, H', W', C), one array per group."""
        kernels = jnp.split(self.kernel[...].astype(self.dtype), self.groups, -1)
        biases = jnp.split(self.bias[...].astype(self.dtype), self.groups, -1)
        stride, padding, outputs = self.spec.stride, (self.spec.padding, self.spec.padding), []
        for x, kernel, bias in zip(regroup_channels(towers, self.groups), kernels, biases, strict=True):
            if self.spec.locally_connected:
                x = locally_connected(x, kernel, self.spec.kernel, stride=stride, padding=padding)
            else:
                x = convolution(x, kernel, stride=stride, padding=padding)
            outputs.append(add_bias(x, bias))
        return outputs


class Dense(Layer):
    """A fully connected layer; `model` shards the kernel's output dimension, in `hybrid` its input dimension."""

    @property
    def in_features(self) -> int:
        """Number of inputs of this device's kernel."""
        return self.kernel.shape[0]

    def __call__(self, towers: Towers) -> Towers:
        """Returns this device's outputs before the nonlinearity, a list of one array (B, outputs).

        In `hybrid`, fc8 returns all outputs of B / model examples.
        """
        pairs = zip(regroup_channels(towers, self.groups), jnp.split(self.kernel[...], self.groups, -1), strict=True)
        x = jnp.concatenate([dense(x.astype(self.dtype), kernel) for x, kernel in pairs], -1)
        if self.in_features < self.global_in_features:
            x = reduce_scatter_partial_sums(x, self.bias.shape[0])
        return [x + self.bias[...].astype(self.dtype)[None]]
