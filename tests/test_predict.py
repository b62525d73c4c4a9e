"""Predictions as a command: softmax means over views by NumPy, odd files each with an answer or a reason, refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_runs import centre, make_run, small_config, store_of
from zoo import zoo

from alexnet_jax.config import ConfigError
from alexnet_jax.evaluate import summary
from alexnet_jax.inference import trained_model
from alexnet_jax.inference.images import expand_paths, load_images, read_picture
from alexnet_jax.training.state import build_model

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_programs')]


@pytest.fixture(scope='module')
def config(photos_dir):
    return small_config(photos_dir)


@pytest.fixture(scope='module')
def run(config, tmp_path_factory) -> str:
    return make_run(tmp_path_factory.mktemp('runs') / 'run', config)


def command(*arguments, module: str = 'predict') -> subprocess.CompletedProcess:
    environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '2'}
    return subprocess.run(
        [sys.executable, '-m', f'alexnet_jax.{module}', *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


@pytest.fixture(scope='module')
def probabilities(run, config):
    """A function of an image (S, S, C) uint8: its probabilities as the mean over the ten windows, or of its centre."""
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(run))
    state = jax.device_get(loaded.state)
    model = nnx.merge(build_model(loaded.config)[0], state.params, state.statistics)
    mean, crop = loaded.statistics['mean_image'].astype(np.float32), config.data.crop_size
    far = config.data.image_size - crop

    def of(image: np.ndarray, views: int) -> np.ndarray:
        if views == 1:
            windows = [centre(image, config, loaded.statistics)]
        else:
            places = [(far // 2, far // 2), (0, 0), (0, far), (far, 0), (far, far)]
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
    """The zoo, and a picture in a folder with the name of a class."""
    folder = tmp_path_factory.mktemp('pictures')
    for name, (content, _) in zoo().items():
        (folder / name).write_bytes(content)
    (folder / 'brick').mkdir()
    gradient = np.arange(100 * 120 * 3).reshape(100, 120, 3) % 251
    Image.fromarray(gradient.astype(np.uint8)).save(folder / 'brick' / 'wall.png')
    (folder / '.hidden').write_text('not looked at')
    return folder


@pytest.mark.parametrize('views', [1, 10])
def test_every_file_of_a_folder_gets_an_answer_or_a_reason(run, animals, probabilities, tmp_path, views):
    done = command(run, animals, f'--views={views}', '--json', '--top=99', f'--figure={tmp_path / "f.png"}')
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr
    told = {Path(row['file']).name: row for row in map(json.loads, done.stdout.splitlines())}
    kinds = zoo()
    assert set(told) == {*kinds, 'wall.png'}
    for name, (_, expected) in kinds.items():
        if isinstance(expected, str):
            assert re.search(expected, told[name]['error'])
            assert f'{name}: {told[name]["error"]}' in done.stderr
            continue
        assert [len(told[name]['top']), told[name]['label']] == [16, None]
    bad = sum(isinstance(expected, str) for _, expected in kinds.values())
    assert f'{bad} of {len(kinds) + 1} pictures could not be read' in done.stderr
    for name in ('picture.bmp', 'palette.png', 'brick/wall.png'):
        row = told[Path(name).name]
        expected = probabilities(
            read_picture(str(animals / name), trained_model.parse_checkpoint_ref(run).config.data), views
        )
        found = {each['class']: each['probability'] for each in row['top']}
        classes = trained_model.load_model(trained_model.parse_checkpoint_ref(run)).class_names
        np.testing.assert_allclose([found[each] for each in classes], expected, rtol=2e-4)
        assert [each['probability'] for each in row['top']] == sorted(found.values(), reverse=True)
    assert told['wall.png']['label'] == 'brick'
    with Image.open(tmp_path / 'f.png') as figure:
        assert figure.width > 500
    assert 'f.png: 24 of 24 pictures' in done.stderr


def test_pictures_and_validation_images_for_a_reader(run, animals, config, tmp_path):
    wall = animals / 'brick' / 'wall.png'
    done = command(run, wall, wall, '--validation=3', '--top=2', f'--figure={tmp_path / "f.pdf"}')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [line for line in lines if not line.startswith('  ')]
    assert names[:2] == [f'{wall} (true label: brick)'] * 2
    assert lines[1:3] == lines[4:6]
    assert all(re.fullmatch(r' +\d+\.\d\d%  \w+', line) for line in lines if line not in names)
    validation, class_names = store_of(config).validation, store_of(config).class_names
    for name, number in zip(names[2:], (0, (len(validation) - 1) // 2, len(validation) - 1), strict=True):
        label = class_names[validation[number]['label']]
        assert name == f'validation {number} (true label: {label})'
    assert (tmp_path / 'f.pdf').read_bytes().startswith(b'%PDF')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'no checkpoint is given; name a run'),
        (['{run}'], 'no image is given; name files or folders after the checkpoint, or set --validation=8'),
        (['{run}', '{tmp}/empty'], '{tmp}/empty: a folder without files; name pictures or a folder with some'),
        (['{tmp}/gone', '{run}'], '{tmp}/gone: there is no folder {tmp}/gone; name a run'),
        (['{tmp}', '{run}'], '{tmp}: {tmp} has no config.json; name a run'),
        (['{run}/checkpoints/7', '{run}'], 'there is no such checkpoint; there are those of steps 0'),
        (['{run}', '{run}', '--figure=a.jpg'], "--figure: 'a.jpg' does not end with .png or .pdf"),
        (
            ['{run}', '{run}', '--figure={tmp}/gone/a.png'],
            "--figure: '{tmp}/gone/a.png' cannot be written; name a file",
        ),
        (['{run}', '{run}', '--views=5'], 'value should be one of <1|10>'),
        (['{run}', '{run}', '--top=0'], 'top must be a positive integer|lower|at least 1|--top'),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(run, tmp_path, arguments, message):
    (tmp_path / 'empty').mkdir()
    places = {'run': run, 'tmp': str(tmp_path)}
    done = command(*(each.format(**places) for each in arguments))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert message.format(**places) in line or re.search(message, line)
    assert done.stdout == ''


def test_folders_stand_for_their_files_in_order(tmp_path):
    for name in ('e.png', 'b.png', 'f.png', 'a/z.png', 'a/.git/x.png', '.x.png', 'd.png', 'c.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = expand_paths([str(tmp_path / 'c.png'), str(tmp_path)])
    found = [os.path.relpath(file, tmp_path) for file in files]
    assert found == ['c.png', 'a/z.png', *(f'{letter}.png' for letter in 'bcdef')]
    with pytest.raises(ConfigError, match='a folder without files'):
        expand_paths([str(tmp_path / 'a' / '.git' / '..' / '..' / 'a' / '.git' / 'x.png'), str(_empty(tmp_path))])


def _empty(folder: Path) -> Path:
    (folder / 'empty').mkdir()
    return folder / 'empty'


def test_files_that_cannot_be_opened_are_named(tmp_path, config):
    (gone, folder) = load_images([str(tmp_path / 'gone.png'), str(tmp_path)], config.data, [tmp_path.parent.name])
    assert (gone.problem, gone.label) == ('No such file or directory', None)
    assert (folder.problem, folder.label) == ('Is a directory', tmp_path.parent.name)


def test_weights_from_elsewhere_keep_their_own_mean_and_can_be_trained_on(config, probabilities, run, tmp_path):
    """Evaluated and trained with the statistics in their folder, not with those of the images."""
    store = store_of(config)
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(run))
    params, batch_statistics = jax.device_get((loaded.state.params, loaded.state.statistics))
    own = loaded.statistics | {'mean_image': np.full_like(loaded.statistics['mean_image'], 200.0)}
    workdir = tmp_path / 'other'
    trained_model.import_weights_as_run(str(workdir), config, params, batch_statistics, own, store.class_names)
    step, scores, _ = summary.predict(trained_model.parse_checkpoint_ref(str(workdir)), store, views=1)
    state = jax.device_get(loaded.state)
    model = nnx.merge(build_model(loaded.config)[0], state.params, state.statistics)
    first = jnp.asarray(centre(store.validation[0]['image'], config, own))
    assert step == 0
    np.testing.assert_allclose(np.exp(scores[0]), softmax(np.asarray(model(first[None]))[0]), rtol=1e-4)
    assert np.abs(np.exp(scores[0]) - probabilities(store.validation[0]['image'], 1)).max() > 1e-3
    before = (workdir / 'inputs.npz').read_bytes()
    settings = json.loads((workdir / 'config.json').read_text())
    overrides = {
        'model.conv1_stride': 8,
        'model.widths': (8, 0, 0, 0, 16, 0, 32),
        'model.kernel_std': (0.15,) * 8,
        'model.conv_ops': ('activation lrn', '', '', '', 'activation pool'),
        'data.std': (64.0,),
        'data.data_dir': settings['data']['data_dir'],
        'eval.batch_size': 48,
        'eval.views': 1,
        'train.steps': 3,
    }
    command_line = ['launch.py', f'--workdir={workdir}', *(f'--config.{name}={overrides[name]}' for name in overrides)]
    done = subprocess.run([sys.executable, *command_line], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'at step 0 of 3' in done.stderr
    assert (workdir / 'inputs.npz').read_bytes() == before
    losses = json.loads((workdir / 'result.json').read_text())['views']['1']
    expected = -np.mean(
        summary.predict(trained_model.parse_checkpoint_ref(str(workdir)), store, 1)[1][np.arange(1600), _labels(store)]
    )
    np.testing.assert_allclose(losses['loss'], expected, rtol=1e-5)
    environment = json.loads((workdir / 'environment.json').read_text())
    assert environment['versions']['jax'] == jax.__version__
    assert environment['command'] == command_line
    assert environment['device_count'] == 8


def test_names_of_classes_in_another_order_are_refused(config, run, tmp_path, capfd):
    store, loaded = store_of(config), trained_model.load_model(trained_model.parse_checkpoint_ref(run))
    params, batch_statistics = jax.device_get((loaded.state.params, loaded.state.statistics))
    for workdir, names in {'turned': store.class_names[::-1], 'numbers': [f'class {i}' for i in range(16)]}.items():
        trained_model.import_weights_as_run(
            str(tmp_path / workdir), config, params, batch_statistics, loaded.statistics, names
        )
    with pytest.raises(ConfigError, match=r"turned: .* such as 'stereo_motorcycle' and not 'astronaut' as number 0"):
        trained_model.open_eval_dataset([trained_model.parse_checkpoint_ref(str(tmp_path / 'turned'))], None)
    trained_model.open_eval_dataset([trained_model.parse_checkpoint_ref(str(tmp_path / 'numbers'))], None)
    assert "other names than those of the data, 'class 0' and 'astronaut' the first ones" in capfd.readouterr().err


def test_a_run_of_an_earlier_version_is_evaluated_with_the_statistics_of_its_images(config, run, tmp_path):
    store = store_of(config)
    expected = summary.predict(trained_model.parse_checkpoint_ref(run), store, views=1)[1]
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'inputs.npz').unlink()
    member = trained_model.parse_checkpoint_ref(str(tmp_path / 'run'))
    np.testing.assert_array_equal(summary.predict(member, store, views=1)[1], expected)
    with pytest.raises(ConfigError, match=r'inputs\.npz cannot be read'):
        trained_model.load_model(member)


def test_names_that_are_no_text_do_not_stop_the_rest(run, animals, tmp_path):
    odd = os.fsencode(tmp_path) + b'/caf\xe9.png'
    with open(odd, 'wb') as file:
        file.write((animals / 'brick' / 'wall.png').read_bytes())
    environment = {**os.environ, 'PYTHONIOENCODING': 'utf-8:strict', 'JAX_NUM_CPU_DEVICES': '1'}
    arguments = [sys.executable, '-m', 'alexnet_jax.predict', run, str(tmp_path), '--views=1', '--top=1']
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b'caf\\udce9.png\n' in done.stdout


def _labels(store) -> np.ndarray:
    return np.array([store.validation[number]['label'] for number in range(len(store.validation))])
