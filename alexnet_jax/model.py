"""AlexNet as the paper's section 3 describes it, two towers and all.

Shapes in the comments are those of the `paper` preset on one device; `2x` is a list with one array for each tower.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from alexnet_jax.config import layer_sizes
from alexnet_jax.layers import convolution, local_response_norm, max_pool
from alexnet_jax.parallel import exchange, own_features, sum_parts


class Convolution(nnx.Module):
    """Kernels (height, width, inputs, outputs) and biases of one layer, divided evenly among the towers."""

    def __init__(self, name, size, inputs, outputs, *, towers, std, bias, dtype, rngs, stride=1, padding='SAME'):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (size, size, inputs, outputs)))
        self.bias = nnx.Param(jnp.full((outputs,), bias, jnp.float32))
        self.name, self.tower_width = name, outputs // towers
        self.stride, self.padding, self.dtype = stride, padding, dtype

    @property
    def towers(self) -> int:
        """Towers whose kernels are on this device."""
        return self.kernel.shape[-1] // self.tower_width

    def __call__(self, towers: list[jax.Array]) -> list[jax.Array]:
        """Outputs of the towers on this device, each (B, H', W', tower_width), before the nonlinearity."""
        kernels = jnp.split(self.kernel[...].astype(self.dtype), self.towers, -1)
        biases = jnp.split(self.bias[...].astype(self.dtype), self.towers)
        with jax.named_scope(self.name):
            return [
                convolution(x, kernel, stride=self.stride, padding=self.padding) + bias[None, None, None]
                for x, kernel, bias in zip(towers, kernels, biases, strict=True)
            ]


class Dense(nnx.Module):
    """A fully-connected layer; on a mesh each device of `model` has the kernel's share of outputs, or of inputs."""

    def __init__(self, name, inputs, outputs, *, std, bias, dtype, rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.full((outputs,), bias, jnp.float32))
        self.name, self.all_inputs, self.dtype = name, inputs, dtype

    @property
    def inputs(self) -> int:
        """Inputs that the kernel on this device takes."""
        return self.kernel.shape[0]

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, inputs on this device) to (B, outputs on this device), before the nonlinearity."""
        with jax.named_scope(self.name):
            x = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
            if self.inputs < self.all_inputs:
                x = sum_parts(x, self.bias.shape[0])
            return x + self.bias[...].astype(self.dtype)[None]


class AlexNet(nnx.Module):
    """Five convolutional and three fully-connected layers.

    Args:
      config: `model` of a resolved configuration.
      crop_size: pixels a side of the images, 224 in the paper.
      channels: of the images, 3 or 1.
      rngs: the stream `params` gives the initial kernels.
    """

    def __init__(self, config: Any, *, crop_size: int, channels: int = 3, rngs: nnx.Rngs):
        c1, c2, c3, c4, c5, f6, f7 = config.widths
        towers, dtype = config.towers, jnp.dtype(config.dtype)
        layers = [
            {'std': std, 'bias': bias, 'dtype': dtype, 'rngs': rngs}
            for std, bias in zip(config.kernel_std, config.bias_init, strict=True)
        ]
        side = layer_sizes(crop_size, config.overlapping_pool)[-1]
        # Windows that reach over the right and the lower edge see zeros, as in the original program: 224 gives 55.
        self.conv1 = Convolution(
            'conv1', 11, channels, c1, towers=towers, stride=4, padding=((0, 3), (0, 3)), **layers[0]
        )
        self.conv2 = Convolution('conv2', 5, c1 // towers, c2, towers=towers, **layers[1])
        self.conv3 = Convolution('conv3', 3, c2, c3, towers=towers, **layers[2])
        self.conv4 = Convolution('conv4', 3, c3 // towers, c4, towers=towers, **layers[3])
        self.conv5 = Convolution('conv5', 3, c4 // towers, c5, towers=towers, **layers[4])
        self.fc6 = Dense('fc6', side * side * c5, f6, **layers[5])
        self.fc7 = Dense('fc7', f6, f7, **layers[6])
        self.fc8 = Dense('fc8', f7, config.num_classes, **layers[7])
        self.config = config

    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Logits (B, num_classes), float32, of `images` (B, crop_size, crop_size, channels), float32.

        `dropout_keys` (B,), one an image, switch dropout on; without, outputs are scaled as at the paper's test time.
        """
        config = self.config
        c2, c5, f6, f7 = (config.widths[i] for i in (1, 4, 5, 6))

        towers = self.conv1([images.astype(self.conv1.dtype)] * self.conv1.towers)  # 2x (B, 55, 55, 48)
        towers = [self.pool(self.normalise(self.activate(x))) for x in towers]  # 2x (B, 27, 27, 48)
        towers = self.conv2(towers)  # 2x (B, 27, 27, 128)
        towers = [self.pool(self.normalise(self.activate(x))) for x in towers]  # 2x (B, 13, 13, 128)

        x = exchange(jnp.concatenate(towers, -1), c2, 'conv3')  # (B, 13, 13, 256)
        towers = self.conv3([x] * self.conv3.towers)  # 2x (B, 13, 13, 192)
        towers = self.conv4([self.activate(x) for x in towers])  # 2x (B, 13, 13, 192)
        towers = self.conv5([self.activate(x) for x in towers])  # 2x (B, 13, 13, 128)
        towers = [self.pool(self.activate(x)) for x in towers]  # 2x (B, 6, 6, 128)

        x = exchange(jnp.concatenate(towers, -1), c5, 'fc6')  # (B, 6, 6, 256)
        x = exchange(x.reshape(x.shape[0], -1), self.fc6.inputs, 'fc6')  # (B, 9216)
        x = self.activate(self.fc6(x))
        x = self.dropout(exchange(x, self.fc7.inputs, 'fc7'), dropout_keys, 6, f6)  # (B, 4096)
        x = self.activate(self.fc7(x))
        x = self.dropout(exchange(x, self.fc8.inputs, 'fc8'), dropout_keys, 7, f7)  # (B, 4096)
        return exchange(self.fc8(x), config.num_classes, 'logits').astype(jnp.float32)  # (B, 1000)

    def activate(self, x: jax.Array) -> jax.Array:
        """The nonlinearity of section 3.1."""
        return {'relu': jax.nn.relu, 'tanh': jnp.tanh}[self.config.activation](x)

    def normalise(self, x: jax.Array) -> jax.Array:
        """Response normalisation of section 3.3 over the maps of one tower, where the configuration has it."""
        if not self.config.lrn:
            return x
        config = self.config
        return local_response_norm(x, k=config.lrn_k, n=config.lrn_size, alpha=config.lrn_alpha, beta=config.lrn_beta)

    def pool(self, x: jax.Array) -> jax.Array:
        """Pooling of section 3.4: windows of 3 pixels, or of 2 where they are not to overlap, 2 pixels apart."""
        return max_pool(x, 3 if self.config.overlapping_pool else 2, 2)

    def dropout(self, x: jax.Array, keys: jax.Array | None, layer: int, width: int) -> jax.Array:
        """Dropout of section 4.2: zeros in training, all outputs times the share that is kept otherwise.

        Each example's mask over the layer's `width` outputs comes from its key; a device takes what it has of them.
        """
        kept = 1 - self.config.dropout
        if keys is None:
            return x * kept
        keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), kept, (width,)))(keys)
        return jnp.where(own_features(keep, x.shape[-1]), x, jnp.zeros_like(x))
