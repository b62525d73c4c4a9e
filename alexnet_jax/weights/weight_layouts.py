"""Converts the names and layouts of torchvision, Caffe and this project's files to parameters of the network.

PyTorch and Caffe have kernels (outputs, inputs, height, width) and flatten feature maps before fc6 in (C, H, W) order.
This project has kernels (height, width, inputs, outputs) and flattens in (H, W, C) order. Caffe's images are BGR.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float32

from alexnet_jax.config import Config
from alexnet_jax.shapes import CONVOLUTIONS, LAYERS, LayerShape, layer_table
from alexnet_jax.weights.formats import FormatError

TORCHVISION = {
    'conv1': 'features.0',
    'conv2': 'features.3',
    'conv3': 'features.6',
    'conv4': 'features.8',
    'conv5': 'features.10',
    'fc6': 'classifier.1',
    'fc7': 'classifier.4',
    'fc8': 'classifier.6',
}


Parameters = dict[str, dict[str, np.ndarray]]  # by layer and kind, such as ['conv1']['kernel']


@dataclasses.dataclass
class Weights:
    """Kernel and bias of one layer in the layout of the file, each with its name in the file."""

    kernel_name: str
    kernel: np.ndarray
    bias_name: str
    bias: np.ndarray


def from_torchvision(tensors: Mapping[str, np.ndarray]) -> dict[str, Weights]:
    """Returns the weights of each layer from a state dict of torchvision's `alexnet`; prefixes of wrappers are ignored.

    Raises FormatError: missing or unexpected tensors.
    """
    names = {_without_wrappers(name): name for name in tensors}
    first = f'{TORCHVISION["conv1"]}.weight'
    prefix = next((name.removesuffix(first) for name in names if f'.{name}'.endswith(f'.{first}')), '')
    wanted = {f'{prefix}{module}.{kind}' for module in TORCHVISION.values() for kind in ('weight', 'bias')}
    _check_names([name.removeprefix(prefix) for name in names], {name.removeprefix(prefix) for name in wanted})

    def of(module: str) -> Weights:
        kernel, bias = (names[f'{prefix}{module}.{kind}'] for kind in ('weight', 'bias'))
        return Weights(kernel, tensors[kernel], bias, tensors[bias])

    return {layer: of(module) for layer, module in TORCHVISION.items()}


def _without_wrappers(name: str) -> str:
    """Removes the prefixes of DataParallel and torch.compile from the name of a parameter."""
    return '.'.join(part for part in name.split('.') if part not in ('module', '_orig_mod'))


def from_caffe(blobs: Mapping[str, list[np.ndarray]]) -> dict[str, Weights]:
    """Returns the weights of each layer of a Caffe network.

    Fine-tuned networks may rename fc8: if fc8 is missing, the only layer with an unknown name replaces it.

    Raises FormatError: missing or unexpected layers or blobs.
    """
    others = [name for name in blobs if name not in LAYERS]
    names = {layer: layer for layer in LAYERS}
    if 'fc8' not in blobs and len(others) == 1:
        names['fc8'] = others[0]
    _check_names(blobs, set(names.values()))
    for name, arrays in blobs.items():
        if len(arrays) != 2:
            raise FormatError(f'{name} has {len(arrays)} blobs; a kernel and a bias are expected')
    return {
        layer: Weights(f'{name} (kernel)', _squeezed(blobs[name][0], layer), f'{name} (bias)', blobs[name][1].ravel())
        for layer, name in names.items()
    }


def _squeezed(kernel: np.ndarray, layer: str) -> np.ndarray:
    """Removes the two leading axes of size 1 that older Caffe files have in dense kernels."""
    is_dense = layer not in CONVOLUTIONS and kernel.ndim == 4 and kernel.shape[:2] == (1, 1)
    return kernel[0, 0] if is_dense else kernel


def _check_names(found: Iterable[str], wanted: set[str]) -> None:
    missing, others = wanted - set(found), set(found) - wanted
    has = f'it has {_some(others)}, which no layer of AlexNet has'
    if missing:
        raise FormatError(f'it lacks {_some(missing)}{f"; {has}" if others else ""}')
    if others:
        raise FormatError(has)


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    return ', '.join(ordered[:3]) + (f' and {len(ordered) - 3} more' if len(ordered) > 3 else '')


def widths(found: Mapping[str, Weights]) -> tuple[int, ...]:
    """Returns the number of outputs of conv1 to fc8, from the sizes of the biases."""
    return tuple(found[layer].bias.size for layer in LAYERS)


def parameters(layer: LayerShape, weights: Weights, maps: tuple[int, ...], is_bgr: bool) -> dict[str, np.ndarray]:
    """Converts imported weights to the float32 kernel and bias of `layer` in this project's layout.

    Args:
      layer: Layer of the network.
      weights: Weights in the layout of PyTorch or Caffe.
      maps: Shape (height, width, channels) of the feature maps that fc6 flattens.
      is_bgr: Whether the input channels of conv1 are BGR.

    Raises FormatError: shapes do not match the layer, or numbers are not floating point or not finite.
    """
    wanted = layer.kernel[-1:] + layer.kernel[-2:-1] + layer.kernel[:-2]
    if weights.kernel.shape != wanted:
        swapped = ', which has the axes in another order' * (sorted(weights.kernel.shape) == sorted(wanted))
        raise FormatError(f'{weights.kernel_name} has shape {weights.kernel.shape}{swapped}; {wanted} is expected')
    if weights.bias.shape != layer.bias:
        raise FormatError(f'{weights.bias_name} has shape {weights.bias.shape}; {layer.bias} is expected')
    kernel = weights.kernel
    if layer.name == 'fc6':
        kernel = kernel.reshape(-1, maps[2], *maps[:2]).transpose(2, 3, 1, 0)
    elif layer.name in CONVOLUTIONS:
        kernel = kernel.transpose(2, 3, 1, 0)
        if layer.name == 'conv1' and is_bgr:
            kernel = kernel[:, :, ::-1]
    else:
        kernel = kernel.T
    return {
        'kernel': _float32(kernel, weights.kernel_name).reshape(layer.kernel),
        'bias': _float32(weights.bias, weights.bias_name),
    }


def _float32(array: np.ndarray, name: str) -> Float32[np.ndarray, '...']:
    """Returns a float32 copy in C order. Raises FormatError: not floating point, or not finite in float32."""
    if array.dtype.kind not in 'fV':  # NumPy kind of bfloat16: V
        raise FormatError(f'{name} has dtype {array.dtype}; a floating-point dtype is expected')
    with np.errstate(over='ignore'):
        copy = np.array(array, np.float32, order='C')
    finite = np.isfinite(copy).sum()
    if finite < copy.size:
        raise FormatError(f'{name} has {copy.size - finite} of {copy.size} values that are not finite in float32')
    return copy


def native_names(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the arrays in this project's files, for a resolved configuration.

    Parameters are named 'conv1.kernel', 'conv1.bias' to 'fc8.bias'. Batch norm statistics are named 'conv1_norm.mean',
    'conv1_norm.var' and so on. Statistics of the training images have the names of prepare.shards.statistics() with
    the prefix 'statistics.'.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    size, channels = config.data.image_size, config.data.channels
    for layer in layer_table(config.model, config.data.crop_size, channels):
        shapes |= {f'{layer.name}.kernel': layer.kernel, f'{layer.name}.bias': layer.bias}
        if 'batch_norm' in layer.spec.ops:
            shapes |= {f'{layer.name}_norm.{kind}': layer.output[-1:] for kind in ('mean', 'var')}
    return shapes | {
        'statistics.mean_image': (size, size, channels),
        'statistics.mean_rgb': (channels,),
        'statistics.eigenvalues': (channels,),
        'statistics.eigenvectors': (channels, channels),
        'statistics.class_counts': (config.model.num_classes,),
    }


def from_own_onnx(arrays: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Returns the arrays with native_names() from the constants of this project's ONNX file, see convert.onnx_graph.

    The file has the mean of the center crop only: around the crop, the mean image is continued from its edge.

    Raises FormatError: a constant is missing or has another size.
    """
    found: dict[str, np.ndarray] = {}
    maps: tuple[int, ...] = ()
    try:
        for layer in layer_table(config.model, config.data.crop_size, config.data.channels):
            groups = 1 if layer.spec.cross_tower else config.model.towers
            kernel, bias = (_concatenated(arrays, f'{layer.name}.{kind}') for kind in ('kernel', 'bias'))
            if layer.spec.locally_connected:  # (height, width, towers, inputs, outputs per tower)
                kernel, bias = kernel.transpose(0, 1, 3, 2, 4), bias.transpose(1, 2, 0)
            elif layer.spec.kernel:
                kernel = kernel.transpose(2, 3, 1, 0)
            elif maps:  # rows in (C, H, W) order
                height, width, channels = maps
                kernel = kernel.reshape(channels // groups, height, width, -1).transpose(1, 2, 0, 3)
            found |= {f'{layer.name}.kernel': kernel.reshape(layer.kernel), f'{layer.name}.bias': bias}
            maps = layer.pooled if layer.spec.kernel else ()
            if 'batch_norm' in layer.spec.ops:
                found |= {f'{layer.name}_norm.{kind}': arrays[f'{layer.name}_norm.{kind}'] for kind in ('mean', 'var')}
        before = (config.data.image_size - config.data.crop_size) // 2
        after = config.data.image_size - config.data.crop_size - before
        mean = np.pad(arrays['mean'].transpose(1, 2, 0), ((before, after), (before, after), (0, 0)), 'edge')
    except (KeyError, ValueError) as error:
        raise FormatError(
            f'its constants are not those of its settings ({" ".join(str(error).split())[:100]})'
        ) from None
    channels = config.data.channels
    return found | {
        'statistics.mean_image': mean,
        'statistics.mean_rgb': mean.mean((0, 1), dtype=np.float64),
        'statistics.eigenvalues': np.zeros(channels),
        'statistics.eigenvectors': np.eye(channels),
        'statistics.class_counts': np.zeros(config.model.num_classes, np.int64),
    }


def _concatenated(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Returns the array `name`, or the arrays of the towers, `name`_0, `name`_1, ..., side by side."""
    towers = [array for key, array in arrays.items() if re.fullmatch(rf'{re.escape(name)}_\d+', key)]
    return np.concatenate(towers, -1) if towers else arrays[name]


def native(arrays: Mapping[str, np.ndarray], config: Config) -> tuple[Parameters, Parameters, dict[str, np.ndarray]]:
    """Splits the arrays of this project's file into parameters, batch norm statistics and training image statistics.

    Raises FormatError: names or shapes do not match `config`, or weights are not floating point or not finite.
    """
    wanted = native_names(config)
    _check_names(arrays, set(wanted))
    params: Parameters = {}
    norms: Parameters = {}
    statistics: dict[str, np.ndarray] = {}
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise FormatError(f'{name} has shape {arrays[name].shape}; {shape} is expected')
        layer, kind = name.split('.')
        if layer == 'statistics':
            statistics[kind] = arrays[name].astype(np.int64 if kind == 'class_counts' else np.float64)
        else:
            target = norms if layer.endswith('_norm') else params
            target.setdefault(layer, {})[kind] = _float32(arrays[name], name)
    return params, norms, statistics
