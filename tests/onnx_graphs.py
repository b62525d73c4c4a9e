"""ONNX graphs of AlexNet as other programs write them, with random weights, built operator by operator."""

import os
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ZOO = os.path.join(os.path.dirname(onnx.__file__), 'backend', 'test', 'data', 'light')
TORCHVISION_WIDTHS = (8, 12, 16, 12, 8, 20, 16, 7)
CAFFE_WIDTHS = (8, 12, 16, 12, 8, 20, 16, 7)


def zoo_model(size: int) -> onnx.ModelProto:
    """The graph of bvlcalexnet in the model zoo for images of `size` pixels, with random weights."""
    model = onnx.load(os.path.join(ZOO, 'light_bvlc_alexnet.onnx'))
    graph, generator = model.graph, np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = []
    for node in graph.node:
        if node.op_type == 'ConstantOfShape':
            name, shape = node.output[0], shapes[node.input[0]].tolist()
            scale = np.sqrt(2 / np.prod(shape[1:])) / (1 if name != 'conv1_w_0' else 6) if len(shape) > 1 else 0.3
            values = generator.standard_normal(shape, np.float32) * np.float32(scale)
            weights.append(numpy_helper.from_array(values, name))
    rest = [tensor for tensor in graph.initializer if not tensor.name.endswith('__SHAPE')]
    nodes = [node for node in graph.node if node.op_type != 'ConstantOfShape']
    images = helper.make_tensor_value_info('data_0', TensorProto.FLOAT, (1, 3, size, size))
    # Files of this age list the initializers among the inputs.
    inputs = [images, *(helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in weights + rest)]
    changed = helper.make_graph(nodes, graph.name, inputs, graph.output, weights + rest)
    return helper.make_model(changed, opset_imports=model.opset_import, ir_version=3, producer_name='onnx-caffe2')


def with_logits(model: onnx.ModelProto) -> bytes:
    """Returns the file of `model` with the inputs of its softmax, or its last output, as the only output."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    last = copy.graph.node[-1]
    name = last.input[0] if last.op_type == 'Softmax' else last.output[0]
    del copy.graph.output[:]
    copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return copy.SerializeToString()


class Chain:
    """A graph under construction; `x` is the last output."""

    def __init__(self, x: str):
        self.x, self.nodes, self.arrays = x, [], []

    def array(self, name: str, values) -> str:
        self.arrays.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, kind: str, *others: str, outputs: int = 1, **attributes) -> onnx.NodeProto:
        names = [f'/{kind}_{len(self.nodes)}_output_{i}' for i in range(outputs)]
        made = helper.make_node(kind, [self.x, *others], names, name=f'/{kind}_{len(self.nodes)}', **attributes)
        self.nodes.append(made)
        self.x = names[0]
        return made

    def model(self, shape: Sequence[int | str], name: str, input_name: str, opset: int, **extra) -> onnx.ModelProto:
        images = helper.make_tensor_value_info(input_name, TensorProto.FLOAT, shape)
        output = helper.make_tensor_value_info(self.x, TensorProto.FLOAT, (shape[0], 7))
        graph = helper.make_graph(self.nodes, name, [images], [output], self.arrays)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid('', opset)], ir_version=8, **extra)


def random_arrays(widths: Sequence[int], groups: Sequence[int], side: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernels (outputs, inputs, ...) and biases of conv1 to fc8, for maps of `side` x `side` pixels before fc6."""
    generator, inputs, arrays = np.random.default_rng(4), 3, []
    for i, width in enumerate(widths):
        size = (11, 5, 3, 3, 3)[i] if i < 5 else 0
        shape = (width, inputs // groups[i], size, size) if size else (width, inputs)
        kernel = generator.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        arrays.append((kernel, generator.normal(0, 0.3, width).astype(np.float32)))
        inputs = width * side**2 if i == 4 else width
    return arrays


def caffe_model(pool_first: bool, opset: int = 9, widths: Sequence[int] = CAFFE_WIDTHS, size: int = 227):
    """A narrow bvlcalexnet or, with `pool_first`, caffenet, with the operators and attributes of the model zoo."""
    chain, groups = Chain('data_0'), (1, 2, 1, 2, 2, 1, 1, 1)
    arrays = random_arrays(widths, groups)
    arrays[0][0][:] /= 20
    for i, (kernel, bias) in enumerate(arrays):
        name = f'conv{i + 1}' if i < 5 else f'fc{i + 1}'
        weights = chain.array(f'{name}_w_0', kernel), chain.array(f'{name}_b_0', bias)
        if i < 5:
            pad = (0, 2, 1, 1, 1)[i]
            window = {'kernel_shape': kernel.shape[2:], 'strides': [1 if i else 4] * 2, 'pads': [pad] * 4}
            chain.node('Conv', *weights, **window, **({'group': groups[i]} if groups[i] > 1 else {}))
        else:
            if i == 5:
                if opset < 5:
                    chain.node('Reshape', shape=[1, kernel.shape[1]])
                else:
                    chain.node('Reshape', chain.array('OC2_DUMMY_1', np.array([1, kernel.shape[1]])))
            chain.node('Gemm', *weights, transB=1, **({'broadcast': 1} if opset < 7 else {}))
        if i < 7:
            chain.node('Relu')
        normalize = {'size': 5, 'alpha': 1e-4, 'beta': 0.75, 'bias': 1.0}
        pool = {'kernel_shape': [3, 3], 'strides': [2, 2], 'pads': [0, 0, 1, 1] if i == 4 else [0] * 4}
        operators = [('LRN', normalize), ('MaxPool', pool)] if i < 2 else [('MaxPool', pool)] if i == 4 else []
        for kind, attributes in operators[::-1] if pool_first else operators:
            chain.node(kind, **attributes)
        if i in (5, 6):
            ratio = {'is_test': 1} if opset < 7 else {}
            chain.node('Dropout', outputs=2 if opset < 12 else 1, **({} if opset >= 12 else {'ratio': 0.5, **ratio}))
    chain.node('Softmax')
    return chain.model((1, 3, size, size), 'CaffeNet' if pool_first else 'AlexNet', 'data_0', opset)


def torch_model(variant: str, widths: Sequence[int] = TORCHVISION_WIDTHS) -> onnx.ModelProto:
    """torchvision's alexnet as torch.onnx writes it.

    Variants: jit (the exporter that traces, with AveragePool for adaptive pooling), dynamo (the later exporter: other
    attributes, Reshape), view (a shape computed from the input's), names (after an optimizer that renames the weights),
    matmul (linear layers as Transpose, MatMul and Add), constants (weights in Constant nodes), half (float16 weights).
    """
    chain = Chain('input.1' if variant == 'jit' else 'x')
    for i, (kernel, bias) in enumerate(random_arrays(widths, (1,) * 8)):
        module = f'features.{(0, 3, 6, 8, 10)[i]}' if i < 5 else f'classifier.{(1, 4, 6)[i - 5]}'
        names = [f'onnx::{"Conv" if i < 5 else "Gemm"}_{40 + 2 * i + j}' for j in (0, 1)]
        names = names if variant == 'names' else [f'{module}.weight', f'{module}.bias']
        weights = [_weight(chain, variant, name, array) for name, array in zip(names, (kernel, bias), strict=True)]
        if i < 5:
            pads, strides = [(2, 2, 1, 1, 1)[i]] * 4, [1 if i else 4] * 2
            given = {'dilations': [1, 1], 'group': 1, 'pads': pads, 'strides': strides}
            given |= {'auto_pad': 'NOTSET'} if variant == 'dynamo' else {'kernel_shape': kernel.shape[2:]}
            chain.node('Conv', *weights, **given)
        elif variant == 'matmul':
            transposed = f'{names[0]}_t'
            chain.nodes.append(helper.make_node('Transpose', weights[:1], [transposed], perm=[1, 0]))
            chain.node('MatMul', transposed)
            chain.node('Add', weights[1])
        else:
            chain.node('Gemm', *weights, alpha=1.0, beta=1.0, transB=1)
        if i < 7:
            chain.node('Relu')
        if i in (0, 1, 4):
            given = {'auto_pad': 'NOTSET', 'storage_order': 0} if variant == 'dynamo' else {}
            window = {'kernel_shape': [3, 3], 'strides': [2, 2], 'pads': [0] * 4, 'dilations': [1, 1], 'ceil_mode': 0}
            chain.node('MaxPool', **window, **given)
        if i == 4:
            _flatten(chain, variant)
    batch = 1 if variant == 'names' else 'batch_size'
    return chain.model((batch, 3, 224, 224), 'main_graph', 'input.1' if variant == 'jit' else 'x', 18)


def _weight(chain: Chain, variant: str, name: str, array: np.ndarray) -> str:
    if variant == 'constants':
        tensor = numpy_helper.from_array(array, name)
        chain.nodes.append(helper.make_node('Constant', [], [name], value=tensor))
    elif variant == 'half':
        chain.array(f'{name}_half', array.astype(np.float16))
        chain.nodes.append(helper.make_node('Cast', [f'{name}_half'], [name], to=TensorProto.FLOAT))
    else:
        chain.array(name, array)
    return name


def _flatten(chain: Chain, variant: str) -> None:
    if variant == 'dynamo':
        chain.node('AveragePool', kernel_shape=[1, 1], strides=[1, 1], pads=[0] * 4, auto_pad='NOTSET', ceil_mode=0)
        chain.node('Reshape', chain.array('val_12', np.array([-1, 288])), allowzero=0)
    elif variant == 'view':
        x = chain.x
        chain.array('zero', np.array(0))
        chain.array('axis', np.array([0]))
        chain.array('rest', np.array([-1]))
        chain.nodes.append(helper.make_node('Shape', [x], ['shape']))
        chain.nodes.append(helper.make_node('Gather', ['shape', 'zero'], ['first'], axis=0))
        chain.nodes.append(helper.make_node('Unsqueeze', ['first', 'axis'], ['first_1']))
        chain.nodes.append(helper.make_node('Concat', ['first_1', 'rest'], ['target'], axis=0))
        chain.node('Reshape', 'target')
    else:
        chain.node('AveragePool', kernel_shape=[1, 1], strides=[1, 1])
        chain.node('Flatten', axis=1)
