"""Reads ONNX files: the operators that the image passes through, and the constants of the graph as arrays."""

import dataclasses
import os
from collections import Counter
from typing import Any

import numpy as np

from alexnet_jax.config import ConfigError
from alexnet_jax.weights.formats import FormatError

Node = Any  # onnx.NodeProto; onnx has no type hints for mypy, and is imported only for ONNX files

_ADVICE = 'download the file again'
_MAX_CONSTANT = 2**31  # numbers; a dense layer of AlexNet has 4e7
# Numbers of convolutions and dense layers of other networks, which users convert by mistake.
_OTHER_NETWORKS = {(8, 3): 'VGG-11', (10, 3): 'VGG-13', (13, 3): 'VGG-16', (16, 3): 'VGG-19'}


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """The content of an ONNX file.

    Attributes:
      described: what the network is, for messages: the name of its graph and its operators.
      input_shape: shape of the images, with None for a size that the graph leaves open.
      nodes: the operators between the images and the last output, in order; each reads the output of the one before.
      constants: arrays by name. They may be read-only views of the file.
    """

    described: str
    input_shape: tuple[int | None, ...]
    nodes: list[Node]
    constants: dict[str, np.ndarray]


def check_installed(path: str) -> None:
    """Raises ConfigError if the package onnx, which reads the file `path`, is not installed."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise ConfigError(
            f'{path}: onnx, which reads it, is not installed: pip install "alexnet_jax[export]"'
        ) from None


def read(path: str) -> OnnxFile:
    """Reads the ONNX file `path`, with the external data beside it.

    Raises:
      FormatError: the file is truncated or corrupt, its network is quantized or no chain of operators, or its external
        data are missing, truncated or in another folder.
      ConfigError: onnx is not installed.
      OSError: the file is unreadable.
    """
    check_installed(path)
    model = _parse(path)
    described = _describe(model.graph)
    _refuse_quantized(model.graph, described)
    constants = _constants(model.graph, path)
    image, nodes = _chain(model.graph, constants, described)
    shape = tuple(size.dim_value or None for size in image.type.tensor_type.shape.dim)
    return OnnxFile(described, shape, nodes, constants)


def read_metadata(path: str) -> dict[str, str]:
    """Returns the metadata of the ONNX file `path`. Raises the errors of read()."""
    check_installed(path)
    return {entry.key: entry.value for entry in _parse(path).metadata_props}


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Returns the constants of the ONNX file `path` by name. Raises the errors of read()."""
    check_installed(path)
    return _constants(_parse(path).graph, path)


def attributes(node: Node) -> dict[str, Any]:
    """Returns the attributes of `node` by name."""
    import onnx

    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def operator(node: Node) -> str:
    """Returns the kind and the name of `node` for messages, such as "Conv 'conv1'"."""
    return f'{node.op_type} {node.name or node.output[0]!r}'


def _parse(path: str) -> Any:
    """Returns the onnx.ModelProto in `path` without its external data."""
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    with open(path, 'rb') as file:
        try:
            model.ParseFromString(file.read())
        except DecodeError:
            raise FormatError(f'a truncated or corrupt ONNX file; {_ADVICE}') from None
    if not model.graph.node:
        raise FormatError(f'an ONNX file without operators, which may be truncated; {_ADVICE}')
    if model.functions:  # the exporter of PyTorch 2.1 to 2.5 wrote an operator of PyTorch as a function
        import onnx.inliner

        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:  # its C++ code raises several types
            raise FormatError(f'its functions cannot be read ({" ".join(str(error).split())[:120]})') from None
    return model


def _describe(graph: Any) -> str:
    counts = Counter(node.op_type for node in graph.node if node.op_type != 'Constant')
    convolutions, dense = counts['Conv'], counts['Gemm'] + counts['MatMul']
    operators = ', '.join(f'{count} {kind}' for kind, count in counts.most_common(5))
    what = f'the ONNX network {graph.name[:60]!r} with {operators}'
    known = _OTHER_NETWORKS.get((convolutions, dense))
    if known is None and counts['Concat'] > 2:
        known = 'a network with parallel branches, such as SqueezeNet, Inception or DenseNet'
    elif known is None and counts['Add'] + counts['Sum'] >= 8:
        known = 'a residual network, such as ResNet'
    return f'{what} ({known}?)' if known else what


def _refuse_quantized(graph: Any, described: str) -> None:
    for node in graph.node:
        if node.op_type.startswith('QLinear') or 'Integer' in node.op_type or 'uantizeLinear' in node.op_type:
            raise FormatError(
                f'{described}: quantized to integers ({operator(node)}), such as the files -int8 and -qdq of the model'
                ' zoo; convert the float file'
            )


def _constants(graph: Any, path: str) -> dict[str, np.ndarray]:
    """Returns the arrays that do not depend on the images: initializers, and operators that only read constants."""
    import onnx

    if graph.sparse_initializer:
        raise FormatError('it has sparse weights; export the network with dense ones')
    found = {tensor.name: _array(tensor, path) for tensor in graph.initializer}
    for node in graph.node:
        given = attributes(node) if node.op_type in ('Constant', 'ConstantOfShape', 'Transpose', 'Cast') else {}
        inputs = [found.get(name) for name in node.input]
        if node.op_type == 'Constant':
            (kind, value), *_ = [*given.items(), ('', None)]
            if kind == 'value':
                found[node.output[0]] = _array(value, path)
            elif kind in ('value_int', 'value_ints', 'value_float', 'value_floats'):
                found[node.output[0]] = np.array(value)
        elif len(inputs) != 1 or inputs[0] is None:
            continue
        elif node.op_type == 'ConstantOfShape':
            shape = inputs[0].ravel().tolist()
            if min(shape, default=1) < 0 or np.prod(shape, dtype=float) > _MAX_CONSTANT:
                raise FormatError(f'corrupt: {operator(node)} has the shape {shape}')
            value = _array(given['value'], path) if 'value' in given else np.zeros(1, np.float32)
            found[node.output[0]] = np.broadcast_to(value.reshape(-1)[:1], shape)
        elif node.op_type == 'Identity':
            found[node.output[0]] = inputs[0]
        elif node.op_type == 'Transpose':
            axes = given.get('perm') or list(range(inputs[0].ndim))[::-1]
            if sorted(axes) != list(range(inputs[0].ndim)):
                raise FormatError(f'corrupt: {operator(node)} has the axes {axes}')
            found[node.output[0]] = inputs[0].transpose(axes)
        elif node.op_type == 'Cast':
            found[node.output[0]] = inputs[0].astype(onnx.helper.tensor_dtype_to_np_dtype(given['to']))
    return found


def _array(tensor: Any, path: str) -> np.ndarray:
    """Returns the array of an onnx.TensorProto. Raises FormatError: it is corrupt, or see _external()."""
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external(tensor, path)
    try:
        return onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f'corrupt: the array {tensor.name!r} ({" ".join(str(error).split())[:80]})') from None


def _external(tensor: Any, path: str) -> np.ndarray:
    """Returns an array of the file beside `path` that `tensor` names; only files below the folder of `path` are read.

    Model hubs keep files as links into one folder. There, the links of both files lead to the same folder.
    """
    import onnx

    given = {entry.key: entry.value for entry in tensor.external_data}
    name = given.get('location', '')
    folder = os.path.dirname(os.path.abspath(path))
    file = os.path.join(folder, name)
    inside = [os.path.dirname(os.path.realpath(path)), os.path.realpath(folder)]
    is_usable = bool(name) and '\0' not in name and not os.path.isabs(name)
    if not is_usable or not any(os.path.realpath(file).startswith(f'{each.rstrip("/")}/') for each in inside):
        raise FormatError(f'refused: the array {tensor.name!r} is in {name[:100]!r}, which is not below its folder')
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        start, count = int(given.get('offset', 0)), int(np.prod(tensor.dims, dtype=object))
    except (KeyError, ValueError):
        raise FormatError(f'corrupt: the array {tensor.name!r} has an unknown type or place') from None
    if not os.path.isfile(file):
        raise FormatError(f'its weights are in {name}, which is missing; put that file into the same folder')
    size = os.path.getsize(file)
    if min(start, count, *tensor.dims) < 0 or start + count * dtype.itemsize > size:
        raise FormatError(f'{name} has {size:,} bytes, too few for the array {tensor.name!r}; {_ADVICE}')
    return np.fromfile(file, dtype, count, offset=start).reshape(tuple(tensor.dims))


def _chain(graph: Any, constants: dict[str, np.ndarray], described: str) -> tuple[Any, list[Node]]:
    """Returns the input of the images, and the operators from it to the last output.

    Operators on the shape of an array are ignored: exporters compute the shape of Reshape from it.
    """
    readers: dict[str, list[Node]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            if node.op_type != 'Shape':
                readers.setdefault(name, []).append(node)
    images = [each for each in graph.input if each.name not in constants and each.name in readers]
    if len(images) != 1:
        names = ', '.join(each.name for each in images[:5]) or 'none'
        raise FormatError(f'{described}: not an AlexNet, whose only input is the images; its inputs are {names}')
    nodes: list[Node] = []
    name, outputs = images[0].name, {each.name for each in graph.output}
    while found := readers.get(name, []):
        if len(found) > 1:
            shown = ', '.join(operator(node) for node in found[:3])
            raise FormatError(
                f'{described}: not an AlexNet, which is a chain of layers: {len(found)} operators ({shown}) read the'
                f' output of {operator(nodes[-1]) if nodes else "its input"}'
            )
        nodes.append(found[0])
        name = found[0].output[0]
        if len(nodes) > len(graph.node):
            raise FormatError(f'corrupt: {operator(found[0])} depends on its own output')
    if name not in outputs:
        raise FormatError(f'{described}: corrupt, or a part of a network: {name!r} is neither read nor an output')
    return images[0], nodes
