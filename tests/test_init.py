"""Runs that start from weights: what is taken, from which files and runs, and what is refused.

Oracles: the arrays in the file of PyTorch, transposed here; weights made by NumPy; runs without an interruption.
"""

import dataclasses
import os
import re
import shutil
import signal
from pathlib import Path

import caffe_files
import jax
import numpy as np
import pytest
from fixtures.make_torch_fixture import CLASSES, WIDTHS
from helpers import (
    config_flags,
    edit_progress,
    free_port,
    read_json,
    read_lines,
    read_result,
    refusal,
    run_command,
    start_command,
    usage_error,
    wait_for,
)
from PIL import Image
from safetensors.numpy import save_file
from small_runs import make_run, open_dataset, small_config

from alexnet_jax import parallel
from alexnet_jax.config import preset_config, resolve
from alexnet_jax.data import dataset
from alexnet_jax.inference import trained_model
from alexnet_jax.prepare.writer import PrepareConfig, prepare
from alexnet_jax.runtime.workdir import (
    check_resumable,
    read_dataset_statistics,
    write_dataset_statistics,
)
from alexnet_jax.shapes import layer_table
from alexnet_jax.training import trainer
from alexnet_jax.training.checkpointing import Checkpointer, state_digest
from alexnet_jax.training.init_source import order_of_classes, with_settings_of_init
from alexnet_jax.training.initial_weights import init_state_from, read_initial_weights
from alexnet_jax.training.state import init_state
from alexnet_jax.weights import torch_file
from alexnet_jax.weights.weight_files import NetworkWeights, read_weights

FILE = Path(__file__).parent / 'fixtures' / 'torchvision_zip.pth'
NAMES = ['ape', 'bee', 'cat', 'dog', 'eel']
TORCHVISION = {
    'model.widths': WIDTHS,
    'data.image_size': 240,
    'train.batch_size': 4,
    'train.steps': 1,
    'eval.views': 1,
}
MODULES = {'conv1': 'features.0', 'conv2': 'features.3', 'conv5': 'features.10', 'fc7': 'classifier.4'}


@pytest.fixture(autouse=True)
def _programs(compiled_programs):
    """Child processes share their compiled programs."""


def write_pictures(folder: Path, names: list[str]) -> str:
    """Writes three training pictures and a validation picture per class, and returns the source."""
    generator = np.random.default_rng(0)
    for split, count in (('train', 3), ('val', 1)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(picture).resize((120, 100)).save(folder / split / name / f'{i}.png')
    return f'folder:{folder}'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> dict[str, object]:
    """Sources of five and of three classes, and the folder of their prepared data sets."""
    folder = tmp_path_factory.mktemp('pictures')
    five, three = (write_pictures(folder / name, NAMES[:count]) for name, count in (('five', 5), ('three', 3)))
    return {'five': five, 'three': three, 'data_dir': str(folder / 'data')}


def torchvision(pictures, source: str, workdir: Path, *flags: str, **fields):
    """Runs the network of FILE on a source of `pictures`."""
    settings = TORCHVISION | {'data.source': pictures[source], 'data.data_dir': pictures['data_dir']} | fields
    command = ['launch.py', '--config=configs/imagenet.py:torchvision', f'--workdir={workdir}']
    return run_command(*command, *config_flags(settings), *flags)


def convert(workdir: Path, class_names: Path | None = None) -> Path:
    read = read_weights(str(FILE), class_names=class_names and str(class_names))
    trained_model.import_weights_as_run(
        str(workdir), read.config, read.params, read.batch_stats, read.statistics, read.class_names
    )
    return workdir


def params_of(workdir: Path) -> dict[str, dict[str, np.ndarray]]:
    return jax.device_get(trained_model.load_model(str(workdir)).state.params)


def check_taken(params: dict[str, dict[str, np.ndarray]]) -> None:
    """Compares layers with those of FILE, byte by byte."""
    tensors = torch_file.read(str(FILE))
    for layer, module in MODULES.items():
        kernel = tensors[f'{module}.weight']
        kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        np.testing.assert_array_equal(params[layer]['kernel'], kernel)
        np.testing.assert_array_equal(params[layer]['bias'], tensors[f'{module}.bias'])


@pytest.mark.slow
def test_imported_weights_for_other_classes_are_refused_with_the_command_that_works(pictures, tmp_path):
    """Case F6: the network has 5 classes, the data have 3."""
    imported = convert(tmp_path / 'imported')
    assert usage_error(torchvision(pictures, 'three', imported, **{'model.num_classes': 3})) == (
        f'config.model.num_classes: 3, but {imported} has imported weights of a network with 5; --init={imported}'
        ' --workdir=NEW starts a new run from the weights'
    )
    refused = torchvision(pictures, 'three', imported, **{'model.num_classes': 'auto'})
    assert refused.returncode == 2
    assert f'3, but {imported} has imported weights of a network with 5; --init=' in refused.stderr.splitlines()[-1]
    workdir = tmp_path / 'new'
    fields = {'model.num_classes': 'auto', 'train.steps': 0, 'data.std': (2.0,), 'data.color': 'fb'}
    run = torchvision(pictures, 'three', workdir, f'--init={imported}', **fields)
    assert run.returncode == 0, run.stderr
    lines = [line[9:] for line in run.stderr.splitlines()]
    assert 'fc8 is drawn anew: kernel (8, 3), but (8, 5) in the weights' in lines
    taken = ', '.join(['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7'])
    assert f'{imported}: the weights of {taken} are taken' in lines
    assert sum('drawn anew' in line for line in lines) == 1
    assert f'config.data.std: (2.0,) -> (58.395, 57.12, 57.375), as in {imported}' in lines
    params = params_of(workdir)
    check_taken(params)
    assert params['fc8']['kernel'].shape == (8, 3)
    assert len(np.unique(params['fc8']['kernel'])) == 24
    statistics, class_names = read_dataset_statistics(str(workdir))
    assert class_names == NAMES[:3]
    np.testing.assert_array_equal(statistics['mean_rgb'], (123.675, 116.28, 103.53))
    np.testing.assert_array_equal(statistics['mean_image'], np.full((240, 240, 3), (123.675, 116.28, 103.53)))
    np.testing.assert_array_equal(statistics['class_counts'], [3, 3, 3])
    assert (statistics['eigenvalues'] > 0).all()
    config = read_json(workdir / 'config.json')
    assert (config['train']['init'], config['data']['std']) == (str(imported), [58.395, 57.12, 57.375])


@pytest.mark.slow
def test_imported_weights_are_trained_on(pictures, tmp_path):
    """Case F7: nothing has begun, so source, encoding, image size, batch size and seed of the command count."""
    names = tmp_path / 'names.txt'
    names.write_text('\n'.join(NAMES))
    workdir = convert(tmp_path / 'run', names)
    before = params_of(workdir)
    free = {'model.num_classes': 5, 'seed': 3, 'data.encoding': 'jpeg', 'optimizer.momentum': 0.5}
    run = torchvision(pictures, 'five', workdir, **free)
    assert run.returncode == 0, run.stderr
    assert f'training starts from the imported weights in {workdir}' in run.stderr
    assert '->' not in run.stderr  # no setting of the import counts as changed
    assert read_json(workdir / 'config.json')['train']['batch_size'] == 4
    after = params_of(workdir)
    assert np.abs(after['conv1']['kernel'] - before['conv1']['kernel']).max() < 0.1  # one step away
    assert not np.array_equal(after['fc8']['kernel'], before['fc8']['kernel'])
    run = torchvision(pictures, 'five', workdir, **free | {'train.steps': 2})
    assert run.returncode == 0, run.stderr
    assert f'resuming {workdir} at step 1 of 2' in run.stderr
    assert 'was started with 3' in usage_error(torchvision(pictures, 'five', workdir, **free | {'seed': 4}))


def imported_photos(photos_dir: str, workdir: Path, **fields) -> tuple[str, object]:
    """Makes a run of imported weights with a mean of their own; returns its folder and configuration."""
    config = small_config(photos_dir, **fields)
    make_run(workdir, config)
    statistics, names = read_dataset_statistics(str(workdir))
    shutil.rmtree(workdir)
    mean = {'mean_image': statistics['mean_image'] + 5, 'mean_rgb': statistics['mean_rgb'] + 5}
    zeros = {'eigenvalues': np.zeros(3), 'eigenvectors': np.eye(3), 'class_counts': np.zeros(16, np.int64)}
    params = jax.device_get(init_state(config, parallel.make_mesh(one_device(config))).params)
    trained_model.import_weights_as_run(str(workdir), config, params, {}, mean | zeros, names)
    return str(workdir), config


def one_device(config):
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, layout='data', data=1, model=1))


def start(config, workdir, mesh=None):
    """Returns restore_or_init() in `workdir`."""
    checkpoints = Checkpointer(os.path.join(workdir, 'checkpoints'), keep=1, config=config)
    mesh = mesh or parallel.make_mesh(one_device(config))
    return trainer.restore_or_init(config, str(workdir), mesh, open_dataset(config), checkpoints)


def test_imported_run_is_whole_until_its_first_own_checkpoint(photos_dir, tmp_path):
    """A kill between the start and the first checkpoint harms neither the next start nor prediction."""
    workdir, config = imported_photos(photos_dir, tmp_path / 'run')
    weights, _ = read_dataset_statistics(workdir)
    for _ in range(2):
        statistics = start(config, workdir)[2]
        of_data = open_dataset(config).statistics
        for name in ('mean_image', 'mean_rgb'):
            np.testing.assert_array_equal(statistics[name], weights[name])
        for name in ('eigenvalues', 'eigenvectors', 'class_counts'):
            np.testing.assert_array_equal(statistics[name], of_data[name])
    network = trained_model.load_model(workdir)
    np.testing.assert_array_equal(network.statistics['mean_rgb'], weights['mean_rgb'])
    assert set(network.statistics) == set(of_data)
    write_dataset_statistics(workdir, of_data, network.class_names)
    assert 'is of another run' in refusal(trained_model.load_model, workdir)


def test_imported_mean_image_fixes_the_size_of_the_images(photos_dir, tmp_path):
    workdir, config = imported_photos(photos_dir, tmp_path / 'run')
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=80))
    assert refusal(check_resumable, other, workdir) == (
        f'config.data.image_size: 80, but the mean image of the weights in {workdir} has 72 pixels; use 72'
    )
    with_init = dataclasses.replace(config, train=dataclasses.replace(config.train, init=workdir))
    assert 'has imported weights already' in refusal(check_resumable, with_init, workdir)
    edit_progress(tmp_path / 'run' / 'checkpoints' / '0', dataset_fingerprint='0' * 64)  # a run that has begun
    assert 'was started with 72' in refusal(check_resumable, other, workdir)


# Layers and classes


def random_weights(config, names: list[str]) -> NetworkWeights:
    generator = np.random.default_rng(7)
    table = layer_table(config.model, config.data.crop_size, config.data.channels)
    params = {
        row.name: {
            'kernel': generator.normal(0, 0.1, row.kernel).astype(np.float32),
            'bias': generator.normal(0, 0.1, row.bias).astype(np.float32),
        }
        for row in table
    }
    norms = {
        f'{row.name}_norm': {
            kind: generator.uniform(1, 2, row.output[-1:]).astype(np.float32) for kind in ('mean', 'var')
        }
        for row in table
        if 'batch_norm' in row.spec.ops
    }
    return NetworkWeights(config, params, norms, {}, names)


DENSE = {'model__widths': (8, 0, 0, 0, 16, 32, 32), 'train__init': '/weights'}
NORMED = ('activation batch_norm', '', '', '', 'activation batch_norm pool')


@pytest.mark.parametrize(('layout', 'data', 'model'), [('data', 1, 1), ('towers', 4, 2), ('hybrid', 4, 2)])
def test_layers_are_taken_alike_on_every_mesh(photos_dir, capfd, layout, data, model):
    """The weights lack fc7, and their conv1 has another width, so conv5 to fc6 are taken."""
    mesh = {'mesh__layout': layout, 'mesh__data': data, 'mesh__model': model, 'model__conv_ops': NORMED}
    config = small_config(photos_dir, **DENSE, **mesh)
    theirs = small_config(photos_dir, **DENSE | {'model__widths': (12, 0, 0, 0, 16, 32, 0)}, model__conv_ops=NORMED)
    theirs = dataclasses.replace(theirs, model=dataclasses.replace(theirs.model, towers=2))
    names = [f'photo {i}' for i in range(16)]
    weights, on_mesh = random_weights(theirs, names), parallel.make_mesh(config)
    weights.params['conv5'] = random_weights(config, names).params['conv5']
    state = init_state_from(weights, config, on_mesh, names)
    plain = jax.device_get(init_state(one_device(config), parallel.make_mesh(one_device(config))))
    err = capfd.readouterr().err
    assert 'conv1 is drawn anew: kernel (11, 11, 3, 8), but (11, 11, 3, 12) in the weights\n' in err
    assert 'fc7 is drawn anew: kernel (32, 32), but the weights have no such layer\n' in err
    assert err.count('drawn anew') == 3  # conv5 reads 4 maps of conv1 and not 6
    assert '/weights: the weights of fc6, fc8 are taken\n' in err
    for layer, arrays in jax.device_get(state.params).items():
        expected = weights.params if layer in ('fc6', 'fc8') else plain.params
        for kind, array in arrays.items():
            np.testing.assert_array_equal(array, expected[layer][kind])
    np.testing.assert_array_equal(state.batch_stats['conv1_norm']['mean'], np.zeros(8))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(state.opt_state)))
    assert int(state.step) == 0


def test_state_from_weights_is_the_same_on_every_mesh(photos_dir):
    digests = set()
    for layout, data, model in (('data', 1, 1), ('towers', 4, 2), ('hybrid', 4, 2)):
        config = small_config(photos_dir, **DENSE, mesh__layout=layout, mesh__data=data, mesh__model=model)
        weights = random_weights(config, ['a', 'b'] * 8)
        digests.add(state_digest(init_state_from(weights, config, parallel.make_mesh(config), ['a', 'b'] * 8)))
    assert len(digests) == 1


def test_batch_norm_statistics_come_with_their_layer(photos_dir):
    config = one_device(small_config(photos_dir, model__conv_ops=NORMED, train__init='/weights'))
    weights = random_weights(config, ['a', 'b'] * 8)
    state = init_state_from(weights, config, parallel.make_mesh(config), ['a', 'b'] * 8)
    for layer in ('conv1_norm', 'conv5_norm'):
        for kind in ('mean', 'var'):
            np.testing.assert_array_equal(state.batch_stats[layer][kind], weights.batch_stats[layer][kind])


@pytest.mark.parametrize(
    ('of_weights', 'order', 'said'),
    [
        (['c', 'a', 'b'], [1, 2, 0], 'in the order of the classes of the data'),
        (['class 0', 'class 1', 'class 2'], [0, 1, 2], 'only number their classes'),
        (['a', 'b', 'c'], [0, 1, 2], ''),
        (['a', 'b', 'x'], None, "fc8 is drawn anew, because the weights are for other classes: label 2 is 'c' in"),
        (['class 0', 'class 1', 'x'], None, "label 0 is 'a' in the data and 'class 0' in the weights"),
    ],
)
def test_fc8_is_matched_by_class_names(of_weights, order, said):
    found, line = order_of_classes(of_weights, ['a', 'b', 'c'])
    assert found == order
    assert said in line
    assert bool(said) == bool(line)


def test_columns_of_fc8_follow_the_names(photos_dir):
    config = one_device(small_config(photos_dir, train__init='/weights'))
    names = [f'photo {i}' for i in range(16)]
    weights = random_weights(config, names)
    fc8 = init_state_from(weights, config, parallel.make_mesh(config), names[::-1]).params['fc8']
    for label in range(16):
        np.testing.assert_array_equal(fc8['kernel'][:, label], weights.params['fc8']['kernel'][:, 15 - label])
        assert fc8['bias'][label] == weights.params['fc8']['bias'][15 - label]
    anew = init_state_from(weights, config, parallel.make_mesh(config), [*names[:-1], 'other']).params['fc8']
    plain = init_state(config, parallel.make_mesh(config)).params['fc8']
    np.testing.assert_array_equal(anew['kernel'], plain['kernel'])


# Settings


def test_preprocessing_comes_from_the_weights_and_other_functions_are_named(photos_dir, tmp_path, capfd):
    run = make_run(tmp_path / 'run', small_config(photos_dir, model__lrn_k=1.5))
    ours = small_config(
        photos_dir,
        train__init=run,
        data__mean='none',
        data__std=(2.0, 3.0, 4.0),
        data__mean_crop='center',
        model__conv_ops=('activation lrn', '', '', '', 'pool activation'),
        model__inverted_dropout=True,
    )
    config = with_settings_of_init(ours, str(tmp_path / 'new'))
    lines = [line[9:] for line in capfd.readouterr().err.splitlines()]
    assert lines == [
        f'config.data.mean: none -> image, as in {run}',
        f'config.data.mean_crop: center -> matching, as in {run}',
        f'config.data.std: (2.0, 3.0, 4.0) -> (64.0,), as in {run}',
        f'conv5 is followed by pool activation, but by activation pool in {run}',
        f'config.model.lrn_k: 2.0, but 1.5 in {run}, so the layers compute other functions',
        f'config.model.inverted_dropout: True, but False in {run}, so the layers compute other functions',
    ]
    assert (config.data.mean, config.data.mean_crop, config.data.std) == ('image', 'matching', (64.0,))
    assert config.model == ours.model


def test_crop_size_of_the_weights_is_taken_if_only_that_fits(photos_dir, tmp_path, capfd):
    run = make_run(tmp_path / 'run', small_config(photos_dir))
    config = small_config(photos_dir, train__init=run, data__crop_size=48)
    assert with_settings_of_init(config, str(tmp_path / 'new')).data.crop_size == 64
    assert f'config.data.crop_size: 48 -> 64, as in {run}' in capfd.readouterr().err
    fits = small_config(photos_dir, train__init=run, data__crop_size=67)  # the same sizes after conv1
    assert with_settings_of_init(fits, str(tmp_path / 'new')).data.crop_size == 67


def broken(kind: str, folder: Path, photos_dir: str) -> str:
    """Makes something that train.init cannot use, and returns the path or URL."""
    path = folder / kind.replace(' ', '_')
    if kind == 'truncated':
        path.write_bytes(FILE.read_bytes()[:9000])
    elif kind == 'text':
        path.write_text('no weights')
    elif kind == 'caffe':
        layers = caffe_files.random_layers(np.random.default_rng(5), (8, 12, 8, 12, 8, 10, 9, 7))
        path.write_bytes(caffe_files.net('AlexNet', layers))
    elif kind in ('empty folder', 'no such step'):
        path.mkdir()
        if kind == 'no such step':
            path = make_run(path / 'run', small_config(photos_dir)) + '/checkpoints/7'
    elif kind == 'no checkpoint':
        shutil.rmtree(f'{make_run(path, small_config(photos_dir))}/checkpoints/0')
    elif kind == 'no statistics':
        os.remove(f'{make_run(path, small_config(photos_dir))}/dataset_statistics.npz')
    return 'https://example.com/alexnet.pth' if kind == 'url' else str(path)


@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        ('url', r'is a URL; download the file'),
        ('missing', r'there is no such file or folder; name a file of weights, or a run'),
        ('truncated', r'truncated: .*(corrupt|truncated|ends|not a)'),
        ('text', r'text: of an unknown format'),
        ('caffe', r'convert it first with alexnet convert \S+ RUN --mean=\.\.\., then --init=RUN'),
        ('empty folder', r'has no config\.json; name a run'),
        ('no such step', r'has no such checkpoint; the checkpoints are those of steps 0'),
        ('no checkpoint', r'has no such checkpoint; train there first'),
        ('no statistics', r'dataset_statistics\.npz cannot be read'),
    ],
)
def test_unusable_weights_are_refused_in_one_line(kind, said, photos_dir, tmp_path):
    init = broken(kind, tmp_path, photos_dir)
    config = small_config(photos_dir, train__init=init)
    message = refusal(with_settings_of_init, config, str(tmp_path / 'new'))
    assert message.startswith(f'config.train.init: {init}')
    assert re.search(said, message), message


def test_weights_that_fit_nowhere_name_their_network(tmp_path):
    config = preset_config('caffe')
    config.train.init = str(FILE)
    message = refusal(with_settings_of_init, resolve(config), str(tmp_path))
    assert 'conv1: kernel (11, 11, 3, 96), but (11, 11, 3, 4) in the weights' in message
    assert f"preset torchvision with --config.model.widths='{WIDTHS}'" in message
    assert message.endswith('or --config=finetune:torchvision')


def test_mean_image_of_another_size_is_refused(photos_dir, tmp_path):
    run = make_run(tmp_path / 'run', small_config(photos_dir))
    config = small_config(photos_dir, train__init=run, data__image_size=80)
    message = refusal(with_settings_of_init, config, str(tmp_path / 'new'))
    assert message.endswith(f'but the mean image of {run} has 72 pixels; use --config.data.image_size=72')


def test_folder_of_a_model_hub_and_relative_paths(tmp_path, monkeypatch):
    (tmp_path / 'hub').mkdir()
    save_file(
        {name: array.copy() for name, array in torch_file.read(str(FILE)).items()}, tmp_path / 'hub/model.safetensors'
    )
    monkeypatch.chdir(tmp_path)
    config = preset_config('torchvision')
    config.model.widths, config.train.init = WIDTHS, 'hub'
    config = resolve(config)
    assert config.train.init == str(tmp_path / 'hub')
    weights = read_initial_weights(with_settings_of_init(config, str(tmp_path / 'new')).train.init)
    check_taken(weights.params)
    assert weights.config.model.num_classes == CLASSES


# Whole runs


def photos_command(photos_dir: str, workdir: Path, *flags: str, **fields) -> list[str]:
    settings = {
        'model.widths': '(8,0,0,0,16,32,32)',
        'model.lrn': False,
        'train.batch_size': 64,
        'train.steps': 4,
        'train.log_every': 1,
        'checkpoint.every': 1,
        'eval.every': 100,
        'eval.views': 1,
        'eval.batch_size': 400,
        'data.data_dir': photos_dir,
    }
    settings |= {name.replace('__', '.'): value for name, value in fields.items()}
    return ['launch.py', f'--workdir={workdir}', *config_flags(settings), *flags]


@pytest.fixture(scope='module')
def weights_run(photos_dir, tmp_path_factory) -> Path:
    """A run with the network of photos_command() and data.std=64, whose inputs are not those of photos_command()."""
    fields = {'model__conv1_stride': 4, 'model__conv_ops': None, 'model__widths': (8, 0, 0, 0, 16, 32, 32)}
    config = small_config(photos_dir, model__lrn=False, **fields)
    return Path(make_run(tmp_path_factory.mktemp('weights') / 'run', config))


@pytest.mark.slow
def test_killed_run_resumes_exactly_without_its_weights(weights_run, photos_dir, tmp_path):
    weights = Path(shutil.copytree(weights_run, tmp_path / 'weights'))
    whole = run_command(*photos_command(photos_dir, tmp_path / 'whole', f'--init={weights}'))
    assert whole.returncode == 0, whole.stderr
    assert f'config.data.std: (1.0,) -> (64.0,), as in {weights}' in whole.stderr
    digest = read_result(tmp_path / 'whole')['state_digest']
    workdir = tmp_path / 'killed'
    command = photos_command(photos_dir, workdir, f'--config.train.init={weights}', train__steps=100000)
    run = start_command(*command)
    wait_for(lambda: (workdir / 'checkpoints' / '2').exists() or run.poll() is not None)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    for step in (workdir / 'checkpoints').iterdir():
        if step.name not in ('1', '2'):
            shutil.rmtree(step)  # written before the signal arrived
    shutil.rmtree(weights)
    refused = usage_error(run_command(*photos_command(photos_dir, workdir, f'--init={FILE}')))
    assert refused.startswith(f"config.train.init: '{FILE}', but {workdir} was started with '{weights}'")
    resumed = run_command(*photos_command(photos_dir, workdir))  # --init is not needed again
    assert resumed.returncode == 0, resumed.stderr
    assert re.findall(r'config\.\S+: .* -> .*', resumed.stderr) == ['config.train.steps: 100000 -> 4']
    assert read_result(workdir)['state_digest'] == digest
    again = run_command(*photos_command(photos_dir, workdir, f'--init={weights}'))
    assert again.returncode == 0
    assert f'{workdir} is done' in again.stdout


@pytest.mark.slow
def test_two_processes_start_from_the_same_weights(weights_run, photos_dir, tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    init = (f'--init={weights_run}',)
    run = run_command(*photos_command(photos_dir, one, *init, train__steps=1), JAX_NUM_CPU_DEVICES='2')
    assert run.returncode == 0, run.stderr
    group = (f'--coordinator_address=localhost:{free_port()}', '--num_processes=2')
    command = photos_command(photos_dir, two, *init, *group, train__steps=1)
    processes = [start_command(*command, f'--process_id={i}') for i in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert read_result(two)['state_digest'] == read_result(one)['state_digest']


@pytest.mark.slow
def test_losses_are_equal_on_every_mesh(weights_run, photos_dir, tmp_path):
    losses = {}
    for layout, data, model in (('data', 1, 1), ('towers', 4, 2), ('hybrid', 4, 2)):
        mesh = {'mesh__layout': layout, 'mesh__data': data, 'mesh__model': model}
        workdir = tmp_path / f'{layout}_{model}'
        command = photos_command(photos_dir, workdir, f'--init={weights_run}', **mesh)
        run = run_command(*command, JAX_NUM_CPU_DEVICES='8')
        assert run.returncode == 0, run.stderr
        losses[layout] = [line['loss'] for line in read_lines(workdir / 'metrics.jsonl') if 'learning_rate' in line]
    np.testing.assert_allclose(losses['towers'], losses['data'], rtol=1e-5)
    np.testing.assert_allclose(losses['hybrid'], losses['data'], rtol=1e-5)


@pytest.mark.slow
def test_sweep_of_weights_and_plan(weights_run, photos_dir, tmp_path):
    plan = run_command(*photos_command(photos_dir, tmp_path / 'plan', f'--init={weights_run}', '--dry_run'))
    assert plan.returncode == 0, plan.stderr
    assert f'starts at step 0 in {tmp_path}/plan, from the weights in {weights_run}' in plan.stdout
    config = tmp_path / 'sweep.py'
    config.write_text(
        'from alexnet_jax.sweep import Variant\n'
        'from configs.quickstart import get_config\n\n'
        'def sweep():\n'
        f"    return [Variant('tuned', {{'train.init': {str(weights_run)!r}}}, seed=1), Variant('scratch')]\n"
    )
    command = photos_command(photos_dir, tmp_path / 'sweep', '--sweep=all', train__steps=1)
    command.insert(1, f'--config={config}')
    run = run_command(*command)
    assert run.returncode == 0, run.stderr
    assert read_json(tmp_path / 'sweep/tuned/seed_1/config.json')['data']['std'] == [64.0]
    assert read_json(tmp_path / 'sweep/scratch/config.json')['data']['std'] == [1.0]
    assert '2 of 2 runs are done' in run_command(*command).stderr


@pytest.mark.slow
def test_frozen_convolutions_stay_those_of_the_weights(weights_run, photos_dir, tmp_path):
    fields = {'optimizer.lr_multipliers': "(('conv*', 0.0),)"}
    run = run_command(*photos_command(photos_dir, tmp_path / 'run', f'--init={weights_run}', **fields))
    assert run.returncode == 0, run.stderr
    before, after = params_of(weights_run), params_of(tmp_path / 'run')
    for layer, arrays in after.items():
        for kind, array in arrays.items():
            assert np.array_equal(array, before[layer][kind]) == layer.startswith('conv'), (layer, kind)


def test_flag_and_field_must_agree(photos_dir, tmp_path):
    flags = ('--init=a', '--config.train.init=b')
    message = usage_error(run_command(*photos_command(photos_dir, tmp_path / 'run', *flags)))
    assert message == '--init: a, but --config.train.init=b; give one of them'


# The source of the experiment


@pytest.mark.slow
def test_half_of_the_photographs_has_the_patches_of_all(photos_dir, tmp_path):
    settings = PrepareConfig('photos:second/3', image_size=72)
    prepare(settings, str(tmp_path))
    part = dataset.open_prepared(str(tmp_path / 'prepared' / 'photos_second_3_72px'), settings)
    whole = dataset.open_prepared(f'{photos_dir}/prepared/photos_72px', PrepareConfig('photos', image_size=72))
    assert part.class_names == whole.class_names[8:]
    for split, count in (('train', 3), ('validation', 100)):
        ours, theirs = ([] for _ in range(2))
        for examples, found in ((getattr(part, split), ours), (getattr(whole, split), theirs)):
            found += [(int(examples[i]['label']), examples[i]['image'].tobytes()) for i in range(len(examples))]
        assert len(ours) == 8 * count
        assert {(label + 8, image) for label, image in ours} <= set(theirs)
        assert all(sum(label == each for label, _ in ours) == count for each in range(8))


@pytest.mark.parametrize('source', ['photos:third', 'photos:first/0', 'photos:first/401', 'photos:second/x'])
def test_other_selections_of_photographs_are_refused(source, tmp_path):
    with pytest.raises(Exception, match=r'not photos:first or photos:second.* from 1 to 400'):
        prepare(PrepareConfig(source, image_size=72), str(tmp_path))
