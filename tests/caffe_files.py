"""Files as Caffe writes them, byte by byte from caffe.proto, and Caffe's two AlexNets in NumPy; for test_convert.py."""

import struct

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def varint(number: int) -> bytes:
    result = b''
    while number > 127:
        result += bytes([number & 127 | 128])
        number >>= 7
    return result + bytes([number])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def content(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def floats(field: int, values: np.ndarray, letter: str = 'f') -> bytes:
    return content(field, struct.pack(f'<{values.size}{letter}', *values.ravel().tolist()))


def old_blob(array: np.ndarray) -> bytes:
    """BlobProto of 2014 with num, channels, height and width, and the diff of training."""
    shape = (1,) * (4 - array.ndim) + array.shape
    sizes = b''.join(number(i + 1, size) for i, size in enumerate(shape))
    return sizes + floats(5, array) + floats(6, 0 * array)


def blob(array: np.ndarray, is_double: bool = False) -> bytes:
    """BlobProto with a BlobShape; the wire format allows the numbers in two parts."""
    shape = content(7, content(1, b''.join(map(varint, array.shape))))
    field, letter = (8, 'd') if is_double else (5, 'f')
    flat = array.ravel()
    return floats(field, flat[:3], letter) + shape + floats(field, flat[3:], letter)


def old_net(name: str, layers: dict[str, list[np.ndarray]]) -> bytes:
    """NetParameter with V1LayerParameter, including a layer without blobs."""
    result = content(1, name.encode()) + content(2, content(3, b'data') + content(4, b'data') + number(5, 5))
    for layer, arrays in layers.items():
        body = content(2, b'below') + content(3, layer.encode()) + content(4, layer.encode())
        body += number(5, 4 if layer.startswith('conv') else 14)
        body += b''.join(content(6, old_blob(array)) for array in arrays)
        result += content(2, body + varint(7 << 3 | 5) + struct.pack('<f', 2.0))
    return result


def net(name: str, layers: dict[str, list[np.ndarray]], is_double: bool = False) -> bytes:
    """NetParameter with LayerParameter."""
    result = content(1, name.encode()) + content(100, content(1, b'relu1') + content(2, b'ReLU'))
    for layer, arrays in layers.items():
        body = content(1, layer.encode()) + content(2, b'Convolution') + content(4, layer.encode())
        result += content(100, body + b''.join(content(7, blob(array, is_double)) for array in arrays))
    return result


def random_layers(
    generator: np.random.Generator, widths: tuple[int, ...], channels: int = 3
) -> dict[str, list[np.ndarray]]:
    """Blobs of conv1 to fc8, float32: two groups in conv2, conv4 and conv5, maps of 6 x 6 before fc6."""
    sizes, groups = (11, 5, 3, 3, 3), (1, 2, 1, 2, 2)
    layers, inputs = {}, channels
    for i, width in enumerate(widths):
        shape = (width, inputs // groups[i], sizes[i], sizes[i]) if i < 5 else (width, inputs)
        kernel = generator.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        if i == 0:
            kernel /= 60
        name = f'conv{i + 1}' if i < 5 else f'fc{i + 1}'
        layers[name] = [kernel.astype(np.float32), generator.normal(0, 0.3, width).astype(np.float32)]
        inputs = width * 36 if i == 4 else width
    return layers


def logits(layers: dict[str, list[np.ndarray]], x: np.ndarray, pool_first: bool) -> np.ndarray:
    """Outputs (N, classes) of fc8 for BGR pixels less the mean, (N, 3, 227, 227); in float64.

    pool_first: pooling before normalization, as in bvlc_reference_caffenet.
    """
    layers = {name: [array.astype(np.float64) for array in arrays] for name, arrays in layers.items()}
    for name in ('conv1', 'conv2', 'conv3', 'conv4', 'conv5'):
        stride, pad, group = {'conv1': (4, 0, 1), 'conv2': (1, 2, 2), 'conv3': (1, 1, 1)}.get(name, (1, 1, 2))
        x = np.maximum(_convolution(x, *layers[name], stride, pad, group), 0)
        if name in ('conv1', 'conv2'):
            x = _normalized(_pooled(x)) if pool_first else _pooled(_normalized(x))
        elif name == 'conv5':
            x = _pooled(x)
    x = x.reshape(len(x), -1)
    for name in ('fc6', 'fc7'):
        x = np.maximum(x @ layers[name][0].T + layers[name][1], 0)
    return x @ layers['fc8'][0].T + layers['fc8'][1]


def _convolution(x, kernel, bias, stride, pad, group):
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    outputs = []
    for maps, part in zip(np.split(x, group, 1), np.split(kernel, group), strict=True):
        windows = sliding_window_view(maps, kernel.shape[2:], (2, 3))[:, :, ::stride, ::stride]
        outputs.append(np.einsum('nchwij,ocij->nohw', windows, part, optimize=True))
    return np.concatenate(outputs, 1) + bias[:, None, None]


def _normalized(x):
    squares = np.pad(x**2, ((0, 0), (2, 2), (0, 0), (0, 0)))
    sums = sum(squares[:, i : i + x.shape[1]] for i in range(5))
    return x / (1 + 1e-4 / 5 * sums) ** 0.75


def _pooled(x):
    side = -(-(x.shape[2] - 3) // 2) + 1  # Caffe rounds up
    rows = [x[:, :, 2 * i : 2 * i + 3].max(2) for i in range(side)]
    x = np.stack(rows, 2)
    return np.stack([x[:, :, :, 2 * i : 2 * i + 3].max(3) for i in range(side)], 3)
