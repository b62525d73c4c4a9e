"""Finds the layers of AlexNet in the operators of an ONNX file, and the preset whose network they compute.

The order, the attributes and the shapes of the operators decide, not the names, which optimizers of ONNX files change.
bvlcalexnet of the model zoo takes images of 224 pixels; those of Caffe have 227. Its feature maps of 54 x 54, 26 x 26
and 12 x 12 are not divided by the windows: the first two poolings drop the last row, the third, `ceil_pool`, does not.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_jax.config import Config, ConfigError, ModelConfig, apply_overrides, preset_config, resolve
from alexnet_jax.shapes import CONVOLUTIONS, LAYERS, POOLS, LayerSpec, Settings, layer_specs, pool_window
from alexnet_jax.weights.formats import FormatError
from alexnet_jax.weights.onnx_file import Node, OnnxFile, attributes, operator
from alexnet_jax.weights.weight_layouts import Weights

# Operators that change no number at inference. Those that reshape are checked.
_IGNORED = ('Identity', 'Dropout', 'Cast', 'Flatten', 'Reshape', 'Squeeze', 'AveragePool', 'Softmax', 'LogSoftmax')
_FLOATS = (1, 10, 11, 16)  # onnx.TensorProto.FLOAT, FLOAT16, DOUBLE and BFLOAT16
_ACTIVATIONS = {'Relu': 'relu', 'Tanh': 'tanh'}


@dataclasses.dataclass
class Layer:
    """An operator with weights, and the operators after it.

    Attributes:
      node: Conv, Gemm or MatMul.
      kernel: (outputs, inputs per group, height, width) or (outputs, inputs).
      bias: (outputs,), or None.
      factor: factor of the products with the kernel.
      followers: the operators after it: Relu, Tanh, LRN and MaxPool.
    """

    node: Node
    kernel: np.ndarray
    bias: np.ndarray | None
    factor: float = 1.0
    followers: list[Node] = dataclasses.field(default_factory=list)

    @property
    def weights(self) -> Weights:
        """The kernel and the bias with their names for messages. The bias exists, see find_layers()."""
        assert self.bias is not None
        where = operator(self.node)
        return Weights(f'{where} (kernel)', self.kernel, f'{where} (bias)', self.bias)


@dataclasses.dataclass(frozen=True)
class Network:
    """The network of an ONNX file.

    Attributes:
      layers: Conv and Gemm operators, by the names conv1 to fc8.
      preset: the preset that computes the same.
      settings: settings that differ from those of the preset, by dotted name.
    """

    layers: dict[str, Layer]
    preset: str
    settings: Settings


def find_network(file: OnnxFile, presets: Sequence[str], crop_size: int | None) -> Network:
    """Returns the network of `file`.

    Args:
      file: the content of the file.
      presets: the presets to compare it with; the first that fits is chosen.
      crop_size: height and width of the images; None: those of the graph or, if it leaves them open, of the preset.

    Raises FormatError: the file has another network than each of `presets`; the message says how it differs.
    """
    layers = find_layers(file)
    size = crop_size or _image_size(file)
    nearest: tuple[str, list[str]] | None = None
    for preset in presets:
        settings, differences = _compare(layers, preset, size)
        if not differences:
            return Network(layers, preset, settings)
        if nearest is None or len(differences) < len(nearest[1]):
            nearest = preset, differences
    assert nearest is not None
    preset, differences = nearest
    more = f' (and {len(differences) - 1} more differences)' if len(differences) > 1 else ''
    which = 'the preset' if len(presets) == 1 else 'the nearest preset,'
    raise FormatError(f'{file.described}: {which} {preset} does not compute the same: {differences[0]}{more}')


def find_layers(file: OnnxFile) -> dict[str, Layer]:
    """Returns the layers conv1 to fc8. Raises FormatError: an operator or the number of layers is not AlexNet's."""
    layers: list[Layer] = []
    for before, node in zip([None, *file.nodes], file.nodes, strict=False):
        if before is not None and node.input[0] != before.output[0]:
            raise _refusal(file, node, 'whose first input is a constant')
        given = attributes(node)
        if node.op_type in ('Conv', 'Gemm', 'MatMul'):
            layers.append(_layer(file, node, given))
        elif node.op_type == 'Add' and layers and layers[-1].bias is None and before is layers[-1].node:
            layers[-1].bias = _constant(file, node, 1).reshape(-1)
        elif node.op_type in ('Relu', 'Tanh', 'LRN', 'MaxPool') and layers:
            layers[-1].followers.append(node)
        elif node.op_type not in _IGNORED or not _changes_nothing(file, node, given):
            where = 'before the first layer; export the network without its preprocessing' if not layers else ''
            raise _refusal(file, node, where)
    kinds = ['conv' if layer.kernel.ndim == 4 else 'fc' for layer in layers]
    if kinds != ['conv'] * 5 + ['fc'] * 3:
        raise FormatError(
            f'{file.described}: not an AlexNet, which has five convolutions and then three dense layers; it has'
            f' {kinds.count("conv")} and {kinds.count("fc")}'
        )
    unbiased = next((layer for layer in layers if layer.bias is None), None)
    if unbiased is not None:
        raise _refusal(file, unbiased.node, 'without a bias')
    return dict(zip(LAYERS, layers, strict=True))


def _layer(file: OnnxFile, node: Node, given: Settings) -> Layer:
    kernel = _constant(file, node, 1)
    bias = _constant(file, node, 2).reshape(-1) if len(node.input) > 2 and node.input[2] else None
    if node.op_type == 'Conv':
        if kernel.ndim != 4:
            raise _refusal(file, node, f'with a kernel of {kernel.ndim} axes')
        return Layer(node, kernel, bias)
    if kernel.ndim != 2 or given.get('transA', 0) or given.get('beta', 1.0) != 1.0:
        raise _refusal(file, node, f'with a kernel of shape {kernel.shape}, transA or beta')
    return Layer(node, kernel if given.get('transB', 0) else kernel.T, bias, given.get('alpha', 1.0))


def _constant(file: OnnxFile, node: Node, position: int) -> np.ndarray:
    name = node.input[position] if len(node.input) > position else ''
    if name not in file.constants:
        raise _refusal(file, node, f'whose weights {name!r} are not in the file')
    return file.constants[name]


def _changes_nothing(file: OnnxFile, node: Node, given: Settings) -> bool:
    """Returns whether `node`, one of _IGNORED, keeps the numbers and their order."""
    if node.op_type == 'AveragePool':  # what adaptive pooling of 6 x 6 maps to 6 x 6 becomes
        return set(given['kernel_shape']) == {1} and set(given.get('strides', [1])) == {1}
    if node.op_type == 'Flatten':
        return given.get('axis', 1) == 1
    if node.op_type == 'Cast':
        return given['to'] in _FLOATS
    if node.op_type in ('Softmax', 'LogSoftmax'):
        return node is file.nodes[-1]  # the logits are its inputs
    if node.op_type == 'Reshape':
        shape = given.get('shape') or file.constants.get(node.input[1] if len(node.input) > 1 else '')
        return shape is None or len(shape) == 2  # exporters compute a dynamic shape from that of the input
    return True


def _refusal(file: OnnxFile, node: Node, why: str) -> FormatError:
    text = f'{operator(node)} {why}'.rstrip()
    return FormatError(f'{file.described}: not an AlexNet that can be imported: it has {text}')


def _image_size(file: OnnxFile) -> int | None:
    """Returns the height and width of the images, or None if the graph leaves them open. Raises FormatError."""
    if len(file.input_shape) not in (0, 4) or len(set(file.input_shape[2:])) > 1:
        shape = ' x '.join('?' if size is None else str(size) for size in file.input_shape)
        raise FormatError(f'{file.described}: its input is {shape}; images x channels x size x size is expected')
    return file.input_shape[2] if file.input_shape else None


def _compare(layers: dict[str, Layer], preset: str, size: int | None) -> tuple[Settings, list[str]]:
    """Returns the settings that `preset` needs for `layers`, by dotted name, and the remaining differences."""
    config = preset_config(preset)
    widths = tuple(len(layer.kernel) for layer in layers.values())
    settings: Settings = {'model.widths': widths[:7], 'model.num_classes': widths[7]}
    if size is not None and size != config.data.crop_size:
        settings |= {'data.crop_size': size, 'data.image_size': max(size, config.data.image_size)}
    apply_overrides(config, settings)
    try:
        resolved = resolve(config)
    except ConfigError as error:
        return {}, [str(error)]
    differences: list[str] = []
    rows = dict(zip(LAYERS, layer_specs(resolved.model), strict=True))
    conv_ops = _conv_ops(layers, rows, resolved, differences)
    for name, layer in layers.items():
        if name not in CONVOLUTIONS:
            ops = [node.op_type for node in layer.followers]
            wanted = [_operator_of(op, resolved.model) for op in rows[name].ops]
            _check(differences, layer, 'is followed by', ops, wanted)
        scaled = rows[name].dropout and not resolved.model.inverted_dropout
        _check(differences, layer, 'has the factor', layer.factor, 1 - resolved.model.dropout if scaled else 1.0)
    if conv_ops != resolved.model.conv_ops:
        settings['model.conv_ops'] = conv_ops
    return settings, differences


def _conv_ops(
    layers: dict[str, Layer], rows: dict[str, LayerSpec], config: Config, differences: list[str]
) -> tuple[str, ...]:
    """Returns `model.conv_ops` of the convolutions, and adds what differs from the preset to `differences`."""
    side, texts = config.data.crop_size, []
    for name, text in zip(CONVOLUTIONS, config.model.conv_ops, strict=True):
        layer, row, pools = layers[name], rows[name], []
        side = _compare_conv(layer, row, config.model, side, differences)
        own = [node.op_type for node in layer.followers]
        wanted = [_operator_of(op, config.model) for op in row.ops]
        if _activated_first(own) != _activated_first(wanted):
            _check(differences, layer, 'is followed by', own, wanted)
        for node in layer.followers:
            if node.op_type == 'LRN':
                _compare_lrn(node, config.model, differences)
            elif node.op_type == 'MaxPool':
                pool, side = _pool(node, config.model, side, differences)
                pools.append(pool)
        texts.append(' '.join(pools.pop(0) if op in POOLS and pools else op for op in text.split()))
    return tuple(texts)


def _activated_first(operators: list[str]) -> list[str]:
    """Exchanges a pooling and the activation after it: both functions increase, so their order changes no number."""
    ordered = list(operators)
    for i, (kind, after) in enumerate(itertools.pairwise(operators)):
        if kind == 'MaxPool' and after in _ACTIVATIONS:
            ordered[i : i + 2] = [after, kind]
    return ordered


def _compare_conv(layer: Layer, row: LayerSpec, model: ModelConfig, side: int, differences: list[str]) -> int:
    """Compares a convolution with its row. Returns the height of its outputs for inputs of the height `side`."""
    given = attributes(layer.node)
    pads = given.get('pads', [0] * 4)
    size = layer.kernel.shape[2]
    strides = list(given.get('strides', [1, 1]))
    _check(differences, layer, 'has auto_pad', _automatic(given), 'NOTSET')
    _check(differences, layer, 'has kernels of', list(layer.kernel.shape[2:]), [row.kernel] * 2)
    _check(differences, layer, 'has strides', strides, [row.stride] * 2)
    _check(differences, layer, 'has padding', list(pads), [row.padding[0]] * 2 + [row.padding[1]] * 2)
    _check(differences, layer, 'has groups', given.get('group', 1), 1 if row.cross_tower else model.towers)
    _check(differences, layer, 'has dilations', list(given.get('dilations', [1, 1])), [1, 1])
    return (side + pads[0] + pads[-1] - size) // strides[0] + 1


def _compare_lrn(node: Node, model: ModelConfig, differences: list[str]) -> None:
    given = attributes(node)
    own = {
        'size': given['size'],
        'alpha': given.get('alpha', 1e-4),  # ONNX divides alpha by the size
        'beta': given.get('beta', 0.75),
        'bias': given.get('bias', 1.0),
    }
    wanted = {
        'size': model.lrn_size,
        'alpha': model.lrn_alpha * model.lrn_size,
        'beta': model.lrn_beta,
        'bias': model.lrn_k,
    }
    for name, value in own.items():
        if not math.isclose(value, wanted[name], rel_tol=1e-5):  # ONNX has float32
            differences.append(f'{operator(node)} has {name} {value:.6g}, not {wanted[name]:.6g}')
    if model.towers > 1 and not model.lrn_across_towers:
        differences.append(f'{operator(node)} normalizes over the maps of all towers, not of each tower')


def _pool(node: Node, model: ModelConfig, side: int, differences: list[str]) -> tuple[str, int]:
    """Returns the name of the pooling in conv_ops, and the height of its outputs for inputs of the height `side`."""
    given, window = attributes(node), pool_window(model)
    pads = list(given.get('pads', [0] * 4))
    own = [list(given['kernel_shape']), list(given.get('strides', [1, 1])), pads[:2], _automatic(given)]
    wanted = [[window] * 2, [2, 2], [0, 0], 'NOTSET']
    rest = side + pads[-1] - window
    after = (-(-rest // 2) if given.get('ceil_mode', 0) else rest // 2) + 1
    sides = {op: (-(-(side - window) // 2) if over_edge else (side - window) // 2) + 1
             for op, over_edge in (('pool', model.pool_ceil_mode), ('ceil_pool', True))}  # fmt: skip
    if own != wanted or pads[2] != pads[3] or after not in sides.values():
        differences.append(
            f'{operator(node)} has windows of {own[0]}, strides {own[1]} and padding {pads}, not {wanted[0]}, [2, 2]'
            ' and [0, 0, 0, 0]'
        )
    return next((op for op in POOLS if sides[op] == after), 'pool'), after


def _operator_of(op: str, model: ModelConfig) -> str:
    if op == 'activation':
        return next(kind for kind, name in _ACTIVATIONS.items() if name == model.activation)
    return {'lrn': 'LRN', 'pool': 'MaxPool', 'ceil_pool': 'MaxPool'}.get(op, op)


def _automatic(given: Settings) -> str:
    """Returns auto_pad; VALID means no padding, as the default does."""
    value = given.get('auto_pad', b'NOTSET').decode()
    return 'NOTSET' if value == 'VALID' else value


def _check(differences: list[str], layer: Layer, what: str, own: Any, wanted: Any) -> None:
    if own != wanted:
        differences.append(f'{operator(layer.node)} {what} {_text(own)}, not {_text(wanted)}')


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], str):
        return ', '.join(value)
    return 'nothing' if value == [] else str(value)
