"""Folders for a model hub: their files, the model card, and the way back; they are never taken for a run."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from helpers import read_json, refusal, run_command, usage_error
from PIL import Image

from alexnet_jax.config import apply_overrides, default_config, resolve
from alexnet_jax.convert import export, hub_folder, importer
from alexnet_jax.inference import trained_model
from alexnet_jax.runtime.checkpoint_ref import parse_checkpoint_ref
from alexnet_jax.training.state import build_model
from alexnet_jax.weights import weight_files

CLASSES = ['ape', 'bee | wasp', 'Möwe']
SECRET = '/home/somebody'
FIELDS = {
    'model.preset': 'paper',
    'model.widths': (8, 0, 0, 0, 16, 0, 32),
    'model.num_classes': 3,
    'model.lrn': False,
    'model.towers': 1,
    'data.image_size': 72,
    'data.crop_size': 64,
    'data.source': f'folder:{SECRET}/animals',
    'data.data_dir': f'{SECRET}/data',
    'data.prepared_dir': f'{SECRET}/prepared',
    'train.init': f'{SECRET}/runs/before',
    'train.batch_size': 24,
    'seed': 71,
}
RESULT = {
    'status': 'done',
    'step': 0,
    'views': {
        '1': {'loss': 0.75, 'top1_error': 0.25, 'top5_error': 0.0625, 'examples': 160.0},
        '10': {'loss': 0.5, 'top1_error': 0.125, 'top5_error': 0.03125, 'examples': 160.0},
    },
}
ENVIRONMENT = {
    'versions': {'python': '3.13.0', 'jax': '0.12.0.1'},
    'processor': 'AMD EPYC, 2 cores',
    'devices': 'cpu',
    'device_count': 4,
    'processes': 2,
    'command': ['launch.py', f'--workdir={SECRET}/runs/x'],
    'folder': SECRET,
}


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """A run with results, trained on another machine."""
    workdir = tmp_path_factory.mktemp('runs') / 'run'
    config = default_config()
    apply_overrides(config, FIELDS)
    resolved = resolve(config)
    params, batch_statistics = jax.device_get(build_model(resolved)[1](jax.random.key(0)))
    generator = np.random.default_rng(0)
    statistics = {
        'mean_image': generator.uniform(60, 190, (72, 72, 3)),
        'mean_rgb': generator.uniform(100, 140, 3),
        'eigenvalues': generator.uniform(0, 9, 3),
        'eigenvectors': np.eye(3),
        'class_counts': np.array([400, 500, 534]),
    }
    trained_model.import_weights_as_run(str(workdir), resolved, params, batch_statistics, statistics, CLASSES)
    (workdir / 'result.json').write_text(json.dumps(RESULT))
    (workdir / 'environment.json').write_text(json.dumps(ENVIRONMENT))
    return workdir


@pytest.fixture(scope='module')
def hub(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('hub') / 'animals'
    export.write(trained_model.load_model(str(run)), f'{folder}/')
    return folder


def front_matter(folder: Path) -> dict:
    _, block, _ = (folder / 'README.md').read_text().split('---\n', 2)
    return yaml.safe_load(block)


def test_files_of_the_folder(run, hub):
    assert sorted(path.name for path in hub.iterdir()) == [
        'README.md',
        'config.json',
        'kernels.png',
        'model.safetensors',
    ]
    assert os.listdir(hub.parent) == ['animals']
    config = read_json(hub / 'config.json')
    assert config['id2label'] == {'0': 'ape', '1': 'bee | wasp', '2': 'Möwe'}
    assert config['label2id'] == {'ape': 0, 'bee | wasp': 1, 'Möwe': 2}
    assert (config['architectures'], config['preset'], config['num_labels']) == (['AlexNet'], 'paper', 3)
    assert config['settings']['data']['source'] == 'folder:animals'
    assert config['settings']['seed'] == 71
    assert config['input']['crop_size'] == '64'
    with Image.open(hub / 'kernels.png') as picture:
        assert picture.width > 100
    for path in hub.iterdir():
        assert SECRET.encode() not in path.read_bytes()
        assert str(run.parent).encode() not in path.read_bytes()


def test_model_card(hub):
    metadata = front_matter(hub)
    assert metadata['library_name'] == 'alexnet_jax'
    assert metadata['pipeline_tag'] == 'image-classification'
    assert 'license' not in metadata
    (model,) = metadata['model-index']
    (result,) = model['results']
    assert (model['name'], result['task']['type']) == ('animals', 'image-classification')
    values = {metric['name']: metric['value'] for metric in result['metrics']}
    assert values == {
        'top-1 accuracy, 1 view': 0.75,
        'top-5 accuracy, 1 view': 0.9375,
        'top-1 accuracy, 10 views': 0.875,
        'top-5 accuracy, 10 views': 0.96875,
    }
    text = (hub / 'README.md').read_text()
    for part in (
        '`folder:animals`, 1,434 training images',
        '| seed | 71 |',
        '| 10 views | 0.5000 | 12.50 % | 3.12 % | 160 |',
        '4 x cpu, processes: 2; AMD EPYC, 2 cores',
        'python 3.13.0, jax 0.12.0.1',
        "alexnet_jax.load('animals')",
        '64 x 64 pixels',
        'ape, bee \\| wasp, Möwe',
        '`before`',
        '![Kernels of the first layer](kernels.png)',
    ):
        assert part in text, part
    assert 'Evaluations' not in text


def test_evaluations_and_errors_of_other_steps_in_the_card(run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'evaluations').mkdir()
    digest = trained_model.load_model(str(run)).digest
    evaluation = {'source': f'folder:{SECRET}/v2', 'split': 'test', 'views': 10, 'images': 12, 'digest': digest}
    evaluation |= {'top1_error': 0.4375, 'top5_error': 0.5, 'folder': SECRET, 'kind': 'alexnet evaluation'}
    (tmp_path / 'run' / 'evaluations' / 'v2_test.json').write_text(json.dumps(evaluation))
    several = evaluation | {'real_labels': f'{SECRET}/real.json', 'top1_error': 0.25}
    (tmp_path / 'run' / 'evaluations' / 'v2_test_real_labels.json').write_text(json.dumps(several))
    other = evaluation | {'digest': 'of other weights', 'top1_error': 0.75}
    (tmp_path / 'run' / 'evaluations' / 'other.json').write_text(json.dumps(other))
    (tmp_path / 'run' / 'evaluations' / 'broken.json').write_text('{')
    (tmp_path / 'run' / 'result.json').write_text(json.dumps(RESULT | {'step': 900}))
    export.write(trained_model.load_model(str(tmp_path / 'run')), f'{tmp_path}/given/')
    text = (tmp_path / 'given' / 'README.md').read_text()
    assert '| `folder:v2` | test | 10 views | 12 | top1 error 43.75 %, top5 error 50.00 % |' in text
    assert '| `folder:v2`, right labels of real.json | test | 10 views | 12 | top1 error 25.00 %,' in text
    assert '75.00 %' not in text
    assert SECRET not in text
    assert 'The errors of these weights were not recorded.' in text
    assert 'model-index' not in front_matter(tmp_path / 'given')


def test_folder_gives_back_the_same_bytes(run, hub):
    network = trained_model.load_model(str(run))
    file = weight_files.find_weights(str(hub))
    assert file == str(hub / 'model.safetensors')
    weights = weight_files.read_weights(file)
    assert weights.class_names == CLASSES
    for found, wanted in (
        (weights.params, jax.device_get(network.state.params)),
        (weights.batch_stats, jax.device_get(network.state.batch_stats)),
        (weights.statistics, network.statistics),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, wanted)


def test_no_run_is_written_into_a_hub_folder(hub):
    before = {path.name: path.read_bytes() for path in hub.iterdir()}
    message = usage_error(run_command('launch.py', '--config=configs/quickstart.py', f'--workdir={hub}'))
    assert f'--workdir: {hub} has weights for a model hub; use another --workdir' in message
    assert {path.name: path.read_bytes() for path in hub.iterdir()} == before


def test_hub_folders_and_runs_are_told_apart(run, hub, tmp_path):
    for name in (hub, hub / 'best', hub / 'checkpoints' / '0'):
        message = refusal(parse_checkpoint_ref, str(name))
        assert 'has weights for a model hub and is no run' in message
        assert f'alexnet convert {hub} WORKDIR' in message
    assert weight_files.find_weights(str(run)) is None
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    shutil.copy(hub / 'model.safetensors', copy)  # users export into the folder of the run
    assert weight_files.find_weights(str(copy)) is None
    assert trained_model.load_model(str(copy)).step == 0
    shutil.rmtree(copy / 'checkpoints')
    assert weight_files.find_weights(str(copy)) is None  # its other files are those of a run
    foreign = tmp_path / 'foreign'  # a folder of a model hub that another program wrote
    foreign.mkdir()
    (foreign / 'config.json').write_text('{"architectures": ["AlexNet"]}')
    (foreign / 'model.safetensors').write_bytes(b'')
    assert weight_files.find_weights(str(foreign)) == str(foreign / 'model.safetensors')


@pytest.mark.parametrize('name', ['full/', 'full', 'file/', 'none', 'gs://bucket/x/'])
def test_targets_that_cannot_be_used(name, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'notes').touch()
    (tmp_path / 'file').touch()
    path = name if name.startswith('gs') else f'{tmp_path}/{name}'
    message = refusal(export.validate_target, path)
    wanted = {
        'full/': 'is not empty',
        'full': 'is not empty',
        'file/': 'is a file',
        'none': 'the name of a folder ends with a slash',
        'gs://bucket/x/': 'not to a URL',
    }
    assert wanted[name] in message
    assert sorted(os.listdir(tmp_path)) == ['file', 'full']


@pytest.mark.parametrize('name', ['new/', 'empty', 'empty/', 'a b.onnx/'])
def test_targets_that_are_folders(name, tmp_path):
    (tmp_path / 'empty').mkdir()
    assert export.validate_target(f'{tmp_path}/{name}') == '/'


def test_failing_export_leaves_no_folder(run, tmp_path, monkeypatch):
    network = trained_model.load_model(str(run))

    def full(file):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left'):
            export.write(network, f'{tmp_path}/given/')
    assert os.listdir(tmp_path) == []
    (tmp_path / 'given').mkdir()
    export.write(network, f'{tmp_path}/given')
    assert len(os.listdir(tmp_path / 'given')) == 4


def test_card_of_imported_weights(tmp_path):
    fixture = Path(__file__).parent / 'fixtures' / 'torchvision_zip.pth'
    weights = weight_files.read_weights(str(fixture))
    trained_model.import_weights_as_run(
        str(tmp_path / 'run'),
        weights.config,
        weights.params,
        weights.batch_stats,
        weights.statistics,
        weights.class_names,
    )
    export.write(trained_model.load_model(str(tmp_path / 'run')), f'{tmp_path}/given/')
    text = (tmp_path / 'given' / 'README.md').read_text()
    assert 'imported; they were not trained by this program' in text
    assert 'seed' not in text


def test_data_set_of_a_hub_is_named():
    assert 'datasets: ["org/cats"]' in hub_folder._front_matter('x', 'hf:org/cats', {})
    assert 'datasets' not in hub_folder._front_matter('x', 'hf:cats', {})


def test_folders_without_weights_say_what_to_name(tmp_path):
    (tmp_path / 'saved_model.pb').write_bytes(b'\x08\x01')
    assert "TensorFlow's SavedModel" in refusal(importer.check_arguments, ['', str(tmp_path), 'run'], None)
    (tmp_path / 'saved_model.pb').rename(tmp_path / 'pytorch_model.bin')
    message = refusal(importer.check_arguments, ['', str(tmp_path), 'run'], None)
    assert f'{tmp_path}: a folder without a run; name a file of weights in it, such as pytorch_model.bin' in message


@pytest.mark.slow
def test_convert_command_there_and_back(run, tmp_path):
    given, again = tmp_path / 'given', tmp_path / 'again'
    done = run_command('-m', 'alexnet_jax', 'convert', run, f'{given}/')
    assert (done.returncode, done.stdout) == (0, ''), done.stderr
    assert 'model.safetensors, config.json, kernels.png, README.md' in done.stderr
    assert 'has weights for a model hub' in usage_error(run_command('-m', 'alexnet_jax', 'predict', given, 'cat.jpg'))
    done = run_command('-m', 'alexnet_jax', 'convert', given, again)
    assert done.returncode == 0, done.stderr
    first, second = (trained_model.load_model(str(workdir)) for workdir in (run, again))
    assert first.digest == second.digest
    assert second.class_names == CLASSES
