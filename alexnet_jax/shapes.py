"""Shapes of the layers (figure 2 of the paper), computed from the settings: inputs, parameters and outputs."""

import dataclasses
import math

from alexnet_jax.config_schema import ModelConfig

CONVOLUTIONS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5')
DENSE = ('fc6', 'fc7', 'fc8')
LAYERS = CONVOLUTIONS + DENSE


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Shapes of one layer with weights, for one image.

    Attributes:
      kernel: (height, width, inputs, outputs), where inputs counts the feature maps that one output sees; dense:
        (inputs, outputs); locally_connected: (output height, output width, inputs * height * width, outputs).
      bias: (outputs,); locally_connected: (output height, output width, outputs).
      output: (height, width, channels) or (units,), before pooling.
      pooled: same as `output`, after pooling.
      shared: whether all output pixels share their weights (False: a locally connected layer).
    """

    name: str
    kernel: tuple[int, ...]
    bias: tuple[int, ...]
    output: tuple[int, ...]
    pooled: tuple[int, ...]
    shared: bool = True

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return math.prod(self.kernel) + math.prod(self.bias)

    @property
    def multiply_adds(self) -> int:
        """Number of multiply-adds of one image's forward pass: each shared weight counts once per output pixel."""
        return math.prod(self.kernel) * (math.prod(self.output[:-1]) if self.shared else 1)


def pool_window(model: ModelConfig) -> int:
    """Returns the pooling window size in pixels (section 3.4): at stride 2, size 3 overlaps and size 2 does not."""
    return 3 if model.overlapping_pool else 2


def ops_after(model: ModelConfig, name: str) -> list[str]:
    """Returns the operations after a convolution in order, out of activation, lrn, spatial_lrn, batch_norm and pool.

    A layer that is left out (width 0) keeps its pooling, so that the later layers keep their sizes. `model.lrn` = False
    removes lrn and spatial_lrn.
    """
    steps = model.conv_ops[CONVOLUTIONS.index(name)].split()
    if not model.widths[CONVOLUTIONS.index(name)]:
        return [step for step in steps if step == 'pool']
    return [step for step in steps if model.lrn or step not in ('lrn', 'spatial_lrn')]


def layer_table(model: ModelConfig, crop_size: int, channels: int) -> list[LayerShape]:
    """Returns the layers of the network from conv1 to fc8, without those of width 0.

    Args:
      model: `model` of a resolved configuration.
      crop_size: height and width of the images in pixels.
      channels: number of image channels.
    """
    table = []
    side, maps = crop_size, channels
    for i, name in enumerate(CONVOLUTIONS):
        width, size = model.widths[i], model.kernel_sizes[i]
        output, inputs = side, maps
        if width:
            if name == 'conv1':
                output = (side + sum(model.conv1_padding) - size) // model.conv1_stride + 1
            elif name not in model.cross_tower:
                inputs = maps // model.towers
            maps = width
        side = output
        if 'pool' in ops_after(model, name):
            rest = output - pool_window(model)
            side = (-(-rest // 2) if model.pool_ceil_mode else rest // 2) + 1
        if width:
            shared, weights = name not in model.locally_connected, (size, size, inputs, width)
            kernel = weights if shared else (output, output, size * size * inputs, width)
            bias = (width,) if shared else (output, output, width)
            table.append(LayerShape(name, kernel, bias, (output, output, width), (side, side, width), shared))
        elif table:  # the pooling of a left-out layer applies to the previous layer
            table[-1] = dataclasses.replace(table[-1], pooled=(side, side, maps))
    units = side * side * maps
    for name, width in zip(DENSE, (*model.widths[5:], model.num_classes), strict=True):
        if width:
            inputs = units if name in model.cross_tower else units // model.towers
            table.append(LayerShape(name, (inputs, width), (width,), (width,), (width,)))
            units = width
    return table
