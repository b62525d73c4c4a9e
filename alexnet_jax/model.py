"""AlexNet as in section 3 of the paper, with its two towers, and the published variants."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Key

from alexnet_jax.config import ModelConfig
from alexnet_jax.layers import local_response_norm, max_pool, within_channel_lrn
from alexnet_jax.parallel import local_feature_slice, redistribute_features
from alexnet_jax.shapes import LAYERS, POOLS, layer_table, pool_window, pools_over_edge
from alexnet_jax.weight_layers import Conv, Dense, Towers, regroup_channels

# Constants of the original program for the second normalization of layer 2; the window and alpha are settings.
SPATIAL_K, SPATIAL_BETA = 1.0, 0.75
# Batch normalization as in nvcaffe, without scale and bias; evaluation uses the running statistics.
BATCH_NORM = {'use_scale': False, 'use_bias': False, 'momentum': 0.9, 'epsilon': 1e-5}


class AlexNet(nnx.Module):
    """The layers of shapes.layer_specs(), applied in order: in the paper five convolutional and three fully connected.

    Args:
      config: `model` of a resolved configuration.
      crop_size: height and width of the images in pixels, 224 in the paper.
      channels: number of image channels, 3 or 1.
      rngs: random streams; `params` draws the initial parameters.
      statistics_axes: mesh axes over which batch normalization averages its statistics in training.
      remat: whether to rematerialize in training: each convolution and the operations after it save only their inputs,
        and the backward pass recomputes them.
      frozen: the layers that are not trained. Batch normalization after them uses its running statistics in training
        too, and does not update them.
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
        frozen: frozenset[str] = frozenset(),
    ):
        table = layer_table(config, crop_size, channels)
        self.config, self.remat, self.specs = config, remat, tuple(shape.spec for shape in table)
        self.frozen, self.image_shape = frozen, (crop_size, crop_size, channels)
        self.conv_features = next(spec.features for spec in reversed(self.specs) if spec.kernel)
        for shape in table:
            setattr(self, shape.name, (Conv if shape.spec.kernel else Dense)(shape, config, rngs))
            if 'batch_norm' in shape.spec.ops:
                norm = nnx.BatchNorm(shape.spec.features, axis_name=statistics_axes, rngs=rngs, **BATCH_NORM)
                setattr(self, f'{shape.name}_norm', norm)

    def __call__(
        self, images: Float32[Array, 'b s s c'], dropout_keys: Key[Array, ' keys'] | None = None
    ) -> Float32[Array, 'b classes']:
        """Returns the logits of `images`.

        `dropout_keys` selects training mode: dropout, and batch normalization by the statistics of the batch, except
        after `frozen` layers. There is one key per example in this device's dense layers: B keys, in `hybrid` B * model
        keys. None selects test mode: the scaling of dropout(), and batch normalization by the running statistics.
        """
        logits = self.activations(images, dropout_keys)['fc8']
        return redistribute_features(logits, self.config.num_classes, 'logits').astype(jnp.float32)

    def activations(
        self, images: Float32[Array, 'b s s c'], dropout_keys: Key[Array, ' keys'] | None = None
    ) -> dict[str, Float[Array, '...']]:
        """Returns this device's shard of each layer's output after the nonlinearity: (B, H, W, C) or (B, units).

        Raises ValueError: the images have another size or other channels than the network.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f'images: the shape is {images.shape}, not (B, {", ".join(map(str, self.image_shape))})')
        training, outputs = dropout_keys is not None, {}
        towers = [images.astype(self.config.dtype)]  # (B, 224, 224, 3)
        # One array per tower, or one array of all towers. In the preset `paper` on one device, the loop computes
        #   conv1     (B, 55, 55,  96), pooled    (B, 27, 27,  96)
        #   conv2  2x (B, 27, 27, 128), pooled 2x (B, 13, 13, 128)
        #   conv3     (B, 13, 13, 384)
        #   conv4  2x (B, 13, 13, 192)
        #   conv5  2x (B, 13, 13, 128), pooled 2x (B,  6,  6, 128)
        #   fc6       (B, 4096)
        #   fc7       (B, 4096)
        #   fc8       (B, 1000)
        for spec in self.specs:
            layer, norm = getattr(self, spec.name), getattr(self, f'{spec.name}_norm', None)
            towers = self.layer_inputs(layer, towers)
            if spec.dropout:
                towers = self.dropout(layer, towers, dropout_keys)
            block = partial(apply_layer, self.config, training and spec.name not in self.frozen)
            if self.remat and training and spec.kernel:
                block = nnx.remat(block)
            towers, outputs[spec.name] = block(layer, norm, towers)
        return outputs

    def layer_inputs(self, layer: Conv | Dense, towers: Towers) -> Towers:
        """Returns the inputs of `layer`: one array of the features of all towers for `cross_tower`, otherwise `towers`.

        Feature maps are flattened for a dense layer: (B, 6, 6, 256) becomes (B, 9216).
        """
        spec, flatten = layer.spec, towers[0].ndim == 4 and not layer.spec.kernel
        if not spec.cross_tower:
            return [x.reshape(x.shape[0], -1) for x in regroup_channels(towers, layer.groups)] if flatten else towers
        x = jnp.concatenate(towers, -1)
        if flatten:
            x = redistribute_features(x, self.conv_features, spec.name)
            x = x.reshape(x.shape[0], -1)
        return [redistribute_features(x, layer.in_features, spec.name)]

    def dropout(self, layer: Conv | Dense, towers: Towers, keys: Key[Array, ' keys'] | None) -> Towers:
        """Applies dropout (section 4.2) to the inputs of `layer`, (B, inputs).

        Training zeroes random inputs. Testing (`keys` is None) multiplies all inputs by the keep probability; with
        `inverted_dropout`, training divides the inputs by the keep probability instead. The key of an example
        determines the mask over all inputs of the layer, of which each device uses its shard.
        """
        kept, inverted = 1 - self.config.dropout, self.config.inverted_dropout
        x = jnp.concatenate(towers, -1)
        if keys is None:
            x = x if inverted else x * kept
        else:
            width = layer.global_in_features * (1 if layer.spec.cross_tower else self.config.towers)
            number = LAYERS.index(layer.spec.name)  # 6 for fc7: its inputs are the outputs of the sixth layer
            keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), kept, (width,)))(keys)
            x = jnp.where(local_feature_slice(keep, x.shape[-1]), x, jnp.zeros_like(x))
            x = x / kept if inverted else x
        return regroup_channels([x], len(towers))


def apply_layer(
    config: ModelConfig, training: bool, layer: Conv | Dense, norm: nnx.BatchNorm | None, towers: Towers
) -> tuple[Towers, Float[Array, '...']]:
    """Applies `layer` and the operations after it: the function that `remat` recomputes in the backward pass.

    Returns the result of the last operation, and the output of the nonlinearity or, without one, of `layer`.
    """
    spec = layer.spec
    with jax.named_scope(spec.name), matmul_precision(config):
        towers = output = layer(towers)
    for op in spec.ops:
        with jax.named_scope(f'{spec.name}/{op}'):
            if op == 'activation':  # section 3.1
                function = {'relu': jax.nn.relu, 'tanh': jnp.tanh}[config.activation]
                towers = output = [function(x) for x in towers]
            elif op == 'lrn':  # section 3.3
                towers = lrn(towers, layer.tower_features, config)
            elif op == 'spatial_lrn':
                towers = [spatial_lrn(x, config) for x in towers]
            elif op == 'batch_norm' and norm is not None:
                x = norm(jnp.concatenate(towers, -1).astype(jnp.float32), use_running_average=not training)
                towers = jnp.split(x.astype(towers[0].dtype), len(towers), -1)
            elif op in POOLS:  # section 3.4
                towers = [max_pool(x, pool_window(config), 2, ceil_mode=pools_over_edge(config, op)) for x in towers]
    return towers, jnp.concatenate(output, -1)


def matmul_precision(config: ModelConfig) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which convolutions and matrix products are traced with config.precision.

    'default' leaves the choice to JAX_DEFAULT_MATMUL_PRECISION and to XLA. Gradients have the precision of the forward
    pass; only custom gradients, which are traced later, need the context around jax.grad().
    """
    return contextlib.nullcontext() if config.precision == 'default' else jax.default_matmul_precision(config.precision)


def lrn(towers: Towers, tower_features: int, config: ModelConfig) -> Towers:
    """Applies local response normalization (section 3.3) within each tower or, as in Caffe, across towers."""
    norm = partial(local_response_norm, k=config.lrn_k, n=config.lrn_size, alpha=config.lrn_alpha, beta=config.lrn_beta)
    if config.lrn_across_towers:
        return jnp.split(norm(jnp.concatenate(towers, -1)), len(towers), -1)
    return [norm(x.reshape(*x.shape[:-1], -1, tower_features)).reshape(x.shape) for x in towers]


def spatial_lrn(x: Float[Array, 'b h w c'], config: ModelConfig) -> Float[Array, 'b h w c']:
    """Applies the original program's second normalization, over neighboring pixels within each feature map."""
    return within_channel_lrn(
        x, k=SPATIAL_K, n=config.spatial_lrn_size, alpha=config.spatial_lrn_alpha, beta=SPATIAL_BETA
    )
