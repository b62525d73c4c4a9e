"""Shapes of the layers (figure 2 of the paper), computed from the settings: inputs, parameters and outputs."""

import dataclasses
import math
from typing import Any

CONVOLUTIONS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5')
DENSE = ('fc6', 'fc7', 'fc8')
LAYERS = CONVOLUTIONS + DENSE


@dataclasses.dataclass(frozen=True)
class Layer:
    """Shapes of one layer with weights, for one image.

    Attributes:
      kernel: (height, width, inputs, outputs), where inputs counts the feature maps that one output sees; dense:
        (inputs, outputs); unshared: (output height, output width, inputs * height * width, outputs).
      bias: (outputs,); unshared: (output height, output width, outputs).
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


def pool_window(model: Any) -> int:
    """Returns the pooling window size in pixels (section 3.4): at stride 2, size 3 overlaps and size 2 does not."""
    return 3 if model.overlapping_pool else 2


def ops_after(model: Any, name: str) -> list[str]:
    """Returns the operations after a convolution in order, out of activation, lrn, spatial_norm, batch_norm and pool.

    A layer that is left out (width 0) keeps its pooling, so that the later layers keep their sizes. `model.lrn` = False
    removes lrn and spatial_norm.
    """
    steps = model.after_conv[CONVOLUTIONS.index(name)].split()
    if not model.widths[CONVOLUTIONS.index(name)]:
        return [step for step in steps if step == 'pool']
    return [step for step in steps if model.lrn or step not in ('lrn', 'spatial_norm')]


def layers(model: Any, crop_size: int, channels: int) -> list[Layer]:
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
            elif name not in model.exchange:
                inputs = maps // model.towers
            maps = width
        side = output
        if 'pool' in ops_after(model, name):
            rest = output - pool_window(model)
            side = (-(-rest // 2) if model.pool_overhang else rest // 2) + 1
        if width:
            shared, weights = name not in model.unshared, (size, size, inputs, width)
            kernel = weights if shared else (output, output, size * size * inputs, width)
            bias = (width,) if shared else (output, output, width)
            table.append(Layer(name, kernel, bias, (output, output, width), (side, side, width), shared))
        elif table:  # the pooling of a left-out layer applies to the previous layer
            table[-1] = dataclasses.replace(table[-1], pooled=(side, side, maps))
    units = side * side * maps
    for name, width in zip(DENSE, (*model.widths[5:], model.num_classes), strict=True):
        if width:
            inputs = units if name in model.exchange else units // model.towers
            table.append(Layer(name, (inputs, width), (width,), (width,), (width,)))
            units = width
    return table
