"""The network as a table of rows, one LayerSpec per layer, and the shapes computed from the rows (figure 2)."""

import dataclasses
import math
from typing import Any

from alexnet_jax.config_schema import CONVOLUTIONS, DENSE, Config, ModelConfig

Settings = dict[str, Any]  # values of configuration fields by name

LAYERS = CONVOLUTIONS + DENSE
POOLS = ('pool', 'ceil_pool')  # the operations that pool


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One row of the network: a layer with weights, and the operations after it.

    Attributes:
      name: one of LAYERS.
      features: number of feature maps or units over all towers; 0 in a preset without the layer.
      kernel: height and width of the kernels in pixels; 0 for a fully connected layer.
      stride: stride of a convolution in pixels.
      padding: number of zeros (before, after) the rows and the columns of the inputs.
      cross_tower: whether the layer reads the features of all towers; otherwise each tower reads only its own.
      locally_connected: whether a convolution has separate weights at each pixel.
      ops: the operations after the layer, in order: activation, lrn, spatial_lrn, batch_norm, pool, ceil_pool.
      dropout: whether dropout applies to the inputs of the layer.
      kernel_std: standard deviation of the initial kernel.
      bias_init: initial bias.
    """

    name: str
    features: int
    kernel: int = 0
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    cross_tower: bool = False
    locally_connected: bool = False
    ops: tuple[str, ...] = ('activation',)
    dropout: bool = False
    kernel_std: float = 0.01
    bias_init: float = 0.0


def layer_specs(model: ModelConfig) -> tuple[LayerSpec, ...]:
    """Returns the rows of the network from conv1 to fc8, without those of width 0.

    The pooling of a convolution of width 0 moves to the previous row, so that the later layers keep their sizes. If
    `model.lrn` is False, the rows have neither lrn nor spatial_lrn.
    """
    disabled = () if model.lrn else ('lrn', 'spatial_lrn')
    rows: list[LayerSpec] = []
    for i, features in enumerate((*model.widths, model.num_classes)):
        row = LayerSpec(
            LAYERS[i],
            features,
            cross_tower=i == 0 or LAYERS[i] in model.cross_tower,
            ops=() if LAYERS[i] == 'fc8' else ('activation',),
            dropout=LAYERS[i] in model.dropout_on_inputs_of,
            kernel_std=model.kernel_std[i],
            bias_init=model.bias_init[i],
        )
        if row.name in CONVOLUTIONS:
            size = model.kernel_sizes[i]
            row = dataclasses.replace(
                row,
                kernel=size,
                stride=1 if i else model.conv1_stride,
                padding=(size // 2, (size - 1) // 2) if i else model.conv1_padding,
                locally_connected=row.name in model.locally_connected,
                ops=tuple(op for op in model.conv_ops[i].split() if op not in disabled),
            )
        if features:
            rows.append(row)
        elif pools := tuple(op for op in row.ops if op in POOLS):
            rows[-1] = dataclasses.replace(rows[-1], ops=rows[-1].ops + pools)
    return tuple(rows)


def layer_fields(rows: tuple[LayerSpec, ...]) -> Settings:
    """Returns the per-layer fields of ModelConfig for eight `rows`, conv1 to fc8: the inverse of layer_specs()."""
    convolutions = rows[: len(CONVOLUTIONS)]
    return {
        'widths': tuple(row.features for row in rows[:-1]),
        'num_classes': rows[-1].features,
        'kernel_sizes': tuple(row.kernel for row in convolutions),
        'conv1_stride': rows[0].stride,
        'conv1_padding': rows[0].padding,
        'locally_connected': tuple(row.name for row in rows if row.locally_connected),
        'cross_tower': tuple(row.name for row in rows[1:] if row.cross_tower),  # conv1 reads the image
        'conv_ops': tuple(' '.join(row.ops) for row in convolutions),
        'dropout_on_inputs_of': tuple(row.name for row in rows if row.dropout),
        'kernel_std': tuple(row.kernel_std for row in rows),
        'bias_init': tuple(row.bias_init for row in rows),
    }


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Shapes of one layer with weights, for one image.

    Attributes:
      spec: the row of the layer.
      kernel: (height, width, inputs, outputs), where `inputs` counts the feature maps that each output reads; dense:
        (inputs, outputs); locally connected: (output height, output width, inputs * height * width, outputs).
      bias: (outputs,); locally connected: (output height, output width, outputs).
      output: (height, width, channels) or (units,), before pooling.
      pooled: shape of the output after pooling.
    """

    spec: LayerSpec
    kernel: tuple[int, ...]
    bias: tuple[int, ...]
    output: tuple[int, ...]
    pooled: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the layer, one of LAYERS."""
        return self.spec.name

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return math.prod(self.kernel) + math.prod(self.bias)

    @property
    def multiply_adds(self) -> int:
        """Number of multiply-adds of one image's forward pass; a shared weight counts once per output pixel."""
        return math.prod(self.kernel) * (1 if self.spec.locally_connected else math.prod(self.output[:-1]))


def pool_window(model: ModelConfig) -> int:
    """Returns the size of the pooling windows (section 3.4): at stride 2, windows of 3 pixels overlap."""
    return 3 if model.overlapping_pool else 2


def pools_over_edge(model: ModelConfig, op: str) -> bool:
    """Returns whether `op`, one of POOLS, has a last window that extends over the edge."""
    return model.pool_ceil_mode or op == 'ceil_pool'


def layer_table(model: ModelConfig, crop_size: int, channels: int) -> list[LayerShape]:
    """Returns the shapes of the layers of layer_specs().

    Args:
      model: `model` of a resolved configuration.
      crop_size: height and width of the images in pixels.
      channels: number of image channels.
    """
    table: list[LayerShape] = []
    inputs: tuple[int, ...] = (crop_size, crop_size, channels)
    for spec in layer_specs(model):
        towers = 1 if spec.cross_tower else model.towers
        bias: tuple[int, ...] = (spec.features,)
        if spec.kernel:
            side = (inputs[0] + sum(spec.padding) - spec.kernel) // spec.stride + 1
            kernel: tuple[int, ...] = (spec.kernel, spec.kernel, inputs[-1] // towers, spec.features)
            output: tuple[int, ...] = (side, side, spec.features)
            if spec.locally_connected:
                kernel, bias = (side, side, math.prod(kernel[:3]), spec.features), output
        else:
            kernel, output = (math.prod(inputs) // towers, spec.features), bias
        pooled = output
        for op in spec.ops:
            if op in POOLS:
                rest = pooled[0] - pool_window(model)
                side = (-(-rest // 2) if pools_over_edge(model, op) else rest // 2) + 1
                pooled = (side, side, spec.features)
        table.append(LayerShape(spec, kernel, bias, output, pooled))
        inputs = pooled
    return table


def grad_allreduce_dtype(config: Config, layer: str, kind: str, platform: str) -> str:
    """Returns the dtype in which the gradient of a parameter is all-reduced or reduce-scattered.

    If mesh.grad_allreduce_dtype is 'auto', the dtype is float32. One gradient is an exception: on GPUs, that of the
    kernel of a bfloat16 convolution is bfloat16, because cuDNN returns it in bfloat16 and float32 would only double the
    bytes. The sum over micro-batches is float32 on every platform.

    Args:
      config: resolved configuration.
      layer: one of LAYERS.
      kind: 'kernel' or 'bias'.
      platform: of the devices; see layers.platform().
    """
    if config.mesh.grad_allreduce_dtype != 'auto':
        return config.mesh.grad_allreduce_dtype
    is_kernel = layer in CONVOLUTIONS and kind == 'kernel'
    is_rounded = is_kernel and platform == 'gpu' and config.train.grad_accum_steps == 1
    return config.model.dtype if is_rounded else 'float32'
