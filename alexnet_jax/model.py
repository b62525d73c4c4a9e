"""AlexNet as in section 3 of the paper, including its two towers, and the published variants.

Shapes in comments are those of the `paper` preset on one device. `2x` is a list with one array per tower: the towers
stay separate so that the next layer does not have to split a concatenated array again.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from alexnet_jax.config import ModelConfig
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
from alexnet_jax.shapes import LAYERS, LayerShape, layer_table, ops_after, pool_window

# Constants of the original program for the second normalization of layer 2; the window and alpha are settings.
SPATIAL_K, SPATIAL_BETA = 1.0, 0.75
# Batch normalization as in nvcaffe, without scale and bias; evaluation uses the running statistics.
BATCH_NORM = {'use_scale': False, 'use_bias': False, 'momentum': 0.9, 'epsilon': 1e-5}


def _initial(layer: LayerShape, config: ModelConfig, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    """Returns the initial kernel and bias according to model.initializer."""
    index = LAYERS.index(layer.name)
    bias = jnp.full(layer.bias, config.bias_init[index], jnp.float32)
    if config.initializer == 'normal':
        return config.kernel_std[index] * jax.random.normal(rngs.params(), layer.kernel), bias
    own = () if layer.shared else (0, 1)  # locally_connected: the fan is counted per output pixel
    kernel = {
        'glorot_uniform': initializers.glorot_uniform(batch_axis=own),
        'he_normal': initializers.he_normal(batch_axis=own),
        'torch_default': initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', batch_axis=own),
    }[config.initializer](rngs.params(), layer.kernel, jnp.float32)
    if config.initializer == 'torch_default':
        bound = math.prod(layer.kernel[len(own) : -1]) ** -0.5
        bias = bias + jax.random.uniform(rngs.params(), layer.bias, minval=-bound, maxval=bound)
    return kernel, bias


class Convolution(nnx.Module):
    """A convolutional or locally connected layer, see shapes.Layer; its outputs divide evenly among the towers."""

    def __init__(self, layer: LayerShape, config: ModelConfig, rngs: nnx.Rngs):
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
        """Number of input channels that each output channel sees."""
        return self.kernel.shape[2] if self.shared else self.kernel.shape[2] // self.size**2

    def __call__(self, parts: list[jax.Array]) -> list[jax.Array]:
        """Returns the outputs (B, H', W', C) before the nonlinearity.

        The list has one array if all kernels see the same feature maps. Otherwise it has one array per tower on this
        device, and each kernel sees only the feature maps of its own tower.
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
    """Splits the channels of `parts` into `count` equal parts, in the same order."""
    return parts if len(parts) == count else jnp.split(jnp.concatenate(parts, -1), count, -1)


class Dense(nnx.Module):
    """A fully connected layer; along `model`, the kernel is sharded in its outputs or, in `hybrid`, in its inputs.

    A layer that is not in `cross_tower` stores the kernels of the towers side by side in the output dimension, like
    Convolution.
    """

    def __init__(self, layer: LayerShape, config: ModelConfig, rngs: nnx.Rngs):
        kernel, bias = _initial(layer, config, rngs)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)
        self.name, self.global_in_features, self.dtype = layer.name, layer.kernel[0], jnp.dtype(config.dtype)
        self.tower_width = layer.kernel[-1] // config.towers

    @property
    def inputs(self) -> int:
        """Number of inputs of this device's kernel."""
        return self.kernel.shape[0]

    @property
    def towers(self) -> int:
        """Number of towers whose kernels are on this device."""
        return self.kernel.shape[-1] // self.tower_width

    def __call__(self, parts: list[jax.Array]) -> jax.Array:
        """Returns (B, outputs on this device) before the nonlinearity; in `hybrid`, fc8 returns (B / model, outputs).

        `parts`: one array (B, inputs), or one such array per tower.
        """
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
    """Five convolutional and three fully connected layers; layers of width 0 are left out.

    Args:
      config: `model` of a resolved configuration.
      crop_size: height and width of the images in pixels, 224 in the paper.
      channels: number of image channels, 3 or 1.
      rngs: random streams; `params` draws the initial parameters.
      statistics_axes: mesh axes over which batch normalization averages its statistics in training.
      remat: rematerialization: in training, each convolution and the operations after it save only their inputs for
        the backward pass and are computed again there.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        crop_size: int,
        channels: int = 3,
        rngs: nnx.Rngs,
        statistics_axes: tuple[str, ...] = ('data',),
        remat: bool = False,
    ):
        self.config, self.remat = config, remat
        table = layer_table(config, crop_size, channels)
        self.conv_features = next(layer.pooled[-1] for layer in reversed(table) if layer.name.startswith('conv'))
        for layer in table:
            kind = Convolution if layer.name.startswith('conv') else Dense
            setattr(self, layer.name, kind(layer, config, rngs))
            if layer.name.startswith('conv') and 'batch_norm' in ops_after(config, layer.name):
                norm = nnx.BatchNorm(layer.output[-1], axis_name=statistics_axes, rngs=rngs, **BATCH_NORM)
                setattr(self, f'{layer.name}_norm', norm)

    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Returns float32 logits (B, num_classes) of float32 `images` (B, crop_size, crop_size, channels).

        `dropout_keys`, one key per example in the dense layers, (B,) or in `hybrid` (B * model,), select training mode:
        dropout, and batch normalization by the batch's statistics. None selects test mode: see dropout(), and running
        statistics.
        """
        logits = self.activations(images, dropout_keys)['fc8']
        return redistribute_features(logits, self.config.num_classes, 'logits').astype(jnp.float32)

    def activations(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> dict[str, jax.Array]:
        """Returns this device's shard of each layer's output after the nonlinearity: (B, H, W, C) or (B, units)."""
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
        """Applies one convolution and the operations after it; stores the layer's output in `outputs`.

        Layers in `cross_tower` (conv3 in the paper) read the feature maps of both towers, others those of their own.
        """
        layer = getattr(self, name, None)
        if layer is not None and (name == 'conv1' or name in self.config.cross_tower):
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
        """convolve() without communication between towers: the part that `remat` computes again.

        Returns the result after all operations, and the layer's output after the nonlinearity (None without a layer).
        """
        output = None
        if layer is not None:
            parts = layer(parts)
            output = jnp.concatenate(parts, -1)  # kept if the layer has no nonlinearity
        for step in ops_after(self.config, name):
            with jax.named_scope(f'{name}/{step}'):
                if step == 'activation':
                    parts = [self.activate(x) for x in parts]
                    output = jnp.concatenate(parts, -1)
                elif step == 'lrn':
                    parts = self.normalise(name, parts)
                elif step == 'spatial_lrn':
                    parts = [self.spatial_lrn(x) for x in parts]
                elif step == 'batch_norm':
                    x = norm(jnp.concatenate(parts, -1).astype(jnp.float32), use_running_average=not training)
                    parts = jnp.split(x.astype(parts[0].dtype), len(parts), -1)
                elif step == 'pool':
                    ceil_mode = self.config.pool_ceil_mode
                    parts = [max_pool(x, pool_window(self.config), 2, ceil_mode=ceil_mode) for x in parts]
        return parts, output

    def connect(
        self, name: str, parts: list[jax.Array], dropout_keys: jax.Array | None, outputs: dict[str, jax.Array]
    ) -> list[jax.Array]:
        """Applies one dense layer, with dropout before the layer (if configured) and the nonlinearity (except fc8)."""
        layer = getattr(self, name, None)
        if layer is None:
            return parts
        cross_tower = name in self.config.cross_tower
        if parts[0].ndim == 4:  # feature maps
            if cross_tower:
                parts = [redistribute_features(jnp.concatenate(parts, -1), self.conv_features, name)]  # (B, 6, 6, 256)
            else:
                parts = regroup_channels(parts, layer.towers)
            parts = [x.reshape(x.shape[0], -1) for x in parts]
        x = jnp.concatenate(parts, -1)
        if cross_tower:
            x = redistribute_features(x, layer.inputs, name)
        if name in self.config.dropout_on_inputs_of:
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
        """Applies the nonlinearity of section 3.1."""
        return {'relu': jax.nn.relu, 'tanh': jnp.tanh}[self.config.activation](x)

    def normalise(self, name: str, parts: list[jax.Array]) -> list[jax.Array]:
        """Applies local response normalization (section 3.3) within each tower or, as in Caffe, across towers."""
        config = self.config
        constants: Any = {'k': config.lrn_k, 'n': config.lrn_size, 'alpha': config.lrn_alpha, 'beta': config.lrn_beta}
        if config.lrn_across_towers:
            return jnp.split(local_response_norm(jnp.concatenate(parts, -1), **constants), len(parts), -1)
        width = getattr(self, name).tower_width
        towers = [x.reshape(*x.shape[:-1], -1, width) for x in parts]
        return [local_response_norm(x, **constants).reshape(*x.shape[:-2], -1) for x in towers]

    def spatial_lrn(self, x: jax.Array) -> jax.Array:
        """Applies the original program's second normalization, over neighboring pixels within each feature map."""
        n, alpha = self.config.spatial_lrn_size, self.config.spatial_lrn_alpha
        return within_channel_lrn(x, k=SPATIAL_K, n=n, alpha=alpha, beta=SPATIAL_BETA)

    def dropout(self, x: jax.Array, keys: jax.Array | None, name: str, width: int) -> jax.Array:
        """Applies dropout (section 4.2) to the inputs `x` of layer `name`.

        Training zeroes random inputs; testing (`keys` None) multiplies all inputs by the keep probability. With
        `inverted_dropout`, training divides by the keep probability instead. Each example's key draws the mask over all
        `width` inputs of the layer, and a device uses its shard of the mask.
        """
        kept, inverted = 1 - self.config.dropout, self.config.inverted_dropout
        if keys is None:
            return x if inverted else x * kept
        number = LAYERS.index(name)  # 6 for fc7: its inputs are the outputs of the sixth layer
        keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), kept, (width,)))(keys)
        x = jnp.where(local_feature_slice(keep, x.shape[-1]), x, jnp.zeros_like(x))
        return x / kept if inverted else x
