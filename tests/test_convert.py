"""Imported weights: logits against PyTorch and against the layers of Caffe in NumPy, and what is rejected.

PyTorch wrote the files of fixtures/, see fixtures/make_torch_fixture.py.
"""

import io
import json
import os
import re
import struct
import subprocess
import types
import zipfile
from pathlib import Path

import caffe_files
import ml_dtypes
import numpy as np
import pytest
from fixtures.make_torch_fixture import CLASSES, WIDTHS, pictures
from helpers import run_command, usage_error
from PIL import Image
from safetensors.numpy import save_file

from alexnet_jax.config import ConfigError, apply_overrides, default_config, resolve
from alexnet_jax.convert import export, importer
from alexnet_jax.inference import trained_model
from alexnet_jax.presets import PRESETS
from alexnet_jax.training.eval_step import make_activation_fn
from alexnet_jax.weights import torch_file, weight_files, weight_layouts
from alexnet_jax.weights.formats import FormatError

FIXTURES = Path(__file__).parent / 'fixtures'
TORCH = np.load(FIXTURES / 'torch_expected.npz')
CAFFE_WIDTHS = (8, 12, 8, 12, 8, 10, 9, 7)


def import_file(path, workdir, preset=None, mean=None, class_names=None) -> None:
    given = types.SimpleNamespace(preset=preset, mean=mean, class_names=class_names, crop_size=None)
    importer.import_file(str(path), str(workdir), given)


def network_of(path, workdir, **flags) -> trained_model.TrainedModel:
    import_file(path, workdir, **flags)
    return trained_model.load_model(trained_model.parse_checkpoint_ref(str(workdir)))


def logits(network: trained_model.TrainedModel, images: np.ndarray) -> np.ndarray:
    step = make_activation_fn(network.config, network.mesh, 'fc8')
    return np.stack(list(network.predict_batches(step, images, network.batch_size(len(images)))))


def state_dict() -> dict[str, np.ndarray]:
    return torch_file.read(str(FIXTURES / 'torchvision_zip.pth'))


def command(*arguments) -> subprocess.CompletedProcess:
    return run_command('-m', 'alexnet_jax.convert', *arguments)


# PyTorch


@pytest.mark.parametrize('name', ['torchvision_zip', 'torchvision_legacy', 'training', 'hub'])
def test_logits_match_torch(name, tmp_path):
    path = FIXTURES / f'{name}.pth'
    if name == 'hub':
        path = tmp_path / 'model'  # The content identifies the format, not the name.
        save_file({f'model.{key}': array.copy() for key, array in state_dict().items()}, path, {'format': 'pt'})
    network = network_of(path, tmp_path / 'run')
    expected = TORCH['logits_half' if name == 'training' else 'logits']
    np.testing.assert_allclose(logits(network, pictures()), expected, atol=1e-4, rtol=0)
    config = network.config
    assert (*config.model.widths, config.model.num_classes) == (*WIDTHS, CLASSES)
    assert (config.model.preset, config.data.crop_size, config.data.image_size) == ('torchvision', 224, 256)
    assert network.step == 0
    assert network.class_names == [f'class {label}' for label in range(CLASSES)]


@pytest.mark.parametrize('name', ['views', 'views_legacy'])
def test_torch_tensors_that_share_storage(name):
    """Strides, offsets, expanded axes, empty tensors, single numbers and types match torch."""
    tensors = torch_file.read(str(FIXTURES / f'{name}.pth'))
    assert tensors.keys() == set(TORCH.files) - {'logits', 'logits_half'}
    for key, array in tensors.items():
        np.testing.assert_array_equal(array.astype(np.float64), TORCH[key], strict=True)
    types_of = {'half': np.float16, 'brain': ml_dtypes.bfloat16, 'double': np.float64, 'whole numbers': np.int64}
    for key, array in tensors.items():
        assert array.dtype == types_of.get(key, np.float32)
        assert not array.flags.writeable or array.size == 0
    assert np.shares_memory(tensors['whole'], tensors['part'])


def test_torch_files_without_checksums_or_with_wrappers(tmp_path):
    """Files without checksums, and the names that torch.compile and DataParallel produce."""
    content = bytearray((FIXTURES / 'torchvision_zip.pth').read_bytes())
    for entry in zipfile.ZipFile(io.BytesIO(content)).infolist():
        written = struct.pack('<I', entry.CRC)
        while written in content:
            content[content.index(written) : content.index(written) + 4] = bytes(4)
    path = tmp_path / 'plain.pth'
    path.write_bytes(content)
    before = state_dict()
    for key, array in torch_file.read(str(path)).items():
        np.testing.assert_array_equal(array, before[key], strict=True)
    renamed = {'net.' + key.replace('s.', 's._orig_mod.module.'): array for key, array in before.items()}
    found = weight_layouts.from_torchvision(renamed)
    assert found['conv2'].kernel_name == 'net.features._orig_mod.module.3.weight'
    np.testing.assert_array_equal(found['fc8'].bias, before['classifier.6.bias'])


# Caffe


@pytest.mark.slow
@pytest.mark.parametrize(
    ('preset', 'form', 'mean_form'),
    [('caffe', 'old', 'binaryproto'), ('caffenet', 'new', 'npy'), ('caffe', 'double', 'numbers')],
)
def test_logits_match_caffe_layers(preset, form, mean_form, tmp_path):
    generator = np.random.default_rng(5)
    layers = caffe_files.random_layers(generator, CAFFE_WIDTHS)
    name = {'caffe': 'AlexNet', 'caffenet': 'CaffeNet'}[preset]
    written = {
        'old': lambda: caffe_files.old_net(name, layers),
        'new': lambda: caffe_files.net(name, {('fc8_mine' if key == 'fc8' else key): layers[key] for key in layers}),
        'double': lambda: caffe_files.net(name, layers, is_double=True),
    }
    path = tmp_path / 'net.caffemodel'
    path.write_bytes(written[form]())

    mean = generator.uniform(80, 140, (3, 8, 8)).repeat(32, 1).repeat(32, 2).astype(np.float32)  # BGR
    mean[:, 100:, 50:] -= 20
    given = str(tmp_path / 'mean')
    if mean_form == 'binaryproto':
        Path(given).write_bytes(caffe_files.old_blob(mean))
    elif mean_form == 'npy':
        np.save(given, mean)
        given += '.npy'
    else:
        mean[:] = np.array([104, 117, 123])[:, None, None]
        given = '123, 117,104'
    images = pictures()[:4]
    network = network_of(path, tmp_path / 'run', mean=given)
    assert network.config.model.preset == preset
    assert network.config.model.num_classes == CAFFE_WIDTHS[-1]
    assert network.config.data.mean == ('channel' if mean_form == 'numbers' else 'image')

    inputs = images.transpose(0, 3, 1, 2)[:, ::-1].astype(np.float64) - mean
    inputs = inputs[:, :, 14:241, 14:241]
    expected = caffe_files.logits(layers, inputs, pool_first=preset == 'caffenet')
    assert np.ptp(expected, 0).min() > 0.05  # The logits depend on the image.
    np.testing.assert_allclose(logits(network, images), expected, atol=1e-4, rtol=0)


def caffemodel(folder: Path, name: str = 'AlexNet', **changes) -> Path:
    layers = caffe_files.random_layers(np.random.default_rng(0), CAFFE_WIDTHS) | changes
    path = folder / 'net.caffemodel'
    path.write_bytes(caffe_files.net(name, {key: layers[key] for key in layers if layers[key]}))
    return path


def test_read_mean_formats(tmp_path):
    """Formats that --mean accepts and rejects."""
    np.testing.assert_array_equal(weight_files.read_mean('1,2.5,-3', 'caffe'), [1, 2.5, -3])
    for preset in ('torchvision', 'modern'):
        mean = weight_files.read_mean(None, preset)
        np.testing.assert_allclose(mean, 255 * np.array([0.485, 0.456, 0.406]), rtol=1e-12)
    path = tmp_path / 'mean'
    array = np.arange(3 * 227 * 227, dtype=np.float32).reshape(3, 227, 227)
    for content in (caffe_files.old_blob(array), caffe_files.blob(array), caffe_files.blob(array[None], True)):
        path.write_bytes(content)
        mean = weight_files.read_mean(str(path), 'caffe')
        assert mean.shape == (227, 227, 3)
        np.testing.assert_array_equal(mean[2, 1], [array[2, 2, 1], array[1, 2, 1], array[0, 2, 1]])
    np.save(tmp_path / 'pixel.npy', array[:, 0, 0])
    np.testing.assert_array_equal(weight_files.read_mean(str(tmp_path / 'pixel.npy'), 'caffe'), array[::-1, 0, 0])
    refused = {
        None: '--mean=FILE',
        '1,2': 'three numbers',
        '1,2,inf,': 'No such file',
        '1,2,': 'three numbers',
        str(tmp_path / 'none'): 'No such file',
        str(tmp_path): 'Is a directory',
    }
    others = {
        'gray': array[:1],
        'wide': array[:, :3],
        'small': array[:, 1:, 1:],
        'nan': array * np.nan,
        'whole': array.astype(int),
    }
    for name, other in others.items():
        np.save(tmp_path / f'{name}.npy', other)
        wanted = 'floating-point' if name in ('nan', 'whole') else re.escape(str(other.shape))
        refused[str(tmp_path / f'{name}.npy')] = wanted
    np.save(tmp_path / 'objects.npy', np.array([{}], object), allow_pickle=True)
    refused[str(tmp_path / 'objects.npy')] = 'objects'
    path.write_bytes(caffe_files.old_blob(array)[:-1])
    refused[str(path)] = str(path)
    for text, reason in refused.items():
        with pytest.raises(ConfigError, match=reason):
            weight_files.read_mean(text, 'caffe')


def test_mean_image_becomes_statistics(tmp_path):
    """The run gets the mean image, its size, and its mean as mean_rgb."""
    mean = np.random.default_rng(0).uniform(0, 255, (3, 230, 230)).astype(np.float32)
    np.save(tmp_path / 'mean.npy', mean)
    network = network_of(caffemodel(tmp_path), tmp_path / 'run', mean=str(tmp_path / 'mean.npy'))
    assert (network.config.data.image_size, network.config.data.mean) == (230, 'image')
    np.testing.assert_array_equal(network.statistics['mean_image'][:, :, 0], mean[2])
    np.testing.assert_allclose(network.statistics['mean_rgb'], mean[::-1].mean((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(network.preprocessing['color'], np.zeros((3, 3)))


# Files that do not fit


def import_error(tensors: dict[str, np.ndarray], folder: Path, preset: str | None = None) -> str:
    """Returns the error of importing a .safetensors file with these arrays; the import leaves no files."""
    path = folder / 'weights'
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
    with pytest.raises(FormatError) as error:
        import_file(path, folder / 'run', preset=preset, mean='1,2,3' if preset else None)
    assert os.listdir(folder) == ['weights']
    return str(error.value)


def test_torch_names_and_shapes_that_do_not_fit(tmp_path):
    state = {name: array.copy() for name, array in state_dict().items()}
    conv2, fc6 = 'features.3.weight', 'classifier.1.weight'

    def error_of(changes, **flags):
        arrays = {name: array for name, array in (state | changes).items() if array is not None}
        return import_error(arrays, tmp_path, **flags)

    def check(text, *words):
        for word in words:
            assert word in text, (word, text)

    check(error_of({'classifier.6.bias': None}), 'lacks classifier.6.bias')
    check(error_of({'features.12.weight': state[conv2]}), 'features.12.weight')
    check(error_of({conv2: None, 'features.4.weight': state[conv2]}), 'lacks features.3.weight', 'features.4.weight')
    many = error_of({name: None for name in state if name.startswith('features')})
    check(many, 'features.0.bias, features.0.weight, features.10.bias', '7 more')
    check(error_of({conv2: state[conv2].swapaxes(0, 1)}), 'torchvision', conv2, '(4, 6, 5, 5)', 'order', '(6, 4, 5, 5)')
    check(error_of({conv2: state[conv2][:, :, :3, :3]}), conv2, '(6, 4, 3, 3)', '(6, 4, 5, 5)')
    check(error_of({fc6: state[fc6][:, :-36]}), fc6, '(8, 108)', '(8, 144)')
    check(error_of({'classifier.4.bias': state['classifier.4.bias'][None]}), '(1, 8)', '(8,)')
    state_with_nan = state[fc6].copy()
    state_with_nan[1, 2:4] = np.nan, np.inf
    check(error_of({fc6: state_with_nan}), fc6, '2 ', '1152', 'finite')
    check(error_of({'classifier.6.bias': np.array([1e300, 0, 0, 0, 0])}), '1 ', '5')
    check(error_of({'classifier.6.weight': state['classifier.6.weight'].astype(np.int8)}), 'int8')
    check(error_of({}, preset='caffe'), 'features.3.weight', '(6, 4, 5, 5)', '(6, 2, 5, 5)')
    narrow = error_of({'features.0.bias': state['features.0.bias'][:3]}, preset='caffe')
    check(narrow, 'preset caffe', 'config.model.widths (conv1): 3')


def test_layers_of_caffe_that_do_not_fit(tmp_path):
    layers = caffe_files.random_layers(np.random.default_rng(0), CAFFE_WIDTHS)
    kernel, bias = layers['conv2']

    def error_of(**changes):
        with pytest.raises(FormatError) as error:
            import_file(caffemodel(tmp_path, **changes), tmp_path / 'run', mean='1,2,3')
        return str(error.value)

    assert 'conv2 has 1 blob' in error_of(conv2=[kernel])
    assert 'lacks conv2' in error_of(conv2=[])
    assert 'fc9' in error_of(fc9=layers['fc8'])
    whole = np.concatenate([kernel, kernel], 1)
    assert re.search(r'conv2 .*\(12, 8, 5, 5\).*\(12, 4, 5, 5\)', error_of(conv2=[whole, bias]))
    with pytest.raises(ConfigError, match=r"'Mine'.*--preset=caffe"):
        import_file(caffemodel(tmp_path, name='Mine'), tmp_path / 'run', mean='1,2,3')
    with pytest.raises(ConfigError, match=r'--mean is missing: .*caffenet'):
        import_file(caffemodel(tmp_path, name='Mine'), tmp_path / 'run', preset='caffenet')
    shape = caffe_files.content(7, caffe_files.content(1, b'\x0c'))
    damaged = caffemodel(tmp_path).read_bytes().replace(shape, shape[:-1] + b'\x0d', 1)
    (tmp_path / 'damaged').write_bytes(damaged)
    with pytest.raises(FormatError, match=r'conv2 .*\(13,\) .*48 bytes'):
        import_file(tmp_path / 'damaged', tmp_path / 'run', mean='1,2,3')
    assert not (tmp_path / 'run').exists()


def test_class_names_flag(tmp_path):
    ids = weight_files.class_names(None, 1000)
    assert (len(set(ids)), ids[0], ids[999], ids == sorted(ids)) == (1000, 'n01440764', 'n15075141', True)
    assert weight_files.class_names(None, 3) == ['class 0', 'class 1', 'class 2']
    path = tmp_path / 'names.txt'
    path.write_text('n02012849 crane\nn01440764 tench, Tinca tinca\nn03126707 crane\n\n', encoding='utf-8')
    assert weight_files.class_names(str(path), 3) == ['n02012849 crane', 'tench, Tinca tinca', 'n03126707 crane']
    path.write_bytes('Löwe \r\nHund\r\n'.encode())
    assert weight_files.class_names(str(path), 2) == ['Löwe', 'Hund']
    refused = {b'a\nb\nc': '3 names.*2 classes', b'a\na\n': "'a'", b'\xff\n': '.*UTF-8'}
    for content, reason in refused.items():
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f'^--class_names={path}: {reason}'):
            weight_files.class_names(str(path), 2)
    with pytest.raises(ConfigError, match='No such file'):
        weight_files.class_names(str(tmp_path / 'none'), 2)


# Native files


def own_file(path: Path, **changes) -> tuple[dict, dict]:
    """Writes a file like the export, of a network with batch normalization; returns its arrays and configuration."""
    config = default_config()
    config.model.preset = 'bn_lars'
    small = {'model.widths': (4, 6, 4, 6, 4, 5, 4), 'model.num_classes': 3, 'data.image_size': 70, 'data.crop_size': 67}
    apply_overrides(config, PRESETS['bn_lars'].recipe | small)
    settings = resolve(config).to_dict()
    sizes = {
        'conv1': (11, 11, 3, 4),
        'conv2': (5, 5, 2, 6),
        'conv3': (3, 3, 6, 4),
        'conv4': (3, 3, 2, 6),
        'conv5': (3, 3, 3, 4),
        'fc6': (4, 5),
        'fc7': (5, 4),
        'fc8': (4, 3),
    }
    generator = np.random.default_rng(0)
    arrays = {f'{layer}.kernel': generator.normal(size=size) for layer, size in sizes.items()}
    arrays |= {f'{layer}.bias': generator.normal(size=size[-1:]) for layer, size in sizes.items()}
    for layer in ('conv1', 'conv2', 'conv3', 'conv4'):
        arrays |= {f'{layer}_norm.{kind}': generator.uniform(1, 2, sizes[layer][-1:]) for kind in ('mean', 'var')}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays |= {
        'statistics.mean_image': generator.uniform(0, 255, (70, 70, 3)),
        'statistics.mean_rgb': generator.uniform(0, 255, 3),
        'statistics.eigenvalues': generator.uniform(0, 255, 3),
        'statistics.eigenvectors': generator.normal(size=(3, 3)),
        'statistics.class_counts': np.array([5, 7, 9]),
    }
    metadata = {
        'format': 'alexnet_jax',
        'config': json.dumps(settings),
        'class_names': '["ape", "bee", "cat"]',
        'step': '40',
    }
    arrays |= {name: array for name, array in changes.items() if '.' in name}
    metadata |= {name: text for name, text in changes.items() if '.' not in name}
    save_file(arrays, path, metadata)
    return arrays, settings


def test_native_files_round_trip(tmp_path):
    """An import returns all numbers, the configuration and the class names."""
    path = tmp_path / 'own.safetensors'
    arrays, settings = own_file(path)
    network = network_of(path, tmp_path / 'run')
    found = {
        f'{layer}.{name}': np.asarray(array)
        for tree in (network.state.params, network.state.batch_stats)
        for layer, leaves in tree.items()
        for name, array in leaves.items()
    } | {f'statistics.{name}': array for name, array in network.statistics.items()}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert network.class_names == ['ape', 'bee', 'cat']
    assert trained_model.parse_checkpoint_ref(str(tmp_path / 'run')).config.to_dict() == settings
    names = tmp_path / 'names'
    names.write_text('x\ny\nz')
    assert network_of(path, tmp_path / 'named', class_names=str(names)).class_names == ['x', 'y', 'z']
    for flag in ('mean', 'preset'):
        with pytest.raises(ConfigError, match=f'^--{flag}: '):
            import_file(path, tmp_path / 'other', **{flag: 'caffe'})


def test_export_and_reimport_keep_the_digest(tmp_path):
    network = network_of(FIXTURES / 'torchvision_legacy.pth', tmp_path / 'run')
    export.write(network, str(tmp_path / 'out.safetensors'))
    again = network_of(tmp_path / 'out.safetensors', tmp_path / 'again')
    assert again.digest == network.digest
    assert again.config == network.config
    for name, array in network.statistics.items():
        np.testing.assert_array_equal(again.statistics[name], array, strict=True)


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'config': '{"model": 3}'}, 'metadata .*config'),
        ({'config': '{"model": {}}'}, 'metadata .*3 .*1000 classes'),  # the defaults
        ({'config': '[1'}, 'metadata'),
        ({'class_names': '["ape"]'}, 'metadata .*1 .*3 classes'),
        ({'conv2_norm.var': np.ones(5, np.float32)}, r'conv2_norm.var .*\(5,\).*\(6,\)'),
        ({'statistics.mean_rgb': np.ones(1)}, r'statistics.mean_rgb .*\(1,\).*\(3,\)'),
        ({'conv5_norm.var': np.ones(4, np.float32)}, 'conv5_norm.var'),
        ({'fc8.bias': np.full(3, np.nan, np.float32)}, 'fc8.bias .*3 .*3 .*finite'),
    ],
)
def test_invalid_native_files_are_rejected(changes, reason, tmp_path):
    own_file(tmp_path / 'own', **changes)
    with pytest.raises(FormatError, match=reason):
        import_file(tmp_path / 'own', tmp_path / 'run')
    assert os.listdir(tmp_path) == ['own']


# The command


@pytest.mark.slow
def test_convert_command(tmp_path):
    """The command writes a run for other commands, and does not change existing files."""
    source, run = FIXTURES / 'torchvision_legacy.pth', tmp_path / 'run'
    names = tmp_path / 'names'
    names.write_text('ape\nbee\ncat\ndog\neel')
    done = command(source, run, f'--class_names={names}', '--mean=120,110,100')
    assert (done.returncode, done.stdout) == (0, '')
    assert f'{run}: torchvision, widths 4, 6, 8, 6, 4, 8, 8, 5 classes' in done.stderr
    network = trained_model.load_model(trained_model.parse_checkpoint_ref(f'{run}/checkpoints/0'))
    assert network.class_names == ['ape', 'bee', 'cat', 'dog', 'eel']
    np.testing.assert_array_equal(network.preprocessing['mean'][7, 9], [120, 110, 100])
    assert sorted(os.listdir(tmp_path)) == ['names', 'run']

    def traces():
        return {str(path): path.stat().st_mtime_ns for path in run.rglob('*')}

    before = traces()
    assert str(run) in usage_error(command(source, run))
    assert traces() == before
    Image.new('RGB', (8, 8)).save(tmp_path / 'weights.pth', 'PNG')
    refusals = {
        (source,): (2, 'alexnet_jax: '),
        (tmp_path / 'none.pth', tmp_path / 'new'): (2, f'{tmp_path}/none.pth'),
        (run, tmp_path / 'out.safetensors', '--preset=caffe'): (2, '--preset: '),
        (run, tmp_path / 'out.pth'): (2, f'{tmp_path}/out.pth'),
        (tmp_path / 'best', tmp_path / 'out.onnx'): (2, 'config.json'),
        (caffemodel(tmp_path), tmp_path / 'new'): (2, '--mean is missing: '),
        (tmp_path / 'weights.pth', tmp_path / 'new'): (1, f'{tmp_path}/weights.pth: '),
        (source, names / 'new'): (2, str(names / 'new')),
    }
    for arguments, (code, reason) in refusals.items():
        refused = command(*arguments)
        lines = [line for line in refused.stderr.splitlines() if 'alexnet_jax: ' in line]
        assert (refused.returncode, len(lines)) == (code, 1), refused.stderr
        assert reason in lines[0]
        assert 'Traceback' not in refused.stderr
        assert not (tmp_path / 'new').exists()
