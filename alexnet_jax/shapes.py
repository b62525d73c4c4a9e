"""The sizes of the layers (figure 2 of the paper) by arithmetic on the settings: what each sees, has and gives."""

import dataclasses
import math
from typing import Any

CONVOLUTIONS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5')
DENSE = ('fc6', 'fc7', 'fc8')
LAYERS = CONVOLUTIONS + DENSE


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer with weights.

    output: (height, width, channels) or (units,) of one image, before pooling; pooled: after it.
    kernel: (height, width, inputs, outputs), inputs being the maps that one output sees; (inputs, outputs) if dense;
      and (output height, output width, inputs * height * width, outputs) where pixels do not share their weights.
    bias: (outputs,), or (output height, output width, outputs).
    """

    name: str
    kernel: tuple[int, ...]
    bias: tuple[int, ...]
    output: tuple[int, ...]
    pooled: tuple[int, ...]
    shared: bool = True

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return math.prod(self.kernel) + math.prod(self.bias)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one image's forward pass: every shared weight once for each pixel of the output."""
        return math.prod(self.kernel) * (math.prod(self.output[:-1]) if self.shared else 1)


def pool_window(model: Any) -> int:
    """Pixels a side (section 3.4): windows of 3, 2 pixels apart, overlap; those of 2 do not."""
    return 3 if model.overlapping_pool else 2


def ops_after(model: Any, name: str) -> list[str]:
    """What follows a convolution: of activation, lrn, spatial_norm, batch_norm and pool those that it has, in order.

    Of a layer that is left out (width 0) the pooling stays, so that those behind it keep their sizes.
    """
    steps = model.after_conv[CONVOLUTIONS.index(name)].split()
    if not model.widths[CONVOLUTIONS.index(name)]:
        return [step for step in steps if step == 'pool']
    return [step for step in steps if model.lrn or step not in ('lrn', 'spatial_norm')]


def layers(model: Any, crop_size: int, channels: int) -> list[Layer]:
    """The layers that the network has, from conv1 to fc8; those of width 0 are left out.

    Args:
      model: `model` of a resolved configuration.
      crop_size: pixels a side of the images.
      channels: of the images.
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
        elif table:  # the maps before a layer that is left out are pooled in its place
            table[-1] = dataclasses.replace(table[-1], pooled=(side, side, maps))
    units = side * side * maps
    for name, width in zip(DENSE, (*model.widths[5:], model.num_classes), strict=True):
        if width:
            inputs = units if name in model.exchange else units // model.towers
            table.append(Layer(name, (inputs, width), (width,), (width,), (width,)))
            units = width
    return table
