"""Builds the network as an ONNX graph of standard operators in (B, C, H, W) layout.

The channels of the towers are concatenated, so a convolution within each tower is a grouped convolution. The graph
computes in float32, regardless of the network's dtype, because few runtimes support bfloat16 convolutions.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from jaxtyping import Float32
from numpy.typing import ArrayLike, DTypeLike

from alexnet_jax.config import Config
from alexnet_jax.model import BATCH_NORM, SPATIAL_BETA, SPATIAL_K
from alexnet_jax.shapes import POOLS, LayerShape, layer_table, pool_window, pools_over_edge
from alexnet_jax.weights.weight_layouts import Parameters

# Opset 15 is from 2021, so current runtimes support it. Later opsets only add dtypes to the operators used here.
OPSET = 15


def build(
    config: Config,
    params: Parameters,
    batch_statistics: Parameters,
    mean: Float32[np.ndarray, 'crop crop c'],
    scale: Float32[np.ndarray, ' c'],
) -> onnx.ModelProto:
    """Builds a model: `images` (batch, crop_size, crop_size, channels) uint8 to `logits` (batch, num_classes) float32.

    Args:
      config: Resolved configuration.
      params, batch_statistics: As in training.state.TrainState, with NumPy arrays.
      mean: Mean image, which the graph subtracts from the images.
      scale: Factor of each channel after the subtraction.
    """
    graph = _Graph(config, params, batch_statistics)
    graph.preprocess(mean, scale)
    for layer in layer_table(config.model, config.data.crop_size, config.data.channels):
        if layer.spec.kernel:
            graph.conv(layer)
        else:
            graph.dense(layer)
        for i, op in enumerate(layer.spec.ops):
            repeated = f'_{i}' if op in layer.spec.ops[:i] else ''  # node names are unique
            graph.apply(op, layer.name, f'{layer.name}_{op}{repeated}')
    shape = ('batch', config.data.crop_size, config.data.crop_size, config.data.channels)
    images = onnx.helper.make_tensor_value_info('images', onnx.TensorProto.UINT8, shape)
    logits = onnx.helper.make_tensor_value_info('logits', onnx.TensorProto.FLOAT, ('batch', config.model.num_classes))
    opset = onnx.helper.make_opsetid('', OPSET)
    return onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, config.model.preset, [images], [logits], graph.arrays),
        producer_name='alexnet_jax',
        opset_imports=[opset],
        ir_version=onnx.helper.find_min_ir_version_for([opset]),
    )


class _Graph:
    """Graph under construction. `x` is the name of the last output; `shape` is (C, H, W) or (units,) of that output."""

    def __init__(self, config: Config, params: Parameters, batch_statistics: Parameters):
        self.model, self.params, self.batch_statistics = config.model, params, batch_statistics
        self.shape: tuple[int, ...] = (config.data.channels, config.data.crop_size, config.data.crop_size)
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: list[onnx.TensorProto] = []
        self.x = 'images'

    def array(self, name: str, value: ArrayLike, dtype: DTypeLike = np.float32) -> str:
        """Adds a constant and returns its name."""
        self.arrays.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def node(self, kind: str, output: str, *constants: str, **attributes: object) -> str:
        """Adds an operator with the inputs `x` and `constants`. Its output becomes `x`. Returns the output's name."""
        inputs, self.x = [self.x, *constants], output
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def reshape(self, output: str, shape: Sequence[int]) -> None:
        """Reshapes `x` to `shape`; -1 stands for the batch dimension."""
        self.node('Reshape', output, self.array(f'{output}_shape', shape, np.int64))

    def preprocess(self, mean: Float32[np.ndarray, 'crop crop c'], scale: Float32[np.ndarray, ' c']) -> None:
        """Transposes the images to (B, C, H, W), subtracts the mean and multiplies by the scale."""
        self.node('Transpose', 'images_by_channel', perm=[0, 3, 1, 2])
        self.node('Cast', 'images_float', to=onnx.TensorProto.FLOAT)
        self.node('Sub', 'images_centered', self.array('mean', mean.transpose(2, 0, 1)))
        self.node('Mul', 'inputs', self.array('scale', scale[:, None, None]))

    def conv(self, layer: LayerShape) -> None:
        """Adds one convolution, shared or locally connected, with its bias."""
        name, spec, (before, after) = layer.name, layer.spec, layer.spec.padding
        pads = [before, before, after, after]
        windows = {'kernel_shape': [spec.kernel] * 2, 'strides': [spec.stride] * 2, 'pads': pads}
        groups = 1 if spec.cross_tower else self.model.towers
        kernel, bias = self.params[name]['kernel'], self.params[name]['bias']
        height, width, outputs = layer.output
        if not spec.locally_connected:
            arrays = self.array(f'{name}.kernel', kernel.transpose(3, 2, 0, 1)), self.array(f'{name}.bias', bias)
            self.node('Conv', name, *arrays, group=groups, **windows)
        else:
            inputs = layer.kernel[2]
            self.cut_windows(f'{name}_windows', windows)  # (B, groups * inputs, H', W')
            self.reshape(f'{name}_windows_by_tower', (-1, groups, inputs, height, width))
            self.node('Transpose', f'{name}_windows_by_pixel', perm=[3, 4, 1, 0, 2])  # for one matmul per pixel
            matrices = kernel.reshape(height, width, inputs, groups, outputs // groups).transpose(0, 1, 3, 2, 4)
            self.node('MatMul', f'{name}_by_pixel', self.array(f'{name}.kernel', matrices))
            self.node('Transpose', f'{name}_by_tower', perm=[3, 2, 4, 0, 1])
            self.reshape(f'{name}_products', (-1, outputs, height, width))
            self.node('Add', name, self.array(f'{name}.bias', bias.transpose(2, 0, 1)))
        self.shape = (outputs, height, width)

    def cut_windows(self, output: str, windows: Mapping[str, Sequence[int]]) -> None:
        """Turns the pixels of each window into channels, grouped by input channel (im2col as a one-hot convolution)."""
        maps, (rows, columns) = self.shape[0], windows['kernel_shape']
        ones = np.tile(np.eye(rows * columns).reshape(-1, 1, rows, columns), (maps, 1, 1, 1))
        self.node('Conv', output, self.array(f'{output}_ones', ones), group=maps, **windows)

    def apply(self, op: str, name: str, output: str) -> None:
        """Adds the operation `op` of shapes.LayerSpec, which follows the layer `name`, as a node named `output`."""
        model = self.model
        if op == 'activation':
            self.node({'relu': 'Relu', 'tanh': 'Tanh'}[model.activation], output)
            return
        maps, height, width = self.shape
        if op == 'lrn':
            towers = 1 if model.lrn_across_towers else model.towers
            if towers > 1:  # each tower becomes a separate image
                self.reshape(f'{name}_towers', (-1, maps // towers, height, width))
            n, alpha = model.lrn_size, model.lrn_alpha * model.lrn_size  # ONNX divides alpha by the size
            self.node('LRN', output, size=n, alpha=alpha, beta=model.lrn_beta, bias=model.lrn_k)
            if towers > 1:
                self.reshape(f'{name}_both', (-1, maps, height, width))
        elif op == 'spatial_lrn':
            self.spatial_lrn(output)
        elif op == 'batch_norm':
            mean, variance = (self.batch_statistics[f'{name}_norm'][kind] for kind in ('mean', 'var'))
            arrays = {'scale': np.ones(maps), 'bias': np.zeros(maps), 'mean': mean, 'var': variance}
            names = [self.array(f'{name}_norm.{kind}', array) for kind, array in arrays.items()]
            self.node('BatchNormalization', output, *names, epsilon=BATCH_NORM['epsilon'])
        elif op in POOLS:
            window = pool_window(model)
            missing = (window - height) % 2 if pools_over_edge(model, op) else 0
            self.node('MaxPool', output, kernel_shape=[window] * 2, strides=[2] * 2, pads=[0, 0, missing, missing])
            side = (height + missing - window) // 2 + 1
            self.shape = (maps, side, side)

    def spatial_lrn(self, output: str) -> None:
        """Adds x / (k + alpha * sum of the squares in the spatial window) ** beta."""
        n, x = self.model.spatial_lrn_size, self.x
        self.node('Mul', f'{output}_squares', x)
        self.node('AveragePool', f'{output}_means', kernel_shape=[n] * 2, pads=[n // 2] * 4, count_include_pad=1)
        self.node('Mul', f'{output}_sums', self.array(f'{output}_alpha', self.model.spatial_lrn_alpha * n * n))
        self.node('Add', f'{output}_denominator', self.array(f'{output}_k', SPATIAL_K))
        self.node('Pow', f'{output}_factor', self.array(f'{output}_power', -SPATIAL_BETA))
        self.node('Mul', output, x)

    def dense(self, layer: LayerShape) -> None:
        """Adds one dense layer. Without inverted dropout, its kernel products are scaled by the keep probability."""
        name, model = layer.name, self.model
        towers = 1 if layer.spec.cross_tower else model.towers
        kernel, bias = self.params[name]['kernel'], self.params[name]['bias']
        if len(self.shape) == 3:  # kernel rows are in (H, W, C) order
            maps, height, width = self.shape
            self.node('Flatten', f'{name}_inputs')
            kernel = kernel.reshape(height, width, maps // towers, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
        scaled = layer.spec.dropout and not model.inverted_dropout
        kept = 1 - model.dropout if scaled else 1.0
        output = 'logits' if name == 'fc8' else name
        if towers == 1:
            self.node(
                'Gemm', output, self.array(f'{name}.kernel', kernel), self.array(f'{name}.bias', bias), alpha=kept
            )
        else:
            self.dense_towers(name, output, np.split(kernel, towers, -1), np.split(bias, towers), kept)
        self.shape = (layer.output[0],)

    def dense_towers(
        self, name: str, output: str, kernels: list[np.ndarray], biases: list[np.ndarray], kept: float
    ) -> None:
        """Adds one dense layer per tower and concatenates the outputs."""
        parts = [f'{output}_inputs_{i}' for i in range(len(kernels))]
        self.nodes.append(onnx.helper.make_node('Split', [self.x], parts, name=f'{output}_split', axis=1))
        outputs = []
        for i, (part, kernel, bias) in enumerate(zip(parts, kernels, biases, strict=True)):
            self.x = part
            arrays = self.array(f'{name}.kernel_{i}', kernel), self.array(f'{name}.bias_{i}', bias)
            outputs.append(self.node('Gemm', f'{output}_{i}', *arrays, alpha=kept))
        self.x = outputs[0]
        self.node('Concat', output, *outputs[1:], axis=1)
