"""Figures of runs: feature maps against a loop, neighbors, folders of sweeps, and the figures command."""

import itertools
import json
import re

import numpy as np
import pytest
from helpers import ROOT, refusal, run_command, usage_error
from matplotlib.text import Text
from PIL import Image
from small_runs import center_crop, make_run, open_dataset, small_config

from alexnet_jax.figures import from_model, from_run
from alexnet_jax.inference import trained_model
from alexnet_jax.inference.images import ImageInput
from alexnet_jax.plots import kernels

pytestmark = pytest.mark.slow

LINE = json.dumps({'step': 1, 'split': 'train', 'loss': 1.0}) + '\n'


def image(side, channels=3):
    return np.random.default_rng(0).integers(0, 256, (side, side, channels), np.uint8)


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.fixture(scope='module')
def config(photos_dir):
    # Wide enough for rounding to depend on the batch size.
    return small_config(photos_dir, model__widths=(8, 0, 0, 0, 64, 0, 64))


@pytest.fixture(scope='module')
def run(config, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('runs') / 'run', config)


@pytest.fixture(scope='module')
def loaded(run):
    return trained_model.load_model(run)


def test_feature_maps_match_a_convolution_loop(loaded, config):
    """Compares with a loop over windows: conv1 with stride 8, zeros after the last row and column, then ReLU."""
    data = open_dataset(config)
    shown = [ImageInput(f'{i}', data.validation[i]['image'], None) for i in (3, 40)]
    kernel = np.asarray(loaded.state.params['conv1']['kernel'])
    for picture, figure in zip(shown, from_model.plot_feature_maps(loaded, iter(shown), 'conv1', 2), strict=True):
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), picture.pixels[4:68, 4:68])
        seen = np.pad(center_crop(picture.pixels, config, data.statistics), ((0, 3), (0, 3), (0, 0)))
        sheets = [axes.images[0].get_array().filled(np.nan) for axes in figure.axes[1:3]]
        for n, (y, x) in itertools.product(range(8), [(0, 0), (3, 5), (7, 7)]):
            value = float(np.sum(seen[8 * y : 8 * y + 11, 8 * x : 8 * x + 11] * kernel[..., n], dtype=np.float64))
            drawn = sheets[n // 4][y, n % 4 * 8 + n % 4 + x]
            assert drawn == pytest.approx(max(value, 0), rel=1e-4, abs=1e-4)
    logits = next(from_model.plot_feature_maps(loaded, iter(shown[:1]), 'fc8', 1))
    assert 'fc8: 16 units' in texts(logits)


def test_training_image_is_its_own_nearest_neighbor(loaded, config):
    data = open_dataset(config)
    numbers = [5, 700]
    examples = [data.train[i] for i in numbers]
    own = [
        ImageInput(f'/data/{i}.png', example['image'], data.class_names[example['label']])
        for i, example in zip(numbers, examples, strict=True)
    ]
    figure = from_model.plot_neighbors(loaded, data, own)
    for row, picture in enumerate(own):
        query, first, *others = figure.axes[7 * row : 7 * row + 7]
        np.testing.assert_array_equal(query.images[0].get_array(), picture.pixels)
        np.testing.assert_array_equal(first.images[0].get_array(), picture.pixels)
        assert [text.get_text() for text in query.texts] == [f'{numbers[row]}.png', picture.label]
        assert first.texts[1].get_text() == '0.00'
        assert float(others[0].texts[1].get_text()) > 0
        assert len(first.patches) == 1


def test_kernels_figure_shows_the_checkpoint(loaded):
    figure = from_model.plot_kernels(loaded)
    kernel = np.asarray(loaded.state.params['conv1']['kernel'])
    shares = kernels.saturation(kernel, 2)
    assert f'saturation {shares[1]:.2f}' in figure.axes[1].get_title(loc='left')
    np.testing.assert_allclose(
        figure.axes[0].images[0].get_array()[0, 0], kernels.grid(kernel[..., :4])[0, 0], rtol=1e-6
    )


def write_sweep(folder, directories):
    planned = [{'variant': 'a', 'seed': 0, 'directory': name} for name in directories]
    sweep = {'config': 'c.py', 'base': None, 'variants': [], 'runs': planned}
    (folder / 'sweep.json').write_text(json.dumps(sweep))


def test_find_runs_lists_started_runs_of_a_sweep(tmp_path):
    folder = tmp_path / 'sweep'
    for name, text in {'a/seed_0': LINE, 'a/seed_1': None, 'a/seed_2': '', 'b/seed_0': LINE}.items():
        (folder / name).mkdir(parents=True)
        if text is not None:
            (folder / name / 'metrics.jsonl').write_text(text)
    write_sweep(folder, ['a/seed_0', 'a/seed_1', 'a/seed_2', 'b/seed_0'])
    found = from_run.find_runs([str(folder)])
    assert found == {name: str(folder / name) for name in ('a/seed_0', 'b/seed_0')}
    assert list(from_run.find_runs([f'{tmp_path}/x/', f'{tmp_path}/y', f'{tmp_path}/x'])) == ['x', 'y']
    assert list(from_run.find_runs([f'{tmp_path}/x'])) == ['x']
    write_sweep(folder, ['a/seed_1', 'a/seed_2'])
    assert str(folder) in refusal(from_run.find_runs, [str(folder)])
    (folder / 'sweep.json').write_text('{"runs": [1]}')
    assert 'sweep.json' in refusal(from_run.find_runs, [str(folder)])


def command(*arguments, cwd=ROOT):
    return run_command('-m', 'alexnet_jax.figures', *arguments, cwd=cwd, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize(
    ('arguments', 'pattern'),
    [
        ([], 'kernels, maps, .*confusion, network, curves'),
        (['heads', 'x'], "'heads'.*kernels, maps"),
        (['kernels'], 'kernels CHECKPOINT'),
        (['kernels', '{run}', 'two'], 'kernels CHECKPOINT'),
        (['kernels', '{run}', '--layer=conv2'], '--layer: .*kernels'),
        (['kernels', '{tmp}'], r'config\.json'),
        (['kernels', '{run}/checkpoints/7'], '{run}/checkpoints/7'),
        (['maps', '{run}'], 'no image is given'),
        (['maps', '{run}', 'a.png', '--layer=conv2'], '{run}.*conv1, conv5, fc7, fc8'),
        (['network', 'Paper'], 'Paper: .*paper, krizhevsky2012'),
        (['network', 'paper', '--out=net.svg'], "--out: 'net.svg' .*png.*pdf"),
        (['network', 'paper', '--out={tmp}/none/net.png'], '{tmp}/none/net.png'),
        (['curves', '{tmp}'], r'{tmp}/metrics\.jsonl'),
        (['curves', '{empty}'], '{empty}'),
    ],
)
def test_invalid_figure_arguments_are_rejected(arguments, pattern, run, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'metrics.jsonl').write_text('')
    places = {'run': run, 'tmp': tmp_path, 'empty': tmp_path / 'empty'}
    message = usage_error(command(*(argument.format(**places) for argument in arguments)))
    assert re.search(pattern.format(**places), message)
    assert [path.name for path in tmp_path.rglob('*')] == ['empty', 'metrics.jsonl']


def test_each_kind_of_figure_by_command(run, tmp_path):
    (tmp_path / 'pictures').mkdir()
    Image.fromarray(image(side=90)).save(tmp_path / 'pictures' / 'a.png')
    (tmp_path / 'pictures' / 'b.png').write_text('no picture')
    Image.fromarray(image(side=100)[..., 0]).save(tmp_path / 'pictures' / 'c.png')
    done = command('maps', run, tmp_path / 'pictures', f'--out={tmp_path}/maps.pdf', '--layer=conv5')
    assert done.returncode == 1
    assert done.stdout.split() == [f'{tmp_path}/maps_1.pdf', f'{tmp_path}/maps_2.pdf']
    [error] = [each for each in done.stderr.splitlines() if each.startswith('alexnet_jax: ')]
    assert f'{tmp_path}/pictures/b.png: ' in error
    for arguments, wanted in (
        (['kernels', run], f'{run}/figures/kernels.png'),
        (['neighbors', run, '--validation=2'], f'{run}/figures/neighbors.png'),
        (['confusion', run, '--views=1'], f'{run}/figures/confusion.png'),
        (['network', run], f'{run}/figures/network.png'),
    ):
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (0, f'{wanted}\n'), done.stderr
        with Image.open(wanted) as picture:
            assert picture.width > 600


def test_figures_of_several_runs_go_to_current_folder(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text(LINE)
    assert command('curves', 'a', 'b', cwd=tmp_path).stdout == 'curves.png\n'
    assert command('curves', 'a', cwd=tmp_path).stdout == 'a/figures/curves.png\n'
    assert command('network', 'half', cwd=tmp_path).stdout == 'half.png\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'b', 'curves.png', 'half.png']
