"""Reads Caffe's network weights (.caffemodel) and mean images (.binaryproto, .npy)."""

import math
from functools import cache

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from jaxtyping import Float

from alexnet_jax.weights.formats import FormatError

# The required subset of caffe.proto: name, number and type of each field; * marks repeated fields.
# Packed numbers have the memory layout of an array, so they are declared as bytes to avoid parsing each number.
_SCHEMA = {
    'BlobShape': (('dim', 1, 'INT64*'),),
    'BlobProto': (
        ('num', 1, 'INT32'),
        ('channels', 2, 'INT32'),
        ('height', 3, 'INT32'),
        ('width', 4, 'INT32'),
        ('data', 5, 'BYTES*'),
        ('shape', 7, 'BlobShape'),
        ('double_data', 8, 'BYTES*'),
    ),
    'V1LayerParameter': (('name', 4, 'STRING'), ('blobs', 6, 'BlobProto*')),
    'LayerParameter': (('name', 1, 'STRING'), ('blobs', 7, 'BlobProto*')),
    'NetParameter': (('name', 1, 'STRING'), ('layers', 2, 'V1LayerParameter*'), ('layer', 100, 'LayerParameter*')),
}


@cache
def _messages() -> dict[str, type[Message]]:
    """Returns the message classes by name."""
    file = descriptor_pb2.FileDescriptorProto(name='caffe.proto', package='caffe', syntax='proto2')
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            field = message.field.add(name=field_name, number=number)
            field.label = field.LABEL_REPEATED if kind.endswith('*') else field.LABEL_OPTIONAL
            kind = kind.rstrip('*')
            if kind in _SCHEMA:
                field.type, field.type_name = field.TYPE_MESSAGE, f'.caffe.{kind}'
            else:
                field.type = getattr(field, f'TYPE_{kind}')
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f'caffe.{name}')) for name in _SCHEMA}


def read(path: str) -> tuple[str, dict[str, list[Float[np.ndarray, '...']]]]:
    """Reads the .caffemodel `path`.

    Returns:
      The name of the network, and the float32 or float64 blobs of each layer that has blobs: kernels (outputs,
      inputs per group, height, width) of convolutions, kernels (outputs, inputs) or (1, 1, outputs, inputs) of dense
      layers, and biases (outputs,) or (1, 1, 1, outputs).

    Raises:
      FormatError: The file has another format or is corrupt.
      OSError: The file is unreadable.
    """
    net = _parsed('NetParameter', path)
    layers = [layer for layer in (*net.layer, *net.layers) if layer.blobs]
    if not layers:
        blob = _parsed('BlobProto', path)
        if blob.data or blob.double_data:
            raise FormatError('a single array, such as a mean image; give it as --mean')
        raise FormatError('not a Caffe network with weights; name its .caffemodel')
    names = [layer.name for layer in layers]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise FormatError(f'it has two layers {twice!r}')
    return net.name, {layer.name: [_array(blob, layer.name) for blob in layer.blobs] for layer in layers}


def read_mean(path: str) -> Float[np.ndarray, 'c h w'] | Float[np.ndarray, ' c']:
    """Returns the floating-point mean image in `path`, a .binaryproto or .npy. Its channels are BGR.

    Raises:
      FormatError: The file has another format or is corrupt.
      OSError: The file is unreadable.
    """
    with open(path, 'rb') as file:
        is_numpy = file.read(6) == b'\x93NUMPY'
    if is_numpy:
        try:
            mean = np.load(path, allow_pickle=False)
        except ValueError:
            raise FormatError('a corrupt .npy, or one with Python objects') from None
    else:
        mean = _array(_parsed('BlobProto', path), 'the mean')
    if mean.ndim == 4 and len(mean) == 1:
        mean = mean[0]
    if mean.ndim not in (1, 3) or mean.dtype.kind != 'f' or not np.isfinite(mean).all():
        raise FormatError(f'{mean.dtype} {mean.shape}, not the floating-point mean (3, height, width) of images')
    return mean


def _parsed(name: str, path: str) -> Message:
    """Parses the file as message `name`. Raises FormatError, OSError."""
    message = _messages()[name]()
    with open(path, 'rb') as file:
        try:
            message.ParseFromString(file.read())
        except DecodeError:
            raise FormatError('not a Caffe file, or a truncated or corrupt one') from None
    return message


def _array(blob: Message, where: str) -> Float[np.ndarray, '...']:
    """Returns the data of a BlobProto as an array, without a copy if the data are in one part. Raises FormatError."""
    shape = tuple(blob.shape.dim) if blob.HasField('shape') else (blob.num, blob.channels, blob.height, blob.width)
    parts, kind = (blob.double_data, '<f8') if blob.double_data else (blob.data, '<f4')
    content = parts[0] if len(parts) == 1 else b''.join(parts)
    if not content or min(shape, default=0) < 1 or math.prod(shape) * np.dtype(kind).itemsize != len(content):
        raise FormatError(
            f'corrupt: {where} has a blob of shape {shape} with {len(content)} bytes of {np.dtype(kind).name}'
        )
    return np.frombuffer(content, kind).reshape(shape)
