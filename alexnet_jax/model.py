"""AlexNet as the paper's section 3 describes it, two towers and all, and the published networks that vary it.

Shapes in the comments are those of the `paper` preset on one device; `2x` is a list with one array for each tower,
which is kept so that the next layer need not take them apart again.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from alexnet_jax.layers import (
    add_bias,
    convolution,
    local_response_norm,
    locally_connected,
    max_pool,
    order_weight_gradient_after_input_gradient,
    within_channel_lrn,
)
from alexnet_jax.parallel import local_feature_slice, redistribute_features, reduce_scatter_partial_sums
from alexnet_jax.shapes import LAYERS, Layer, layers, ops_after, pool_window

# The original program's constants of the second normalisation in layer 2; its window and alpha are settings.
SPATIAL_K, SPATIAL_BETA = 1.0, 0.75
# nvcaffe's batch normalisation has no scale and no bias; the statistics of a test are running means.
BATCH_NORM = {'use_scale': False, 'use_bias': False, 'momentum': 0.9, 'epsilon': 1e-5}


def _initial(layer: Layer, config: Any, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias before the first step, by model.initializer."""
    index = LAYERS.index(layer.name)
    bias = jnp.full(layer.bias, config.bias_init[index], jnp.float32)
    if config.initializer == 'normal':
        return config.kernel_std[index] * jax.random.normal(rngs.params(), layer.kernel), bias
    own = () if layer.shared else (0, 1)  # weights that are not shared: each pixel has its own fans
    kernel = {
        'xavier': initializers.glorot_uniform(batch_axis=own),
        'he': initializers.he_normal(batch_axis=own),
        'torch': initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', batch_axis=own),
    }[config.initializer](rngs.params(), layer.kernel, jnp.float32)
    if config.initializer == 'torch':
        bound = math.prod(layer.kernel[len(own) : -1]) ** -0.5
        bias = bias + jax.random.uniform(rngs.params(), layer.bias, minval=-bound, maxval=bound)
    return kernel, bias


class Convolution(nnx.Module):
    """Kernels and biases of one layer, see shapes.Layer, divided evenly among the towers."""

    def __init__(self, layer: Layer, config: Any, rngs: nnx.Rngs):
        kernel, bias = _initial(layer, config, rngs)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)
        self.name, self.shared, self.dtype = layer.name, layer.shared, jnp.dtype(config.dtype)
        self.size = config.kernel_sizes[LAYERS.index(layer.name)]
        self.tower_width = layer.kernel[-1] // config.towers
        self.stride, self.padding = 1, (self.size // 2, (self.size - 1) // 2)
        if layer.name == 'conv1':
            self.stride, self.padding = config.conv1_stride, config.conv1_padding

    @property
    def inputs(self) -> int:
        """Maps that one output sees."""
        return self.kernel.shape[2] if self.shared else self.kernel.shape[2] // self.size**2

    def __call__(self, parts: list[jax.Array]) -> list[jax.Array]:
        """Outputs before the nonlinearity, (B, H', W', C): one array where all kernels see the same maps.

        Otherwise there is one for each tower on this device, and of those each kernel sees the maps of its own.
        """
        groups = sum(x.shape[-1] for x in parts) // self.inputs
        kernels = jnp.split(self.kernel[...].astype(self.dtype), groups, -1)
        biases = jnp.split(self.bias[...].astype(self.dtype), groups, -1)
        padding, outputs = (self.padding, self.padding), []
        with jax.named_scope(self.name):
            for x, kernel, bias in zip(regroup_channels(parts, groups), kernels, biases, strict=True):
                if self.shared:
                    x = convolution(x, kernel, stride=self.stride, padding=padding)
                else:
                    x = locally_connected(x, kernel, self.size, stride=self.stride, padding=padding)
                outputs.append(add_bias(x, bias))
        return outputs


def regroup_channels(parts: list[jax.Array], count: int) -> list[jax.Array]:
    """The channels of `parts` in `count` equal parts, in the same order."""
    return parts if len(parts) == count else jnp.split(jnp.concatenate(parts, -1), count, -1)


class Dense(nnx.Module):
    """A fully-connected layer; on a mesh each device of `model` has the kernel's share of outputs, or of inputs.

    One that does not see both towers has the kernels of each tower side by side, as a convolution's.
    """

    def __init__(self, layer: Layer, config: Any, rngs: nnx.Rngs):
        kernel, bias = _initial(layer, config, rngs)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)
        self.name, self.global_in_features, self.dtype = layer.name, layer.kernel[0], jnp.dtype(config.dtype)
        self.tower_width = layer.kernel[-1] // config.towers

    @property
    def inputs(self) -> int:
        """Inputs that the kernel on this device takes."""
        return self.kernel.shape[0]

    @property
    def towers(self) -> int:
        """Towers whose kernels are on this device."""
        return self.kernel.shape[-1] // self.tower_width

    def __call__(self, parts: list[jax.Array]) -> jax.Array:
        """(B, outputs on this device), before the nonlinearity, of one (B, inputs) or of one for each tower."""
        kernels = jnp.split(self.kernel[...].astype(self.dtype), len(parts), -1)
        with jax.named_scope(self.name):
            pairs = [
                order_weight_gradient_after_input_gradient(x.astype(self.dtype), w)
                for x, w in zip(parts, kernels, strict=True)
            ]
            x = jnp.concatenate([x @ kernel for x, kernel in pairs], -1)
            if self.inputs < self.global_in_features:
                x = reduce_scatter_partial_sums(x, self.bias.shape[0])
            return x + self.bias[...].astype(self.dtype)[None]


class AlexNet(nnx.Module):
    """Five convolutional and three fully-connected layers, or those of them that have a width.

    Args:
      config: `model` of a resolved configuration.
      crop_size: pixels a side of the images, 224 in the paper.
      channels: of the images, 3 or 1.
      rngs: the stream `params` gives the initial kernels.
      statistics_axes: of the mesh, over which batch normalisation takes its means in training.
      remat: whether the gradient of a convolution and of what follows it keeps their inputs alone, and computes them
        again.
    """

    def __init__(
        self,
        config: Any,
        *,
        crop_size: int,
        channels: int = 3,
        rngs: nnx.Rngs,
        statistics_axes: tuple[str, ...] = ('data',),
        remat: bool = False,
    ):
        self.config, self.remat = config, remat
        table = layers(config, crop_size, channels)
        self.conv_features = next(layer.pooled[-1] for layer in reversed(table) if layer.name.startswith('conv'))
        for layer in table:
            kind = Convolution if layer.name.startswith('conv') else Dense
            setattr(self, layer.name, kind(layer, config, rngs))
            if layer.name.startswith('conv') and 'batch_norm' in ops_after(config, layer.name):
                norm = nnx.BatchNorm(layer.output[-1], axis_name=statistics_axes, rngs=rngs, **BATCH_NORM)
                setattr(self, f'{layer.name}_norm', norm)

    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Logits (B, num_classes), float32, of `images` (B, crop_size, crop_size, channels), float32.

        `dropout_keys` (B,), one an image, switch dropout on and give batch normalisation the batch's statistics;
        without, outputs are scaled as at the paper's test time.
        """
        logits = self.activations(images, dropout_keys)['fc8']
        return redistribute_features(logits, self.config.num_classes, 'logits').astype(jnp.float32)

    def activations(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> dict[str, jax.Array]:
        """What this device has of each layer's output after the nonlinearity, by name: (B, H, W, C) or (B, units)."""
        outputs: dict[str, jax.Array] = {}
        parts = [images.astype(self.conv1.dtype)]  # (B, 224, 224, 3)
        parts = self.convolve('conv1', parts, dropout_keys, outputs)  # (B, 55, 55, 96), pooled (B, 27, 27, 96)
        parts = self.convolve('conv2', parts, dropout_keys, outputs)  # 2x (B, 27, 27, 128), pooled (B, 13, 13, 128)
        parts = self.convolve('conv3', parts, dropout_keys, outputs)  # (B, 13, 13, 384)
        parts = self.convolve('conv4', parts, dropout_keys, outputs)  # 2x (B, 13, 13, 192)
        parts = self.convolve('conv5', parts, dropout_keys, outputs)  # 2x (B, 13, 13, 128), pooled (B, 6, 6, 128)
        units = self.connect('fc6', parts, dropout_keys, outputs)  # (B, 4096)
        units = self.connect('fc7', units, dropout_keys, outputs)  # (B, 4096)
        self.connect('fc8', units, dropout_keys, outputs)  # (B, 1000)
        return outputs

    def convolve(
        self, name: str, parts: list[jax.Array], dropout_keys: jax.Array | None, outputs: dict[str, jax.Array]
    ) -> list[jax.Array]:
        """One convolution and what follows it; conv3 sees the maps of both towers, others those of their own."""
        layer = getattr(self, name, None)
        if layer is not None and (name == 'conv1' or name in self.config.exchange):
            parts = [redistribute_features(jnp.concatenate(parts, -1), layer.inputs, name)]
        norm, training = getattr(self, f'{name}_norm', None), dropout_keys is not None

        def compute(layer, norm, parts):
            return self.compute(name, layer, norm, parts, training)

        parts, output = (nnx.remat(compute) if self.remat and training else compute)(layer, norm, parts)
        if output is not None:
            outputs[name] = output
        return parts

    def compute(
        self, name: str, layer: Convolution | None, norm: Any, parts: list[jax.Array], training: bool
    ) -> tuple[list[jax.Array], jax.Array | None]:
        """convolve() without what crosses between devices: what comes after pooling, and the output of the layer."""
        output = None
        if layer is not None:
            parts = layer(parts)
            output = jnp.concatenate(parts, -1)  # of a layer without a nonlinearity
        for step in ops_after(self.config, name):
            with jax.named_scope(f'{name}/{step}'):
                if step == 'activation':
                    parts = [self.activate(x) for x in parts]
                    output = jnp.concatenate(parts, -1)
                elif step == 'lrn':
                    parts = self.normalise(name, parts)
                elif step == 'spatial_norm':
                    parts = [self.spatial_lrn(x) for x in parts]
                elif step == 'batch_norm':
                    x = norm(jnp.concatenate(parts, -1).astype(jnp.float32), use_running_average=not training)
                    parts = jnp.split(x.astype(parts[0].dtype), len(parts), -1)
                elif step == 'pool':
                    overhang = self.config.pool_overhang
                    parts = [max_pool(x, pool_window(self.config), 2, overhang=overhang) for x in parts]
        return parts, output

    def connect(
        self, name: str, parts: list[jax.Array], dropout_keys: jax.Array | None, outputs: dict[str, jax.Array]
    ) -> list[jax.Array]:
        """One dense layer, with dropout before and the nonlinearity behind it where it has them."""
        layer = getattr(self, name, None)
        if layer is None:
            return parts
        cross_tower = name in self.config.exchange
        if parts[0].ndim == 4:  # maps
            if cross_tower:
                parts = [redistribute_features(jnp.concatenate(parts, -1), self.conv_features, name)]  # (B, 6, 6, 256)
            else:
                parts = regroup_channels(parts, layer.towers)
            parts = [x.reshape(x.shape[0], -1) for x in parts]
        x = jnp.concatenate(parts, -1)
        if cross_tower:
            x = redistribute_features(x, layer.inputs, name)
        if name in self.config.dropout_before:
            x = self.dropout(
                x,
                dropout_keys,
                name,
                layer.global_in_features if cross_tower else layer.global_in_features * self.config.towers,
            )
        x = layer([x] if cross_tower else jnp.split(x, layer.towers, -1))
        outputs[name] = x if name == 'fc8' else self.activate(x)
        return [outputs[name]]

    def activate(self, x: jax.Array) -> jax.Array:
        """The nonlinearity of section 3.1."""
        return {'relu': jax.nn.relu, 'tanh': jnp.tanh}[self.config.activation](x)

    def normalise(self, name: str, parts: list[jax.Array]) -> list[jax.Array]:
        """Response normalisation of section 3.3, over the maps of each tower or, as Caffe has it, of all."""
        config = self.config
        constants = {'k': config.lrn_k, 'n': config.lrn_size, 'alpha': config.lrn_alpha, 'beta': config.lrn_beta}
        if config.lrn_across_towers:
            return jnp.split(local_response_norm(jnp.concatenate(parts, -1), **constants), len(parts), -1)
        width = getattr(self, name).tower_width
        towers = [x.reshape(*x.shape[:-1], -1, width) for x in parts]
        return [local_response_norm(x, **constants).reshape(*x.shape[:-2], -1) for x in towers]

    def spatial_lrn(self, x: jax.Array) -> jax.Array:
        """The original program's second normalisation, over the pixels around each one of a map."""
        n, alpha = self.config.spatial_norm_size, self.config.spatial_norm_alpha
        return within_channel_lrn(x, k=SPATIAL_K, n=n, alpha=alpha, beta=SPATIAL_BETA)

    def dropout(self, x: jax.Array, keys: jax.Array | None, name: str, width: int) -> jax.Array:
        """Dropout of section 4.2 on what layer `name` takes: zeros in training, otherwise all times the share kept.

        With `inverted_dropout` what is kept is scaled up in training instead. Each example's mask over all `width`
        inputs comes from its key; a device takes what it has of them.
        """
        kept, inverted = 1 - self.config.dropout, self.config.inverted_dropout
        if keys is None:
            return x if inverted else x * kept
        number = LAYERS.index(name)  # 6 before fc7: behind the sixth layer
        keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), kept, (width,)))(keys)
        x = jnp.where(local_feature_slice(keep, x.shape[-1]), x, jnp.zeros_like(x))
        return x / kept if inverted else x
