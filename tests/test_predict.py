"""The predict command: softmax means over views by NumPy, a prediction or an error per file, invalid input."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import config_flags, read_json, read_result, refusal, run_command, usage_error
from PIL import Image
from small_runs import SMALL, center_crop, make_run, open_dataset, small_config
from zoo import zoo

from alexnet_jax.config import ConfigError
from alexnet_jax.evaluate import predictions
from alexnet_jax.inference import trained_model
from alexnet_jax.inference.images import expand_paths, load_images, read_image_file
from alexnet_jax.training.state import build_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_programs')]


@pytest.fixture(scope='module')
def config(photos_dir):
    return small_config(photos_dir)


@pytest.fixture(scope='module')
def run(config, tmp_path_factory) -> str:
    return make_run(tmp_path_factory.mktemp('runs') / 'run', config)


def predict(*arguments, **variables: str):
    return run_command('-m', 'alexnet_jax.predict', *arguments, **{'JAX_NUM_CPU_DEVICES': '2', **variables})


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


@pytest.fixture(scope='module')
def probabilities(run, config):
    """Returns a function of an image (S, S, C) uint8: the mean probabilities of its ten crops, or of its center."""
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(run))
    state = jax.device_get(loaded.state)
    model = nnx.merge(build_model(loaded.config)[0], state.params, state.batch_stats)
    mean, crop = loaded.statistics['mean_image'].astype(np.float32), config.data.crop_size
    margin = config.data.image_size - crop

    def of(image: np.ndarray, views: int) -> np.ndarray:
        if views == 1:
            windows = [center_crop(image, config, loaded.statistics)]
        else:
            places = [(margin // 2, margin // 2), (0, 0), (0, margin), (margin, 0), (margin, margin)]
            cut = [
                (image[y : y + crop, x : x + crop].astype(np.float32) - mean[y : y + crop, x : x + crop]) / 64
                for y, x in places
            ]
            windows = cut + [window[:, ::-1] for window in cut]
        logits = np.asarray(model(jnp.asarray(np.stack(windows).astype(np.float32))))
        return np.mean([softmax(row) for row in logits], 0)

    return of


@pytest.fixture(scope='module')
def animals(tmp_path_factory) -> Path:
    """Returns a folder with the files of zoo.py, and an image in a folder with the name of a class."""
    folder = tmp_path_factory.mktemp('pictures')
    for name, (content, _) in zoo().items():
        (folder / name).write_bytes(content)
    (folder / 'brick').mkdir()
    gradient = np.arange(100 * 120 * 3).reshape(100, 120, 3) % 251
    Image.fromarray(gradient.astype(np.uint8)).save(folder / 'brick' / 'wall.png')
    (folder / '.hidden').write_text('is ignored')
    return folder


@pytest.mark.parametrize('views', [1, 10])
def test_every_file_gets_a_prediction_or_an_error(run, animals, probabilities, tmp_path, views):
    done = predict(run, animals, f'--views={views}', '--json', '--top=99', f'--figure={tmp_path / "f.png"}')
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr
    rows = {Path(row['file']).name: row for row in map(json.loads, done.stdout.splitlines())}
    kinds = zoo()
    assert set(rows) == {*kinds, 'wall.png'}
    for name, (_, expected) in kinds.items():
        if isinstance(expected, str):
            assert re.search(expected, rows[name]['error'])
            assert f'{name}: {rows[name]["error"]}' in done.stderr
            continue
        assert [len(rows[name]['top']), rows[name]['label']] == [16, None]
    bad = sum(isinstance(expected, str) for _, expected in kinds.values())
    assert f'{bad} of {len(kinds) + 1}' in done.stderr
    for name in ('picture.bmp', 'palette.png', 'brick/wall.png'):
        row = rows[Path(name).name]
        expected = probabilities(
            read_image_file(str(animals / name), trained_model.parse_checkpoint_ref(run).config.data), views
        )
        found = {each['class']: each['probability'] for each in row['top']}
        classes = trained_model.load_model(trained_model.parse_checkpoint_ref(run)).class_names
        np.testing.assert_allclose([found[each] for each in classes], expected, rtol=2e-4)
        assert [each['probability'] for each in row['top']] == sorted(found.values(), reverse=True)
    assert rows['wall.png']['label'] == 'brick'
    with Image.open(tmp_path / 'f.png') as figure:
        assert figure.width > 500
    assert 'f.png: 24 of 24' in done.stderr


def test_text_output_for_files_and_validation_images(run, animals, config, tmp_path):
    wall = animals / 'brick' / 'wall.png'
    done = predict(run, wall, wall, '--validation=3', '--top=2', f'--figure={tmp_path / "f.pdf"}')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [line for line in lines if not line.startswith('  ')]
    assert names[:2] == [f'{wall} (true label: brick)'] * 2
    assert lines[1:3] == lines[4:6]
    assert all(re.fullmatch(r' +\d+\.\d\d%  \w+', line) for line in lines if line not in names)
    validation, class_names = open_dataset(config).validation, open_dataset(config).class_names
    for name, number in zip(names[2:], (0, (len(validation) - 1) // 2, len(validation) - 1), strict=True):
        label = class_names[validation[number]['label']]
        assert name == f'validation {number} (true label: {label})'
    assert (tmp_path / 'f.pdf').read_bytes().startswith(b'%PDF')


@pytest.mark.parametrize(
    ('arguments', 'pattern'),
    [
        ([], 'no checkpoint is given'),
        (['{run}'], '--validation'),
        (['{run}', '{tmp}/empty'], '^{tmp}/empty: '),
        (['{tmp}/gone', '{run}'], '^{tmp}/gone: '),
        (['{tmp}', '{run}'], r'^{tmp}: .*config\.json'),
        (['{run}/checkpoints/7', '{run}'], 'checkpoint.*0'),
        (['{run}', '{run}', '--figure=a.jpg'], "--figure: 'a.jpg' .*png.*pdf"),
        (['{run}', '{run}', '--figure={tmp}/gone/a.png'], "--figure: '{tmp}/gone/a.png' "),
        (['{run}', '{run}', '--views=5'], 'views.*1.*10'),
        (['{run}', '{run}', '--top=0'], 'top'),
    ],
)
def test_invalid_arguments_are_rejected(run, tmp_path, arguments, pattern):
    (tmp_path / 'empty').mkdir()
    places = {'run': run, 'tmp': str(tmp_path)}
    message = usage_error(predict(*(each.format(**places) for each in arguments)))
    assert re.search(pattern.format(**places), message)


def test_expand_paths_lists_folders_in_order(tmp_path):
    for name in ('e.png', 'b.png', 'f.png', 'a/z.png', 'a/.git/x.png', '.x.png', 'd.png', 'c.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = expand_paths([str(tmp_path / 'c.png'), str(tmp_path)])
    found = [os.path.relpath(file, tmp_path) for file in files]
    assert found == ['c.png', 'a/z.png', *(f'{letter}.png' for letter in 'bcdef')]
    (tmp_path / 'empty').mkdir()
    assert str(tmp_path / 'empty') in refusal(expand_paths, [str(tmp_path / 'a'), str(tmp_path / 'empty')])


def test_unreadable_files_are_named(tmp_path, config):
    (gone, folder) = load_images([str(tmp_path / 'gone.png'), str(tmp_path)], config.data, [tmp_path.parent.name])
    assert (gone.problem, gone.label) == ('No such file or directory', None)
    assert (folder.problem, folder.label) == ('Is a directory', tmp_path.parent.name)


def test_imported_weights_keep_their_mean_when_trained(config, probabilities, run, tmp_path):
    """Evaluation and training use the statistics of the run folder, not those of the data set."""
    data = open_dataset(config)
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(run))
    params, batch_statistics = jax.device_get((loaded.state.params, loaded.state.batch_stats))
    own = loaded.statistics | {'mean_image': np.full_like(loaded.statistics['mean_image'], 200.0)}
    workdir = tmp_path / 'other'
    trained_model.import_weights_as_run(str(workdir), config, params, batch_statistics, own, data.class_names)
    step, scores, _ = predictions.predict(trained_model.parse_checkpoint_ref(str(workdir)), data, views=1)
    state = jax.device_get(loaded.state)
    model = nnx.merge(build_model(loaded.config)[0], state.params, state.batch_stats)
    first = jnp.asarray(center_crop(data.validation[0]['image'], config, own))
    assert step == 0
    np.testing.assert_allclose(np.exp(scores[0]), softmax(np.asarray(model(first[None]))[0]), rtol=1e-4)
    assert np.abs(np.exp(scores[0]) - probabilities(data.validation[0]['image'], 1)).max() > 1e-3
    with np.load(workdir / 'dataset_statistics.npz') as arrays:
        before = {name: array.tobytes() for name, array in arrays.items() if name != 'class_counts'}
    fields = {**SMALL, 'data.data_dir': config.data.data_dir, 'eval.views': 1, 'train.steps': 3}
    command_line = ['launch.py', f'--workdir={workdir}', *config_flags(fields)]
    done = run_command(*command_line, JAX_NUM_CPU_DEVICES='8')
    assert done.returncode == 0, done.stderr
    assert 'training starts from the imported weights' in done.stderr
    with np.load(workdir / 'dataset_statistics.npz') as after:
        assert {name: after[name].tobytes() for name in before} == before
    scores, labels = predictions.predict(trained_model.parse_checkpoint_ref(str(workdir)), data, 1)[1:]
    loss = read_result(workdir)['views']['1']['loss']
    np.testing.assert_allclose(loss, -np.mean(scores[np.arange(1600), labels]), rtol=1e-5)
    environment = read_json(workdir / 'environment.json')
    assert environment['versions']['jax'] == jax.__version__
    assert environment['command'] == command_line
    assert environment['device_count'] == 8


def test_permuted_class_names_are_rejected(config, run, tmp_path, capfd):
    data, loaded = open_dataset(config), trained_model.load_model(trained_model.parse_checkpoint_ref(run))
    params, batch_statistics = jax.device_get((loaded.state.params, loaded.state.batch_stats))
    for workdir, names in {'turned': data.class_names[::-1], 'numbers': [f'class {i}' for i in range(16)]}.items():
        trained_model.import_weights_as_run(
            str(tmp_path / workdir), config, params, batch_statistics, loaded.statistics, names
        )
    turned, numbers = (trained_model.parse_checkpoint_ref(str(tmp_path / name)) for name in ('turned', 'numbers'))
    message = refusal(trained_model.open_eval_dataset, [turned], None)
    assert re.search("turned: .*'stereo_motorcycle'.*'astronaut'", message)
    trained_model.open_eval_dataset([numbers], None)
    assert re.search("'class 0'.*'astronaut'", capfd.readouterr().err)


def test_run_without_statistics_file_uses_those_of_the_data(config, run, tmp_path):
    data = open_dataset(config)
    expected = predictions.predict(trained_model.parse_checkpoint_ref(run), data, views=1)[1]
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'dataset_statistics.npz').unlink()
    member = trained_model.parse_checkpoint_ref(str(tmp_path / 'run'))
    np.testing.assert_array_equal(predictions.predict(member, data, views=1)[1], expected)
    with pytest.raises(ConfigError, match=r'dataset_statistics\.npz cannot be read'):
        trained_model.load_model(member)


def test_undecodable_file_names_are_printed_escaped(run, animals, tmp_path):
    odd = os.fsencode(tmp_path) + b'/caf\xe9.png'
    with open(odd, 'wb') as file:
        file.write((animals / 'brick' / 'wall.png').read_bytes())
    done = predict(run, tmp_path, '--views=1', '--top=1', PYTHONIOENCODING='utf-8:strict')
    assert done.returncode == 0, done.stderr
    assert 'caf\\udce9.png\n' in done.stdout
