"""Imported ONNX files: logits against ONNX Runtime, which runs the same graphs, and what is refused."""

import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
import onnx
import onnx_graphs
import onnxruntime
import pytest
from flax import nnx
from helpers import refusal, run_command, usage_error
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from alexnet_jax.config import ConfigError
from alexnet_jax.convert import importer
from alexnet_jax.training.state import build_model
from alexnet_jax.weights import formats, weight_files
from alexnet_jax.weights.formats import FormatError
from alexnet_jax.weights.weight_files import NetworkWeights

MEAN, MEAN_BGR = '123,117,104', np.array([104, 117, 123], np.float32)
VARIANTS = ('jit', 'dynamo', 'view', 'names', 'matmul', 'constants', 'half')


def pictures(size: int, count: int = 3) -> np.ndarray:
    """Pictures (count, size, size, 3) of blocks, because those of single-pixel noise give nearly equal logits."""
    blocks = np.random.default_rng(1).integers(0, 256, (count, 9, 9, 3), np.uint8)
    return blocks.repeat(-(-size // 9), 1).repeat(-(-size // 9), 2)[:, :size, :size]


def logits(weights: NetworkWeights, images: np.ndarray) -> np.ndarray:
    """Logits of this project's network for the pixels of its crops."""
    data = weights.config.data
    inputs = ((images - weights.statistics['mean_rgb']) / np.array(data.std)).astype(np.float32)
    graph = build_model(weights.config)[0]
    return np.asarray(jax.jit(lambda params, x: nnx.merge(graph, params, {})(x))(weights.params, inputs))


def runtime_logits(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    """Logits of ONNX Runtime for inputs (B, C, H, W), one image at a time."""
    session = onnxruntime.InferenceSession(onnx_graphs.with_logits(model))
    (name,) = [each.name for each in session.get_inputs()]
    return np.concatenate([session.run(None, {name: np.ascontiguousarray(row[None])})[0] for row in inputs])


def bgr(images: np.ndarray) -> np.ndarray:
    return (images[..., ::-1].astype(np.float32) - MEAN_BGR).transpose(0, 3, 1, 2)


def check_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.ptp(theirs, 0).max() > 0.05 * np.abs(theirs).max()  # the logits depend on the picture
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def saved(model: onnx.ModelProto, folder: Path) -> str:
    path = str(folder / 'model.bin')  # the content identifies the format, not the name
    onnx.save(model, path)
    return path


# The model zoo


@pytest.mark.slow
@pytest.mark.parametrize('size', [224, 227])
def test_logits_match_the_graph_of_the_model_zoo(size, tmp_path):
    model = onnx_graphs.zoo_model(size)
    weights = weight_files.read_weights(saved(model, tmp_path), mean=MEAN)
    config = weights.config
    assert (config.model.preset, config.data.crop_size, config.data.image_size) == ('caffe', size, 256)
    assert config.model.widths == (96, 256, 384, 384, 256, 4096, 4096)
    assert config.model.conv_ops[4] == ('activation ceil_pool' if size == 224 else 'activation pool')
    images = pictures(size, 2)
    theirs = runtime_logits(model, bgr(images))
    check_equal(logits(weights, images), theirs)
    for node in model.graph.node:  # the test sees the normalization and the last row of the last pooling
        if node.op_type == 'LRN':
            next(each for each in node.attribute if each.name == 'alpha').f = 1e-9
    assert np.abs(runtime_logits(model, bgr(images)) - theirs).max() > 0.01 * np.abs(theirs).max()


@pytest.mark.parametrize('opset', [3, 6, 7, 8, 9, 12])
@pytest.mark.parametrize('pool_first', [False, True])
def test_opset_versions_of_the_model_zoo(opset, pool_first, tmp_path):
    path = saved(onnx_graphs.caffe_model(pool_first, opset), tmp_path)
    weights = weight_files.read_weights(path, mean=MEAN)
    assert weights.config.model.preset == ('caffenet' if pool_first else 'caffe')
    assert weights.config.data.crop_size == 227
    wanted = onnx_graphs.random_arrays(onnx_graphs.CAFFE_WIDTHS, (1, 2, 1, 2, 2, 1, 1, 1))
    np.testing.assert_array_equal(weights.params['fc7']['kernel'], wanted[6][0].T)
    np.testing.assert_array_equal(weights.params['conv1']['kernel'][3, 4, :, 5], wanted[0][0][5, ::-1, 3, 4] / 20)


@pytest.mark.parametrize('size', [224, 227])
@pytest.mark.parametrize('pool_first', [False, True])
def test_logits_of_narrow_networks_of_the_model_zoo(size, pool_first, tmp_path):
    model = onnx_graphs.caffe_model(pool_first, size=size)
    images = pictures(size)
    weights = weight_files.read_weights(saved(model, tmp_path), mean=MEAN)
    check_equal(logits(weights, images), runtime_logits(model, bgr(images)))


def test_crop_size_in_place_of_that_of_the_graph(tmp_path):
    """The graph of 224 pixels is imported for the 227 pixels of Caffe; ONNX Runtime then gets a graph of 227."""
    path = saved(onnx_graphs.caffe_model(False, size=224), tmp_path)
    weights = weight_files.read_weights(path, mean=MEAN, crop_size=227)
    assert (
        weights.config == weight_files.read_weights(saved(onnx_graphs.caffe_model(False), tmp_path), mean=MEAN).config
    )
    images = pictures(227)
    check_equal(logits(weights, images), runtime_logits(onnx_graphs.caffe_model(False), bgr(images)))


def test_networks_of_caffe_need_their_mean(tmp_path):
    path = saved(onnx_graphs.caffe_model(False), tmp_path)
    assert '--mean is missing' in refusal(weight_files.read_weights, path)


OTHERS = {
    'densenet121': 'DenseNet',
    'inception_v1': 'Inception',
    'inception_v2': 'Inception',
    'resnet50': 'ResNet',
    'shufflenet': "'shufflenet'|ResNet",
    'squeezenet': 'SqueezeNet',
    'vgg19': 'VGG-19',
    'zfnet512': r"'zfnet512'.*Conv 'n0' has kernels of \[7, 7\], not \[11, 11\]",
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_networks_of_the_model_zoo_are_named(name):
    with pytest.raises(FormatError, match=OTHERS[name]) as error:
        weight_files.read_weights(os.path.join(onnx_graphs.ZOO, f'light_{name}.onnx'), mean=MEAN)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_constant_weights_of_the_light_graph():
    """The graph in the package onnx makes each of its arrays from one number."""
    weights = weight_files.read_weights(os.path.join(onnx_graphs.ZOO, 'light_bvlc_alexnet.onnx'), mean=MEAN)
    model = onnx.load(os.path.join(onnx_graphs.ZOO, 'light_bvlc_alexnet.onnx'))
    node = next(node for node in model.graph.node if node.output[0] == 'fc8_w_0')
    value = numpy_helper.to_array(node.attribute[0].t)
    np.testing.assert_array_equal(weights.params['fc8']['kernel'], np.full((4096, 1000), value))
    assert weights.class_names[0] == 'n01440764'


# PyTorch


@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_match_exports_of_torchvision(variant, tmp_path):
    model = onnx_graphs.torch_model(variant)
    onnx.checker.check_model(model)
    weights = weight_files.read_weights(saved(model, tmp_path))
    config = weights.config
    assert (config.model.preset, config.data.crop_size, config.model.num_classes) == ('torchvision', 224, 7)
    images = pictures(224)
    mean, std = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    inputs = ((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    check_equal(logits(weights, images), runtime_logits(model, inputs))


def test_onnx_and_safetensors_of_one_network_give_one_run(tmp_path):
    model = onnx_graphs.torch_model('jit')
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    save_file(arrays, tmp_path / 'model.safetensors')
    wanted = weight_files.read_weights(str(tmp_path / 'model.safetensors'))
    found = weight_files.read_weights(saved(model, tmp_path))
    assert found.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    jax.tree.map(np.testing.assert_array_equal, found.statistics, wanted.statistics)


def test_local_functions_are_expanded(tmp_path):
    """As the exporter of PyTorch 2.1 wrote them: each operator of PyTorch as a function of the file."""
    model = onnx_graphs.torch_model('jit')
    body = [helper.make_node('Relu', ['self'], ['return_val'])]
    imports = [helper.make_opsetid('', 18)]
    model.functions.append(helper.make_function('pkg.torch', 'aten_relu', ['self'], ['return_val'], body, imports))
    model.opset_import.append(helper.make_opsetid('pkg.torch', 1))
    for node in model.graph.node:
        if node.op_type == 'Relu':
            node.op_type, node.domain = 'aten_relu', 'pkg.torch'
    assert weight_files.read_weights(saved(model, tmp_path)).config.model.preset == 'torchvision'


def change(model: onnx.ModelProto, kind: str, index: int = 0, **values) -> onnx.ModelProto:
    """Replaces attributes of the operator number `index` of its kind; None removes one."""
    node = [node for node in model.graph.node if node.op_type == kind][index]
    kept = [each for each in node.attribute if each.name not in values]
    del node.attribute[:]
    node.attribute.extend(kept + [helper.make_attribute(*item) for item in values.items() if item[1] is not None])
    return model


def insert(model: onnx.ModelProto, position: int, kind: str, *others: str, **attributes) -> onnx.ModelProto:
    """Inserts an operator after the operator number `position` of the chain; -1 stands for the input."""
    nodes = list(model.graph.node)
    name = nodes[position].output[0] if position >= 0 else model.graph.input[0].name
    for node in nodes:
        node.input[:] = ['inserted' if each == name else each for each in node.input]
    nodes.insert(position + 1, helper.make_node(kind, [name, *others], ['inserted'], name='new', **attributes))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def with_branch(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.node.append(helper.make_node('Relu', [model.graph.node[3].output[0]], ['other'], name='branch'))
    return model


def without(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    nodes = list(model.graph.node)
    gone = next(node for node in nodes if node.op_type == kind)
    nodes.remove(gone)
    for node in nodes:
        node.input[:] = [gone.input[0] if each == gone.output[0] else each for each in node.input]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def with_shape(model: onnx.ModelProto, *shape: int) -> onnx.ModelProto:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info('x', TensorProto.FLOAT, shape))
    return model


def torch_graph() -> onnx.ModelProto:
    return onnx_graphs.torch_model('names')


def caffe_graph() -> onnx.ModelProto:
    return onnx_graphs.caffe_model(False)


DIFFERENT = {
    'padding': (lambda: change(torch_graph(), 'Conv', pads=[1] * 4), r'padding \[1, 1, 1, 1\], not \[2, 2, 2, 2\]'),
    'stride': (lambda: change(torch_graph(), 'Conv', strides=[2, 2]), r'strides \[2, 2\], not \[4, 4\]'),
    'dilation': (lambda: change(torch_graph(), 'Conv', 3, dilations=[2, 2]), r'dilations \[2, 2\]'),
    'automatic padding': (lambda: change(torch_graph(), 'Conv', auto_pad='SAME_UPPER', pads=None), 'SAME_UPPER'),
    'groups': (lambda: change(caffe_graph(), 'Conv', 1, group=1), 'has groups 1, not 2'),
    'lrn alpha': (lambda: change(caffe_graph(), 'LRN', 1, alpha=5e-4), 'alpha 0.0005, not 0.0001'),
    'lrn size': (lambda: change(caffe_graph(), 'LRN', size=3), 'size 3, not 5'),
    'lrn bias': (lambda: change(caffe_graph(), 'LRN', bias=2.0), 'bias 2, not 1'),
    'lrn beta': (lambda: change(caffe_graph(), 'LRN', beta=0.5), 'beta 0.5, not 0.75'),
    'pool window': (lambda: change(torch_graph(), 'MaxPool', kernel_shape=[2, 2]), r'windows of \[2, 2\]'),
    'pool padding': (lambda: change(torch_graph(), 'MaxPool', pads=[1] * 4), r'padding \[1, 1, 1, 1\]'),
    'average': (lambda: change(torch_graph(), 'AveragePool', kernel_shape=[2, 2]), 'AveragePool'),
    'flatten': (lambda: change(torch_graph(), 'Flatten', axis=2), 'Flatten'),
    'alpha of Gemm': (lambda: change(torch_graph(), 'Gemm', alpha=0.5), r'has the factor 0\.5, not 1\.0'),
    'no activation': (lambda: without(torch_graph(), 'Relu'), 'Conv.*is followed by MaxPool, not MaxPool, Relu'),
    'activation': (lambda: insert(torch_graph(), 0, 'LeakyRelu'), "it has LeakyRelu 'new'"),
    'batch norm': (lambda: insert(torch_graph(), 0, 'Exp'), "it has Exp 'new'"),
    'normalized input': (lambda: insert(torch_graph(), -1, 'Exp'), "Exp 'new' before the first layer.*preprocessing"),
    'transposed': (lambda: insert(torch_graph(), -1, 'Transpose', perm=[0, 3, 1, 2]), "Transpose 'new' before"),
    'softmax inside': (lambda: insert(torch_graph(), 1, 'Softmax'), "it has Softmax 'new'"),
    'branch': (lambda: with_branch(torch_graph()), "chain of layers: 2 operators.*Relu 'branch'"),
    'input': (lambda: with_shape(torch_graph(), 1, 224, 224, 3), '1 x 224 x 224 x 3'),
    'image size': (lambda: with_shape(torch_graph(), 1, 3, 160, 160), r'Gemm.*kernel.*\(20, 288\).*\(20, \d+\)'),
}


@pytest.mark.parametrize('name', DIFFERENT)
def test_networks_that_differ_are_refused_by_what_differs(name, tmp_path):
    make, reason = DIFFERENT[name]
    with pytest.raises(FormatError, match=reason) as error:
        weight_files.read_weights(saved(make(), tmp_path), mean=MEAN)
    assert str(error.value).isprintable()


def test_preset_that_the_graph_does_not_have(tmp_path):
    path = saved(torch_graph(), tmp_path)
    with pytest.raises(FormatError, match=r'the preset caffe does not compute the same: .*config\.model|Conv'):
        weight_files.read_weights(path, preset='caffe', mean=MEAN)
    assert weight_files.read_weights(path, preset='torchvision').config.model.preset == 'torchvision'
    assert '--crop_size=227: ' in refusal(weight_files.read_weights, str(FIXTURE), crop_size=227)


FIXTURE = Path(__file__).parent / 'fixtures' / 'torchvision_zip.pth'


# Files


def external(folder: Path, location: str = 'model.onnx.data') -> Path:
    """Writes a torchvision export with its weights in a second file, as PyTorch does; returns the first file."""
    path = folder / 'model.onnx'
    onnx.save(torch_graph(), str(path), save_as_external_data=True, location='model.onnx.data', size_threshold=0)
    if location != 'model.onnx.data':
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            next(each for each in tensor.external_data if each.key == 'location').value = location
        path.write_bytes(model.SerializeToString())
    return path


def test_weights_in_a_file_beside(tmp_path):
    path = external(tmp_path)
    assert path.stat().st_size < 10_000
    wanted = weight_files.read_weights(saved(torch_graph(), tmp_path))
    found = weight_files.read_weights(str(path))
    for layer, arrays in wanted.params.items():
        for kind, array in arrays.items():
            np.testing.assert_array_equal(found.params[layer][kind], array, strict=True)
    hub = tmp_path / 'cache' / 'snapshots'  # as in the cache of a model hub: links to files named by their content
    hub.mkdir(parents=True)
    for name in ('model.onnx', 'model.onnx.data'):
        (tmp_path / name).rename(tmp_path / 'cache' / name[::-1])
        (hub / name).symlink_to(f'../{name[::-1]}')
    linked = weight_files.read_weights(str(hub / 'model.onnx'))
    np.testing.assert_array_equal(linked.params['fc8']['kernel'], wanted.params['fc8']['kernel'])


def test_weights_beside_that_cannot_be_used(tmp_path):
    path = external(tmp_path)
    data = tmp_path / 'model.onnx.data'

    def error_of() -> str:
        with pytest.raises(FormatError) as error:
            weight_files.read_weights(str(path))
        return str(error.value)

    data.write_bytes(data.read_bytes()[:-4])
    assert re.search(r'model\.onnx\.data has [\d,]+ bytes, too few for the array', error_of())
    data.rename(tmp_path / 'elsewhere')
    assert 'its weights are in model.onnx.data, which is missing' in error_of()


@pytest.mark.parametrize('location', ['../outside', '{folder}/outside', 'link', 'sub/../../outside', '', 'a\0b'])
def test_weights_in_another_folder_are_not_read(location, tmp_path):
    inner = tmp_path / 'inner'
    (inner / 'sub').mkdir(parents=True)
    path = external(inner, location.format(folder=tmp_path))
    (inner / 'model.onnx.data').rename(tmp_path / 'outside')
    (inner / 'link').symlink_to('../outside')
    with pytest.raises(FormatError, match=r'refused: .*which is not below its folder'):
        weight_files.read_weights(str(path))


def test_truncated_files_are_refused_in_one_line(tmp_path):
    content = torch_graph().SerializeToString()
    path = tmp_path / 'model.onnx'
    for size in (*range(1, 200, 7), *np.linspace(200, len(content) - 1, 60).astype(int)):
        path.write_bytes(content[:size])
        with pytest.raises((FormatError, ConfigError)) as error:
            weight_files.read_weights(str(path))
        assert str(error.value).isprintable()


def test_changed_bytes_are_refused_in_one_line_or_harmless(tmp_path):
    """Bytes between the weights are changed: those of the operators, their attributes and the names."""
    content = torch_graph().SerializeToString()
    path, generator = tmp_path / 'model.onnx', np.random.default_rng(8)
    operators = content.index(b'Conv')
    messages = []
    for position in (*range(12), *generator.integers(operators, operators + 900, 120)):
        changed = bytearray(content)
        changed[position] ^= 1 << generator.integers(0, 8)
        path.write_bytes(changed)
        try:
            weight_files.read_weights(str(path))
        except (FormatError, ConfigError) as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert all(message.isprintable() for message in messages)


def test_corrupt_constants_are_refused(tmp_path):
    model = torch_graph()
    model.graph.initializer[2].raw_data = model.graph.initializer[2].raw_data[:-4]
    with pytest.raises(FormatError, match=r"corrupt: the array 'onnx::Conv_42'"):
        weight_files.read_weights(saved(model, tmp_path))
    model = torch_graph()
    del model.graph.initializer[-1]
    model.graph.input.append(helper.make_tensor_value_info('onnx::Gemm_55', TensorProto.FLOAT, (7,)))
    with pytest.raises(FormatError, match='its inputs are x, onnx::Gemm_55'):
        weight_files.read_weights(saved(model, tmp_path))
    model = torch_graph()
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**40, 2**20]), 'huge'))
    model.graph.node.insert(0, helper.make_node('ConstantOfShape', ['huge'], ['filled'], name='filled'))
    with pytest.raises(FormatError, match="ConstantOfShape 'filled' has the shape"):
        weight_files.read_weights(saved(model, tmp_path))


def test_missing_package_is_named_with_its_installation(tmp_path, monkeypatch):
    path = saved(torch_graph(), tmp_path)
    monkeypatch.setitem(sys.modules, 'onnx', None)
    assert formats.detect_format(path) == 'onnx'
    for call in (weight_files.read_weights, lambda name: importer.check_arguments(['', name, f'{name}.run'], None)):
        assert 'onnx, which reads it, is not installed: pip install "alexnet_jax[export]"' in refusal(call, path)


@pytest.mark.slow
def test_convert_command_imports_onnx(tmp_path):
    path = saved(onnx_graphs.caffe_model(True, size=224), tmp_path)
    done = run_command('-m', 'alexnet_jax', 'convert', path, tmp_path / 'run', f'--mean={MEAN}', '--crop_size=227')
    assert done.returncode == 0, done.stderr
    assert 'caffenet, widths 8, 12, 16, 12, 8, 20, 16, 7 classes' in done.stderr
    refused = run_command('-m', 'alexnet_jax', 'convert', path, tmp_path / 'net.onnx')
    assert 'net.onnx: files are exported from runs' in usage_error(refused)
