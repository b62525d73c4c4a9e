"""Exported files: their logits against those of the network itself, whose inputs NumPy preprocesses."""

import dataclasses
import json
import os
import re
import shutil
import sys
import types

import jax
import ml_collections
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from helpers import ROOT, read_json, refusal, run_command
from jax import export as jax_export
from PIL import Image

from alexnet_jax import augment
from alexnet_jax.config import default_config, resolve
from alexnet_jax.convert import export
from alexnet_jax.inference import trained_model
from alexnet_jax.inference.images import read_image_file
from alexnet_jax.presets import PRESETS
from alexnet_jax.training.eval_step import make_predict_step
from alexnet_jax.training.state import TrainState, build_model
from alexnet_jax.weights import weight_files

CLASSES = ['tench', 'Gänse "grau"', 'a, b', *(f'class {i}' for i in range(9))]
SMALL = {'model.widths': (8, 16, 24, 16, 8, 24, 20), 'model.num_classes': 12, 'data.image_size': 75}
STRONG = {'model.lrn_alpha': 0.05}  # for activations of about 1
CASES = {
    'paper': ('paper', {**SMALL, **STRONG, 'data.image_size': 107, 'data.crop_size': 96}),  # fc6 sees 2 x 2 pixels
    'krizhevsky2012': (
        'krizhevsky2012',
        {'data.crop_size': 64, 'model.spatial_lrn_alpha': 0.05, **SMALL, **STRONG},
    ),
    'no_exchange': ('no_exchange', {**SMALL, **STRONG, 'data.image_size': 107, 'data.crop_size': 96}),
    'caffe': ('caffe', {'data.crop_size': 67, **SMALL, **STRONG}),
    'torchvision': ('torchvision', {'data.crop_size': 64, **SMALL}),
    'bn_lars': ('bn_lars', {'data.crop_size': 67, **SMALL}),
    'cifar10_13pct': ('cifar10_13pct', {'model.widths': (8, 8, 6, 4, 0, 0, 0), 'model.num_classes': 12}),
    'd2l': ('d2l', {'data.crop_size': 69, **SMALL}),
    # As bvlcalexnet of the model zoo: only the last pooling has a window over the edge.
    'zoo': (
        'caffe',
        {
            **SMALL,
            **STRONG,
            'data.image_size': 107,
            'data.crop_size': 96,
            'model.conv_ops': (*('activation lrn pool',) * 2, *('activation',) * 2, 'activation ceil_pool'),
        },
    ),
    # conv1 has the pooling of the removed conv2 too.
    'without_conv2': (
        'paper',
        {**SMALL, **STRONG, 'data.crop_size': 67, 'model.widths': (8, 0, 24, 16, 8, 24, 20)},
    ),
    # No preset has these: locally connected conv4 within its tower, even windows, removed layers.
    'odd': (
        'krizhevsky2012',
        {
            **SMALL,
            **STRONG,
            'data.crop_size': 64,
            'model.widths': (8, 16, 24, 16, 0, 24, 0),
            'model.kernel_sizes': (8, 4, 3, 2, 3),
            'model.locally_connected': ('conv4',),
            'model.cross_tower': ('conv2',),
            'model.activation': 'tanh',
            'model.overlapping_pool': False,
            'model.dropout': 0.2,
            'model.dropout_on_inputs_of': ('fc6', 'fc8'),
        },
    ),
}


def settings(preset, changes):
    """The network and the preprocessing of a preset, with `changes`, resolved."""
    config = default_config()
    recipe = {name: value for name, value in PRESETS[preset].recipe.items() if name.startswith('data.')}
    config.update_from_flattened_dict({'model.preset': preset, **recipe, **changes})
    return resolve(config)


def weights(config):
    """Returns random weights that keep activations and logits at about 1."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(build_model(config)[1], jax.random.key(0))

    def one(path, leaf):
        layer, kind = path[-2].key, path[-1].key
        if layer.endswith('_norm'):
            low, high = {'mean': (-0.5, 0.5), 'var': (0.5, 2.0)}[kind]
            return rng.uniform(low, high, leaf.shape).astype(np.float32)
        std = 0.1
        if kind == 'kernel':
            halved = layer in config.model.dropout_on_inputs_of and not config.model.inverted_dropout
            inputs = leaf.shape[2:3] if layer in config.model.locally_connected else leaf.shape[:-1]
            std = np.sqrt((8 if halved else 2) / np.prod(inputs))
        if (layer, kind) == ('conv1', 'kernel'):
            std *= np.mean(config.data.std) / 64
        return (std * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def statistics(config):
    """Returns invented training-set statistics."""
    rng = np.random.default_rng(1)
    size, channels, classes = config.data.image_size, config.data.channels, config.model.num_classes
    values = rng.standard_normal((channels, channels))
    eigenvalues, eigenvectors = np.linalg.eigh(values @ values.T)
    return {
        'mean_image': rng.uniform(60, 190, (size, size, channels)),
        'mean_rgb': rng.uniform(100, 140, channels),
        'eigenvalues': eigenvalues,
        'eigenvectors': eigenvectors,
        'class_counts': rng.integers(1, 99, classes),
    }


def network_of(config):
    params, batch_statistics = weights(config)
    return trained_model.TrainedModel(
        name='run',
        workdir='',
        step=321,
        digest='',
        config=config,
        mesh=None,
        state=TrainState(np.int32(321), params, {}, batch_statistics),
        statistics=statistics(config),
        class_names=CLASSES,
    )


def pictures(config, count=7):
    """Returns stored images (count, S, S, C), and their center crops, the inputs of an export."""
    size, crop = config.data.image_size, config.data.crop_size
    # Blocks, because images of single-pixel noise give nearly equal logits.
    blocks = np.random.default_rng(2).integers(0, 256, (count, 11, 11, config.data.channels), np.uint8)
    images = blocks.repeat(-(-size // 11), 1).repeat(-(-size // 11), 2)[:, :size, :size]
    start = (size - crop) // 2
    return images, images[:, start : start + crop, start : start + crop]


def logits_of(network, crops):
    """Returns the logits of the model itself, with its preprocessing in NumPy."""
    data = network.config.data
    start = (data.image_size - data.crop_size) // 2
    crop = slice(start, start + data.crop_size)
    mean = {
        'image': network.statistics['mean_image'][crop, crop],
        'channel': network.statistics['mean_rgb'],
        'none': 0.0,
    }[data.mean]
    inputs = ((crops - mean) / np.array(data.std)).astype(np.float32)
    graph, state = build_model(network.config)[0], network.state
    model = jax.jit(lambda params, means, x: nnx.merge(graph, params, means)(x))
    return np.asarray(model(state.params, state.batch_stats, inputs))


@pytest.fixture(scope='module', params=CASES)
def case(request):
    """Returns a network, images of its crop size, and its logits."""
    network = network_of(settings(*CASES[request.param]))
    crops = pictures(network.config)[1]
    logits = logits_of(network, crops)
    assert np.abs(logits).max() < 20
    assert logits.std(0).mean() > 0.1  # otherwise the logits of another image would pass
    return network, crops, logits


@pytest.mark.slow
def test_stablehlo_gives_the_logits_of_the_network(case, tmp_path):
    network, crops, logits = case
    export.write(network, str(tmp_path / 'net.stablehlo'))
    exported = jax_export.deserialize(bytearray((tmp_path / 'net.stablehlo').read_bytes()))
    assert exported.platforms == ('cpu', 'cuda', 'tpu')
    for rows in (1, 7):
        np.testing.assert_allclose(exported.call(crops[:rows]), logits[:rows], rtol=0, atol=1e-4)


def test_onnx_gives_the_logits_of_the_network(case, tmp_path):
    network, crops, logits = case
    path = str(tmp_path / 'net.onnx')
    export.write(network, path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    for rows in (1, 7):
        (given,) = session.run(['logits'], {'images': crops[:rows]})
        np.testing.assert_allclose(given, logits[:rows], rtol=0, atol=1e-4)


def test_onnx_graph_of_the_paper_has_one_operator_per_layer(tmp_path):
    network = network_of(settings(*CASES['paper']))
    export.write(network, str(tmp_path / 'net.onnx'))
    model = onnx.load(tmp_path / 'net.onnx')
    kinds = [node.op_type for node in model.graph.node]
    counts = {kind: kinds.count(kind) for kind in ('Conv', 'LRN', 'MaxPool', 'Gemm', 'Relu')}
    assert counts == {'Conv': 5, 'LRN': 2, 'MaxPool': 3, 'Gemm': 3, 'Relu': 7}
    assert len(kinds) == 29
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    groups = [attribute.i for attribute in attributes if attribute.name == 'group']
    assert groups == [1, 2, 1, 2, 2]
    labels = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(labels.pop('class_names')) == CLASSES
    assert {name: labels[name] for name in ('preset', 'step', 'format')} == {
        'preset': 'paper',
        'step': '321',
        'format': 'alexnet_jax',
    }
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ('images', 'tensor(uint8)', ['batch', 96, 96, 3])
    assert (logits.name, logits.type, logits.shape) == ('logits', 'tensor(float)', ['batch', 12])


def test_onnx_imports_as_the_network_that_was_exported(case, tmp_path):
    network, _, _ = case
    export.write(network, str(tmp_path / 'net.onnx'))
    weights = weight_files.read_weights(str(tmp_path / 'net.onnx'))
    assert weights.config == network.config
    assert weights.class_names == CLASSES
    jax.tree.map(np.testing.assert_array_equal, weights.params, network.state.params)
    jax.tree.map(np.testing.assert_array_equal, weights.batch_stats, network.state.batch_stats)
    made = augment.make_preprocess_params(weights.statistics, network.config.data)
    start = (network.config.data.image_size - network.config.data.crop_size) // 2
    crop = slice(start, start + network.config.data.crop_size)
    np.testing.assert_array_equal(made['mean'][crop, crop], network.preprocessing['mean'][crop, crop])
    np.testing.assert_array_equal(made['scale'], network.preprocessing['scale'])
    assert made['mean'].shape == network.preprocessing['mean'].shape


def prepared_by_metadata(metadata: dict[str, str], picture: Image.Image) -> np.ndarray:
    """Returns the input of an exported program, from its metadata alone."""
    size, crop = int(metadata['image_size']), int(metadata['crop_size'])
    assert (metadata['dtype'], metadata['value_range'], metadata['layout'][:4]) == ('uint8', '0 to 255', 'NHWC')
    picture = picture.convert({'RGB': 'RGB', 'gray': 'L'}[metadata['color_order']])
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    assert metadata['resize_filter'].startswith('bicubic')
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    for side in (size, crop):
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 3 else pixels[None, :, :, None]


@pytest.mark.parametrize('name', ['paper', 'torchvision', 'd2l'])
def test_onnx_file_says_how_to_prepare_a_picture(name, tmp_path):
    preset, changes = CASES[name]
    network = network_of(settings(preset, changes))
    export.write(network, str(tmp_path / 'net.onnx'))
    blocks = np.random.default_rng(5).integers(0, 256, (12, 17, 3), np.uint8)
    picture = Image.fromarray(blocks.repeat(13, 0).repeat(13, 1))
    picture.save(tmp_path / 'cat.png')

    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'))
    meta = session.get_modelmeta()
    (found,) = session.run(None, {'images': prepared_by_metadata(meta.custom_metadata_map, picture)})
    data = network.config.data
    margin = (data.image_size - data.crop_size) // 2
    crop = slice(margin, margin + data.crop_size)
    wanted = logits_of(network, read_image_file(str(tmp_path / 'cat.png'), data)[None, crop, crop])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)

    mean, scale = (json.loads(meta.custom_metadata_map[key]) for key in ('mean', 'scale'))
    expected = {
        'image': network.statistics['mean_image'][crop, crop].mean((0, 1)),
        'channel': network.statistics['mean_rgb'],
        'none': np.zeros(data.channels),
    }[data.mean]
    np.testing.assert_allclose(mean, expected, atol=1e-3)
    np.testing.assert_allclose(scale, np.broadcast_to(1 / np.array(data.std), data.channels), rtol=1e-5)
    model = onnx.load(tmp_path / 'net.onnx')
    for text in (model.doc_string, model.graph.input[0].doc_string, meta.custom_metadata_map['preparation']):
        for part in (f'{data.crop_size} x {data.crop_size}', str(data.image_size), 'uint8', '0 to 255', 'bicubic'):
            assert part in text
        assert ('red, green, blue' if data.channels == 3 else 'gray') in text
    assert 'class_names' in model.graph.output[0].doc_string


def run_stablehlo(path, images):
    return np.asarray(jax_export.deserialize(bytearray(path.read_bytes())).call(images))


def run_onnx(path, images):
    return onnxruntime.InferenceSession(str(path)).run(['logits'], {'images': images})[0]


def test_bfloat16_is_kept_by_stablehlo_and_not_by_onnx(tmp_path):
    preset, changes = CASES['torchvision']
    network = network_of(settings(preset, {**changes, 'model.dtype': 'bfloat16'}))
    crops = pictures(network.config)[1]
    own, exact = logits_of(network, crops), logits_of(network_of(settings(preset, changes)), crops)
    rounding = np.abs(own - exact).mean()
    assert rounding > 0.01
    export.write(network, str(tmp_path / 'net.stablehlo'))
    export.write(network, str(tmp_path / 'net.onnx'))
    # The compiler may keep more digits between two operations in one of the programs.
    assert np.abs(run_stablehlo(tmp_path / 'net.stablehlo', crops) - own).mean() < 0.1 * rounding
    np.testing.assert_allclose(run_onnx(tmp_path / 'net.onnx', crops), exact, rtol=0, atol=1e-4)


@pytest.fixture(scope='module')
def on_a_mesh(tmp_path_factory):
    """Returns a run, loaded from its folder onto a mesh of 4 x 2 devices."""
    preset, changes = CASES['bn_lars']
    config = settings(preset, {**changes, 'mesh.data': 4, 'mesh.model': 2, 'train.batch_size': 32})
    workdir = str(tmp_path_factory.mktemp('runs') / 'run')
    params, batch_statistics = weights(config)
    trained_model.import_weights_as_run(workdir, config, params, batch_statistics, statistics(config), CLASSES)
    return trained_model.load_model(trained_model.parse_checkpoint_ref(workdir))


@pytest.mark.slow
def test_exports_of_a_sharded_network_match_its_predictions(on_a_mesh, tmp_path):
    network = on_a_mesh
    assert dict(network.mesh.shape) == {'data': 4, 'model': 2}
    assert not network.state.params['fc6']['kernel'].sharding.is_fully_replicated
    stored, crops = pictures(network.config)
    predict = make_predict_step(network.config, network.mesh, views=1)
    wanted = np.stack(list(network.predict_batches(predict, stored, network.batch_size(len(stored)))))
    for ending, run in (('stablehlo', run_stablehlo), ('onnx', run_onnx)):
        export.write(network, str(tmp_path / f'net.{ending}'))
        given = jax.nn.log_softmax(run(tmp_path / f'net.{ending}', crops))
        np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-4)


def test_safetensors_have_all_arrays_unchanged(on_a_mesh, tmp_path):
    path = str(tmp_path / 'net.safetensors')
    by_columns = {name: np.asfortranarray(array) for name, array in on_a_mesh.statistics.items()}
    network = dataclasses.replace(on_a_mesh, statistics=by_columns)
    export.write(network, path)
    params, batch_statistics = weights(network.config)
    groups = {**params, **batch_statistics, 'statistics': network.statistics}
    wanted = {f'{group}.{name}': array for group, arrays in groups.items() for name, array in arrays.items()}
    given = safetensors.numpy.load_file(path)
    assert given.keys() == wanted.keys()
    for name, array in wanted.items():
        assert given[name].dtype == array.dtype
        np.testing.assert_array_equal(given[name], array)
    assert {'conv1.kernel', 'fc8.bias', 'conv2_norm.mean', 'statistics.mean_image'} <= given.keys()
    with safetensors.safe_open(path, 'numpy') as file:
        metadata = file.metadata()
    assert {name: metadata[name] for name in ('format', 'step')} == {'format': 'alexnet_jax', 'step': '0'}
    assert json.loads(metadata['class_names']) == CLASSES
    assert resolve(ml_collections.ConfigDict(json.loads(metadata['config']))) == network.config


def test_safetensors_have_the_settings_of_the_run(on_a_mesh, tmp_path):
    shutil.copytree(on_a_mesh.workdir, tmp_path / 'run')
    path = tmp_path / 'run' / 'config.json'
    written = read_json(path)
    written['mesh']['data'] = 8
    written['data']['data_dir'] = '/home/somebody'
    path.write_text(json.dumps(written))
    network = trained_model.load_model(trained_model.parse_checkpoint_ref(str(tmp_path / 'run')))
    assert network.config.mesh.model == 1  # 16 devices are too many
    export.write(network, str(tmp_path / 'net.safetensors'))
    with safetensors.safe_open(tmp_path / 'net.safetensors', 'numpy') as file:
        settings = json.loads(file.metadata()['config'])
    written['data']['data_dir'] = '~/tensorflow_datasets'  # not the folder of the user who exports
    assert settings == written


def examples():
    """Returns the loaders in the documentation, by the suffix of the file that they load."""
    text = (ROOT / 'docs' / 'weights.md').read_text().split('## Export')[1]
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    return {re.search(r"'alexnet\.(\w+)'", block)[1]: block for block in blocks}


FOREIGN = {'stablehlo': ('alexnet_jax', 'flax'), 'onnx': ('alexnet_jax', 'jax', 'onnx'), 'safetensors': ()}


@pytest.mark.slow
@pytest.mark.parametrize('ending', FOREIGN)
def test_loader_of_the_documentation_in_another_process(on_a_mesh, tmp_path, ending):
    stored, crops = pictures(on_a_mesh.config)
    export.write(on_a_mesh, str(tmp_path / f'alexnet.{ending}'))
    np.save(tmp_path / 'images.npy', stored if ending == 'safetensors' else crops)
    program = f"""
import sys
import numpy as np
images = np.load('images.npy')
{examples()[ending]}
imported = [name for name in {FOREIGN[ending]} if name in sys.modules]
assert not imported, imported
np.save('logits.npy', np.asarray(logits))
"""
    python_path = str(ROOT) if ending == 'safetensors' else ''
    run = run_command('-c', program, cwd=tmp_path, PYTHONPATH=python_path, JAX_PLATFORMS='cpu')
    assert run.returncode == 0, run.stderr
    wanted = logits_of(network_of(on_a_mesh.config), crops)
    np.testing.assert_allclose(np.load(tmp_path / 'logits.npy'), wanted, rtol=0, atol=1e-4)


def test_programs_contain_no_path_of_this_machine(tmp_path):
    network = network_of(settings(*CASES['paper']))
    for ending in ('stablehlo', 'onnx'):
        export.write(network, str(tmp_path / f'net.{ending}'))
        content = (tmp_path / f'net.{ending}').read_bytes()
        assert len(content) > 50_000
        assert str(ROOT).encode() not in content
        assert sys.prefix.encode() not in content
    assert jax.config.jax_hlo_source_file_canonicalization_regex is None


@pytest.mark.parametrize('name', ['net', 'net.pb', 'net.onnx.gz', 'onnx'])
def test_other_suffixes_are_refused(tmp_path, name):
    message = refusal(export.write, None, str(tmp_path / name))
    assert f'{name}: its suffix must be .safetensors, .stablehlo or .onnx' in message
    assert not list(tmp_path.iterdir())


def test_capital_suffix_and_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    export.write(network_of(settings(*CASES['cifar10_13pct'])), '~/NET.ONNX')
    onnx.checker.check_model(str(tmp_path / 'NET.ONNX'))


@pytest.mark.parametrize('path', ['none/net.onnx', 'folder.onnx'])
def test_files_that_cannot_be_written_are_refused(tmp_path, path):
    (tmp_path / 'folder.onnx').mkdir()
    message = refusal(export.write, None, str(tmp_path / path))
    assert f'{path} cannot be written; name a file in a writable folder' in message


@pytest.mark.parametrize(('ending', 'library'), [('onnx', 'onnx'), ('stablehlo', 'flatbuffers')])
def test_missing_library_is_named_with_its_installation(tmp_path, monkeypatch, ending, library):
    monkeypatch.setitem(sys.modules, library, None)
    message = refusal(export.write, None, str(tmp_path / f'net.{ending}'))
    assert f'{library} is not installed: pip install' in message
    assert f'\n{library}==' in (ROOT / 'requirements-export.txt').read_text()


@pytest.mark.parametrize('ending', ['onnx', 'stablehlo'])
def test_too_large_weights_are_refused(tmp_path, ending):
    params = {'fc6': {'kernel': np.broadcast_to(np.float32(0), (2**15, 2**14))}}
    network = types.SimpleNamespace(state=types.SimpleNamespace(params=params, batch_stats={}))
    message = refusal(export.write, network, str(tmp_path / f'net.{ending}'))
    assert 'limited to 2 GB, but the weights take 2.1 GB; write .safetensors' in message


@pytest.mark.parametrize('ending', ['safetensors', 'onnx', 'stablehlo'])
def test_failing_export_keeps_the_previous_file(tmp_path, monkeypatch, ending):
    network = dataclasses.replace(network_of(settings(*CASES['cifar10_13pct'])), workdir=str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps(network.config.to_dict()))
    target = tmp_path / f'net.{ending}'
    target.write_bytes(b'before')

    def full(file):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left'):
            export.write(network, str(target))
    assert target.read_bytes() == b'before'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', target.name]
    export.write(network, str(target))
    assert target.stat().st_size > 10_000
