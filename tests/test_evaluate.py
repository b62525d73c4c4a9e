"""Evaluation as a command: numbers of the runs, counts and averages by hand, SciPy's optimum, refusals, no traces."""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize  # type: ignore[import-untyped]

from alexnet_jax import metrics
from alexnet_jax.config import resolve
from alexnet_jax.data import dataset
from alexnet_jax.evaluate import summary
from alexnet_jax.inference import trained_model
from alexnet_jax.training import checkpointing
from configs.quickstart import get_config

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures('compiled_programs')

COMMON = {
    'model.conv1_stride': 8,
    'model.dropout': 0.0,
    'model.kernel_std': (0.05,) * 8,
    'data.color': 'none',
    'data.std': (64.0,),
    'optimizer.learning_rate': 0.02,
    'optimizer.schedule': 'constant',
    'train.batch_size': 64,
    'train.steps': 40,
    'train.log_every': 20,
    'checkpoint.keep': 2,
    'eval.batch_size': 150,  # which does not divide the 1600 images
}
# Few layers, for the compiler takes the longest; networks, crops and preprocessing differ.
RUNS = {
    'a': {
        'seed': 0,
        'model.widths': (16, 0, 0, 0, 32, 0, 64),
        'model.conv_ops': ('activation lrn', '', '', '', 'activation pool'),
        'eval.every': 30,
    },
    'b': {
        'seed': 1,
        'model.widths': (8, 0, 0, 0, 16, 0, 0),
        'model.conv_ops': ('activation', '', '', '', 'activation'),
        'model.towers': 1,
        'data.crop_size': 60,
        'data.mean': 'channel',
        'eval.every': 40,
    },
}


def execute(*command: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1', **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300
    )


def command(*arguments, **environment: str) -> subprocess.CompletedProcess:
    return execute('-m', 'alexnet_jax.evaluate', *map(str, arguments), **environment)


def traces(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of change of all there is in `folder`."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob('*')]}


@pytest.fixture(scope='module')
def runs(photos_dir, tmp_path_factory) -> dict[str, Path]:
    """Two small runs, with a checkpoint each that is just being written."""
    folder = tmp_path_factory.mktemp('runs')

    def train(name: str) -> subprocess.CompletedProcess:
        settings = {**COMMON, **RUNS[name], 'data.data_dir': photos_dir}
        return execute(
            'launch.py', f'--workdir={folder / name}', *(f'--config.{field}={settings[field]}' for field in settings)
        )

    with ThreadPoolExecutor(2) as pool:
        for run in pool.map(train, RUNS):
            assert run.returncode == 0, run.stderr
    for name in RUNS:
        unfinished = folder / name / 'checkpoints' / '50.orbax-checkpoint-tmp' / 'state'
        unfinished.mkdir(parents=True)
        (unfinished / 'part').write_text('...')
    # The newest checkpoint of `a` is not to be its best.
    metrics = folder / 'a' / 'checkpoints' / '40' / 'metrics' / 'metrics'
    assert json.loads(metrics.read_text()).keys() == {'top1_error'}
    metrics.write_text('{"top1_error": 0.99}')
    return {name: folder / name for name in RUNS}


@pytest.fixture(scope='module')
def evaluations(runs, tmp_path_factory) -> dict[str, tuple[str, dict]]:
    """What the command prints, and the predictions that it saves, by name; and that it leaves nothing else behind."""
    folder = tmp_path_factory.mktemp('predictions')
    a, b = runs['a'], runs['b']
    commands = {
        'a': (a, '--views=1', '--json', '--per_class'),
        'b': (b, '--views=1', '--json'),
        'ten': (a, b, '--json'),
        'equal': (a, b, '--views=1', '--json'),
        'given': (a, b, '--views=1', '--weights=3,1', '--per_class'),
        'fitted': (a, b, '--views=1', '--fit_weights', '--json', '--per_class'),
        'steps': (a, a / 'checkpoints' / '30', f'{a}/best/', '--views=1', '--json', '--weights=0,0,2'),
    }
    before = {name: traces(run) for name, run in runs.items()}

    def run(name: str) -> tuple[str, dict]:
        done = command(*commands[name], f'--predictions={folder / name}.npz')
        assert done.returncode == 0, done.stderr
        assert 'Traceback' not in done.stderr
        with np.load(folder / f'{name}.npz') as saved:
            return done.stdout, dict(saved)

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(commands, pool.map(run, commands), strict=True))
    assert {name: traces(run) for name, run in runs.items()} == before
    assert {path.name for path in folder.iterdir()} == {f'{name}.npz' for name in commands}
    return results


def report(evaluations: dict, name: str) -> dict:
    return json.loads(evaluations[name][0])


def result(run: Path, views: str) -> dict:
    return json.loads((run / 'result.json').read_text())['views'][views]


def count(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Loss and errors, image by image."""
    loss = top1 = top5 = 0.0
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        as_good = sum(value >= row[label] for i, value in enumerate(row) if i != label)
        loss, top1, top5 = loss - math.log(row[label]), top1 + (as_good > 0), top5 + (as_good > 4)
    return {'loss': loss / len(labels), 'top1_error': top1 / len(labels), 'top5_error': top5 / len(labels)}


def assert_figures(found: dict, expected: dict) -> None:
    assert found['loss'] == pytest.approx(expected['loss'], rel=1e-5)
    assert (found['top1_error'], found['top5_error']) == pytest.approx(
        (expected['top1_error'], expected['top5_error']), rel=1e-12
    )


@pytest.mark.slow
def test_one_run_gives_the_numbers_of_its_end(runs, evaluations):
    for name in RUNS:
        found = report(evaluations, name)
        assert (found['views'], found['images'], found['fitted_on']) == (1, 1600, 0)
        assert found.keys() & {'mean', 'ensemble'} == set()
        (member,) = found['members']
        assert (member['checkpoint'], member['step'], member['weight']) == (str(runs[name]), 40, 1.0)
        assert_figures(member, result(runs[name], '1'))
        assert 0.05 < member['top5_error'] < member['top1_error'] < 0.9  # it has learnt something


@pytest.mark.slow
def test_ten_views_of_two_runs_give_the_numbers_of_their_ends(runs, evaluations):
    found = report(evaluations, 'ten')
    assert found['views'] == 10
    assert [member['weight'] for member in found['members']] == [0.5, 0.5]
    expected = [result(runs[name], '10') for name in RUNS]
    for member, own in zip(found['members'], expected, strict=True):
        assert_figures(member, own)
        assert own['loss'] != pytest.approx(result(Path(member['checkpoint']), '1')['loss'], rel=1e-4)
    assert_figures(found['mean'], {name: (expected[0][name] + expected[1][name]) / 2 for name in found['mean']})


@pytest.mark.slow
@pytest.mark.parametrize('name', ['a', 'b', 'ten', 'equal', 'steps'])
def test_saved_predictions_have_the_printed_errors(evaluations, name):
    found, (_, saved) = report(evaluations, name), evaluations[name]
    probabilities, labels = saved['probabilities'], saved['labels']
    assert (probabilities.shape, probabilities.dtype, labels.dtype) == ((1600, 16), np.float32, np.int32)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.bincount(labels), 100)
    assert_figures(found.get('ensemble', found['members'][0]), count(probabilities, labels))


@pytest.mark.slow
def test_classes_are_those_of_the_store(evaluations, photos_dir):
    description = json.loads(next(Path(photos_dir).glob('prepared/*/prepared.json')).read_text())
    for _, saved in evaluations.values():
        assert saved['class_names'].tolist() == description['class_names']


def members_apart(evaluations: dict) -> list[np.ndarray]:
    return [evaluations[name][1]['probabilities'].astype(np.float64) for name in RUNS]


@pytest.mark.slow
def test_given_weights_average_the_probabilities(evaluations):
    a, b = members_apart(evaluations)
    text, saved = evaluations['given']
    np.testing.assert_allclose(saved['probabilities'], 0.75 * a + 0.25 * b, rtol=1e-5)
    lines = text.splitlines()
    assert lines[0] == '1,600 validation images, 1 view'
    figures = count(saved['probabilities'], saved['labels'])
    shown = [f'{figures["loss"]:.4f}', f'{figures["top1_error"]:.2%}', f'{figures["top5_error"]:.2%}']
    assert next(line for line in lines if line.startswith('ensemble')).split() == ['ensemble', *shown]
    assert [line.split()[-1] for line in lines[3:5]] == ['0.7500', '0.2500']
    assert lines[3].split()[:3] == [f'{report(evaluations, "a")["members"][0]["checkpoint"]},', 'step', '40']


@pytest.mark.slow
def test_equal_weights_average_the_probabilities(evaluations):
    a, b = members_apart(evaluations)
    np.testing.assert_allclose(evaluations['equal'][1]['probabilities'], (a + b) / 2, rtol=1e-5)
    assert [member['weight'] for member in report(evaluations, 'equal')['members']] == [0.5, 0.5]


@pytest.mark.slow
def test_fitted_weights_are_the_best_for_the_even_images_and_errors_those_of_the_odd_ones(evaluations):
    a, b = members_apart(evaluations)
    found, (_, saved) = report(evaluations, 'fitted'), evaluations['fitted']
    weight = found['members'][0]['weight']
    assert weight + found['members'][1]['weight'] == pytest.approx(1)
    even = np.arange(0, 1600, 2), saved['labels'][::2]
    grid = np.linspace(0, 1, 10001)
    likelihoods = [np.log(share * a[even] + (1 - share) * b[even]).sum() for share in grid]
    assert weight == pytest.approx(grid[np.argmax(likelihoods)], abs=2e-4)
    assert 0.02 < weight < 0.48
    np.testing.assert_allclose(saved['probabilities'], weight * a + (1 - weight) * b, rtol=1e-5)
    assert (found['images'], found['fitted_on']) == (800, 800)
    odd = saved['labels'][1::2]
    assert_figures(found['ensemble'], count(saved['probabilities'][1::2], odd))
    for member, probabilities in zip(found['members'], (a, b), strict=True):
        assert_figures(member, count(probabilities[1::2], odd))
    assert sum(row['images'] for row in found['classes']) == 800


@pytest.mark.slow
def test_classes_of_a_run_by_counting(evaluations):
    _, saved = evaluations['a']
    names = saved['class_names'].tolist()
    for label, row in enumerate(report(evaluations, 'a')['classes']):
        own = saved['labels'] == label
        figures = count(saved['probabilities'][own], saved['labels'][own])
        taken = [int(np.argmax(p)) for p in saved['probabilities'][own]]
        taken = [taken.count(other) if other != label else 0 for other in range(16)]
        assert (row['name'], row['images']) == (names[label], 100)
        assert (row['top1_error'], row['top5_error']) == (figures['top1_error'], figures['top5_error'])
        assert row['instead_images'] == max(taken)
        assert row['instead'] == (names[int(np.argmax(taken))] if max(taken) else None)
    text = evaluations['given'][0].splitlines()
    table = text[text.index(next(line for line in text if line.startswith('class '))) + 1 :]
    assert [line.split()[:2] for line in table] == [[name, '100'] for name in names]


@pytest.mark.slow
def test_names_of_checkpoints(runs, evaluations):
    """WORKDIR is the newest one, WORKDIR/best that of the lowest error, WORKDIR/checkpoints/STEP what it says."""
    recorded = [json.loads(line) for line in (runs['a'] / 'metrics.jsonl').read_text().splitlines()]
    validated = {line['step']: line for line in recorded if line['split'] == 'validation'}
    members = report(evaluations, 'steps')['members']
    assert [member['step'] for member in members] == [40, 30, 30]
    assert [member['weight'] for member in members] == [0, 0, 1]
    for member in members:
        assert_figures(member, validated[member['step']])
    assert validated[30]['loss'] != pytest.approx(validated[40]['loss'], rel=1e-3)


@pytest.mark.slow
def test_a_run_may_be_called_best(runs, tmp_path):
    shutil.copytree(runs['b'], tmp_path / 'best')
    shutil.copytree(runs['b'], tmp_path / 'checkpoints' / '7')
    for name, workdir, which in [
        ('best', 'best', 'newest'),
        ('best/best', 'best', 'best'),
        ('checkpoints/7', 'checkpoints/7', 'newest'),
        ('best/checkpoints/40/', 'best', '40'),
    ]:
        member = trained_model.parse_checkpoint_ref(f'{tmp_path}/{name}')
        assert (member.workdir, member.which) == (str(tmp_path / workdir), which)


def opened(photos_dir: str) -> dataset.PreparedDataset:
    directory = next(Path(photos_dir).glob('prepared/*/prepared.json')).parent
    return dataset.open_store(str(directory), resolve(get_config()).data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mesh', 'used'),
    [
        ({'data': -1, 'model': 1}, (8, 1)),
        ({'data': 2, 'model': 2}, (2, 2)),
        ({'data': 16, 'model': 2}, (8, 1)),  # does not fit
    ],
)
def test_several_devices_give_the_numbers_of_one(runs, evaluations, photos_dir, tmp_path, capfd, mesh, used):
    shutil.copytree(runs['a'], tmp_path / 'a')
    file = tmp_path / 'a' / 'config.json'
    settings = json.loads(file.read_text())
    settings['mesh'] |= mesh
    settings['eval']['batch_size'] = 197  # no multiple of the devices
    file.write_text(json.dumps(settings))
    step, scores, labels = summary.predict(
        trained_model.parse_checkpoint_ref(str(tmp_path / 'a')), opened(photos_dir), 1
    )
    _, saved = evaluations['a']
    assert step == 40
    np.testing.assert_array_equal(labels, saved['labels'])
    np.testing.assert_allclose(np.exp(scores), saved['probabilities'], rtol=1e-4)
    assert f'mesh data={used[0]}, model={used[1]}' in capfd.readouterr().err


@pytest.mark.slow
def test_a_newer_checkpoint_takes_the_place_of_one_that_is_gone_meanwhile(runs, tmp_path, monkeypatch):
    shutil.copytree(runs['b'], tmp_path / 'b')
    folder, read = tmp_path / 'b' / 'checkpoints', checkpointing.restore_checkpoint
    asked = []

    def read_late(path, abstract_state):
        asked.append(os.path.basename(path))
        if len(asked) == 1:
            (folder / '40').rename(folder / '41')
        return read(path, abstract_state)

    monkeypatch.setattr(checkpointing, 'restore_checkpoint', read_late)
    assert trained_model.restore(trained_model.parse_checkpoint_ref(str(tmp_path / 'b')), None).progress['step'] == 40
    assert asked == ['40', '41']
    with pytest.raises(summary.ConfigError, match=r'checkpoints/40: there is no such checkpoint; .* steps 41$'):
        trained_model.restore(trained_model.parse_checkpoint_ref(str(folder / '40')), None)


# The arithmetic, by hand.


def log(rows) -> np.ndarray:
    with np.errstate(divide='ignore'):
        return np.log(np.array(rows, np.float64)).astype(np.float32)


def test_errors_by_hand():
    nan = float('nan')
    scores = np.array(
        [
            [9, 1, 2, 3, 4, 5, 6],  # best
            [5, 5, 1, 1, 1, 1, 1],  # as good as another: an error
            [5, 9, 8, 7, 6, 1, 1],  # fifth
            [5, 9, 8, 7, 6, 5, 1],  # shares the fifth place: out
            [4, 9, 8, 7, 6, 5, 1],  # sixth
            [5, nan, 1, 1, 1, 1, 1],  # what is not a number may be better
            [nan, 1, 2, 3, 4, 5, 6],
            [nan] * 7,
        ],
        np.float32,
    )
    top1, top5 = metrics.errors(scores, np.zeros(8, np.int32))
    assert top1.tolist() == [False, True, True, True, True, True, True, True]
    assert top5.tolist() == [False, False, False, True, True, False, True, True]
    top1, top5 = metrics.errors(scores[:, :5], np.full(8, 1, np.int32))  # of five classes
    assert top1.tolist() == [True, True, False, False, False, True, True, True]
    assert not top5.any()


def test_figures_by_hand():
    scores = log([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    found = metrics.error_rates(scores, np.array([0, 1, 2, 2], np.int32))
    loss = -(math.log(0.5) + math.log(0.3) + math.log(0.25) + math.log(0.8)) / 4
    assert found == pytest.approx({'loss': loss, 'top1_error': 0.5, 'top5_error': 0.0})


def test_mixtures_by_hand():
    scores = [log([[0.5, 0.5, 0]]), log([[0.1, 0.2, 0.7]]), np.full((1, 3), np.nan, np.float32)]
    mixed = metrics.average_log_probs(scores, [0.25, 0.75, 0])
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(np.exp(mixed), [[0.2, 0.275, 0.525]], rtol=1e-6)
    np.testing.assert_array_equal(metrics.average_log_probs(scores[:1], [1.0]), scores[0])
    tiny = np.array([[-200.0, -300.0]], np.float32)  # no probability of float32 is so small
    np.testing.assert_allclose(metrics.average_log_probs([tiny, tiny], [0.5, 0.5]), tiny, rtol=1e-6)
    assert np.isnan(metrics.average_log_probs(scores, [0.25, 0.5, 0.25])).all()


def synthetic(members: int, quality: list[float], seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Log probabilities of five classes for 600 images, the right class with as much more as `quality` says."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, 600).astype(np.int32)
    scores = []
    for k in range(members):
        logits = generator.normal(size=(600, 5)) * 1.5
        logits[np.arange(600), labels] += quality[k]
        scores.append((logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32))
    return scores, labels


@pytest.mark.parametrize(('quality', 'seed'), [([1.0, 2.0, 1.5], 0), ([0.0, 3.0, 2.9], 1), ([1.0, 1.0, 1.0, 4.0], 2)])
def test_fitted_weights_are_those_of_scipy(quality, seed):
    scores, labels = synthetic(len(quality), quality, seed)
    right = np.exp(np.array([[row[label] for row, label in zip(s, labels, strict=True)] for s in scores], np.float64)).T

    def loss(weights):
        return -np.mean(np.log(right @ weights))

    found = minimize(
        loss,
        np.full(len(quality), 1 / len(quality)),
        method='SLSQP',
        bounds=[(0, 1)] * len(quality),
        constraints={'type': 'eq', 'fun': lambda weights: weights.sum() - 1},
        options={'ftol': 1e-14},
    )
    weights = metrics.fit_weights(scores, labels)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert loss(weights) == pytest.approx(found.fun, abs=1e-9)
    np.testing.assert_allclose(weights, found.x, atol=5e-4)
    assert np.ptp(weights) > 0.1


def test_fitted_weights_by_hand():
    # For the shares w and 1 - w: three images with probabilities 1 and 0, one with 0 and 1; w is 3/4.
    first = log([[1, 0], [1, 0], [1, 0], [0, 1]])
    second = log([[0, 1], [0, 1], [0, 1], [1, 0]])
    labels = np.zeros(4, np.int32)
    np.testing.assert_allclose(metrics.fit_weights([first, second], labels), [0.75, 0.25], atol=1e-6)
    # What is not a number is no probability; an image of which nothing is known does not count.
    first[3], second[:2] = np.nan, np.nan
    both = [np.concatenate([each, np.full((1, 2), np.nan, np.float32)]) for each in (first, second)]
    np.testing.assert_allclose(metrics.fit_weights(both, np.zeros(5, np.int32)), [0.75, 0.25], atol=1e-6)
    # However small the probabilities are.
    small = [each - np.float32(2000) for each in (first, second)]
    np.testing.assert_allclose(metrics.fit_weights(small, labels), [0.75, 0.25], atol=1e-6)


def test_weights_are_fitted_on_the_even_images_only():
    generator = np.random.default_rng(0)
    scores = [log(generator.dirichlet([1] * 4, 40)) for _ in range(2)]
    labels = generator.integers(0, 4, 40).astype(np.int32)
    named = [{'checkpoint': name, 'step': 7} for name in 'xy']
    found, _ = summary.summarize(named, scores, labels, list('abcd'), None)
    changed, odd = [member.copy() for member in scores], np.arange(1, 40, 2)
    changed[0][odd] = log(generator.dirichlet([1] * 4, 20))
    other, _ = summary.summarize(named, changed, labels, list('abcd'), None)
    assert [m['weight'] for m in found['members']] == [m['weight'] for m in other['members']]
    assert found['members'][0]['loss'] != other['members'][0]['loss']
    changed = [member.copy() for member in scores]
    changed[0][::2] = log(generator.dirichlet([1] * 4, 20))
    other, _ = summary.summarize(named, changed, labels, list('abcd'), None)
    assert found['members'][0]['weight'] != other['members'][0]['weight']
    assert found['members'][0]['loss'] == other['members'][0]['loss']
    text = summary.as_text({'views': 10, **summary.summarize(named, scores, labels, list('abcd'), None)[0]})
    assert text.startswith(
        '20 validation images, 10 views: every second one; the weights were fitted on the other 20\n'
    )


def test_classes_by_hand():
    nan = float('nan')
    scores = np.array(
        [
            [3, 2, 1, 0],  # a
            [1, 3, 2, 0],  # a for b
            [1, 2, 3, 0],  # a for c
            [1, 3, 0, 2],  # a for b
            [2, 2, 0, 0],  # a as good as b: taken for b
            [3, 2, 1, 0],  # b for a
            [0, nan, 1, 3],  # b is not known: for d
            [nan] * 4,  # b: an error, for none
            [0, 1, 2, 1],  # c
        ],
        np.float32,
    )
    rows = metrics.per_class_errors(scores, np.array([0, 0, 0, 0, 0, 1, 1, 1, 2], np.int32), list('abcd'))
    assert rows == [
        {'name': 'a', 'images': 5, 'top1_error': 0.8, 'top5_error': 0, 'instead': 'b', 'instead_images': 3},
        {'name': 'b', 'images': 3, 'top1_error': 1, 'top5_error': 0, 'instead': 'a', 'instead_images': 1},
        {'name': 'c', 'images': 1, 'top1_error': 0, 'top5_error': 0, 'instead': None, 'instead_images': 0},
        {'name': 'd', 'images': 0, 'top1_error': None, 'top5_error': None, 'instead': None, 'instead_images': 0},
    ]


def test_a_table_of_classes_without_images_or_errors():
    scores = log([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    report, _ = summary.summarize(
        [{'checkpoint': 'x', 'step': 7}], scores[None], np.zeros(2, np.int32), 'abc', [1.0], True
    )
    lines = summary.as_text({'views': 10, **report}).splitlines()
    assert lines[0] == '2 validation images, 10 views'
    assert lines[3].split() == ['x,', 'step', '7', '0.6020', '0.00%', '0.00%', '1.0000']
    assert [line.split() for line in lines[-3:]] == [['a', '2', '0.00%', '0.00%'], ['b', '0'], ['c', '0']]


# Refusals.


def refusal(run: subprocess.CompletedProcess) -> str:
    assert (run.returncode, run.stdout) == (2, ''), run.stderr
    assert run.stderr.startswith('alexnet_jax: ')
    assert run.stderr.count('\n') == 1, run.stderr
    return run.stderr.removeprefix('alexnet_jax: ').rstrip('\n')


FORMS = "name a run's folder WORKDIR, WORKDIR/best or WORKDIR/checkpoints/STEP"


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        ([], 'no checkpoint is given; name a run'),
        (['{a}', '--views=2'], 'flag --views=2: value should be one of <1|10>'),
        (['{a}', '--view=1'], "Unknown command line flag 'view'"),
        (['nowhere'], f'nowhere: there is no folder {ROOT}/nowhere; {FORMS}'),
        (['{a}', '{tmp}'], f'{{tmp}}: {{tmp}} has no config.json; {FORMS}'),
        (['{a}/checkpoints'], '{a}/checkpoints: {a}/checkpoints has no config.json; name'),
        (
            ['{tmp}/broken'],
            '{tmp}/broken: its config.json cannot be used: {tmp}/broken: no run, for it has no readable',
        ),
        (['{tmp}/old/best'], '{tmp}/old/best: its config.json cannot be used: config.checkpoint: missing;'),
        (['{a}', '{a}', '--weights=1'], '--weights=1: 1 for 2 checkpoints; give one for each'),
        (['{a}', '--fit_weights'], '--fit_weights: name two checkpoints or more'),
        (['{a}', '--predictions={tmp}/no/p.npz'], "--predictions: '{tmp}/no/p.npz' cannot be written; name a file in"),
        (['{a}', '--predictions={tmp}'], "--predictions: '{tmp}' cannot be written; name a file in"),
        (['{a}', '--predictions='], "--predictions: '' cannot be written; name a file in"),
    ],
)
def test_wrong_arguments_are_refused_before_jax_is_imported(runs, tmp_path, arguments, reason):
    for name, text in (('broken', '{'), ('old', '{}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(text)
    names = {'a': runs['a'], 'tmp': tmp_path}
    refused = command(*(argument.format(**names) for argument in arguments), PYTHONPATH=without_jax(tmp_path))
    assert refusal(refused).startswith(reason.format(**names))


@pytest.mark.parametrize(
    ('given', 'fit', 'reason'),
    [
        ('1,1,1', False, '--weights=1,1,1: 3 for 2 checkpoints; give one for each'),
        ('2,-1', False, '--weights=2,-1: weights are 0 or more, and one at least is above 0'),
        ('0,0', False, '--weights=0,0: weights are 0 or more'),
        ('nan,1', False, '--weights=nan,1: weights are 0 or more'),
        ('inf,1', False, '--weights=inf,1: weights are 0 or more'),
        ('1,x', False, '--weights=1,x: not numbers; write for example --weights=0.5,0.3,0.2'),
        ('1,1', True, '--fit_weights: leave it out, or --weights'),
    ],
)
def test_wrong_weights_are_refused(given, fit, reason):
    with pytest.raises(summary.ConfigError) as error:
        summary.ensemble_weights(given.split(','), fit, 2)
    assert str(error.value).startswith(reason)


def without_jax(folder: Path, instead: str = 'raise ImportError') -> str:
    """A PYTHONPATH on which importing jax does something else."""
    (folder / 'modules').mkdir()
    (folder / 'modules' / 'jax.py').write_text(instead)
    return str(folder / 'modules')


@pytest.mark.slow
def test_the_cpu_is_tuned_before_jax_is_imported(runs, tmp_path):
    ask = "import os, sys; sys.exit(os.environ['XLA_FLAGS'])"
    tuned = execute(
        '-c', f'from alexnet_jax.runtime import backend; backend.configure_cpu_backend(); {ask}', XLA_FLAGS=''
    )
    run = command(runs['a'], XLA_FLAGS='', PYTHONPATH=without_jax(tmp_path, ask))
    assert (run.returncode, run.stderr) == (1, tuned.stderr)


def test_help_names_the_flags(tmp_path):
    run = command('--help', PYTHONPATH=without_jax(tmp_path))
    for flag in ('views', 'data_dir', 'weights', 'fit_weights', 'per_class', 'predictions', 'json'):
        assert f'--{flag}' in run.stdout or f'--[no]{flag}' in run.stdout
    assert 'WORKDIR/best' in run.stdout


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_refused_and_left_as_it_is(runs, photos_dir, tmp_path, capfd):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(runs['b'], tmp_path / name))

    def edit(file: Path, **values) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    empty, unmeasured, unlisted, damaged, other, larger, gone = map(
        copy, ('empty', 'unmeasured', 'unlisted', 'damaged', 'other', 'larger', 'gone')
    )
    last = Path('checkpoints') / '40'
    shutil.rmtree(empty / 'checkpoints')
    shutil.rmtree(unmeasured / last / 'metrics')
    (unlisted / last / 'metrics' / 'metrics').write_text('{')
    part = max((damaged / last / 'state').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)
    for run in (other, larger):
        edit(run / last / 'progress' / 'metadata', store='0' * 64)
    for run, values in ((larger, {'image_size': 80}), (gone, {'source': 'folder:/nowhere'})):
        edit(run / 'config.json', data=json.loads((run / 'config.json').read_text())['data'] | values)
    shutil.copytree(os.path.join(photos_dir, 'prepared'), tmp_path / 'data' / 'prepared')
    description = next(tmp_path.glob('data/prepared/*/prepared.json'))
    edit(description, fingerprint='0' + json.loads(description.read_text())['fingerprint'])

    b, data, nowhere = runs['b'], tmp_path / 'data', tmp_path / 'nowhere'
    differs = f'trained with other classes or images than {b}'
    by_command = {
        (f'{empty}/best',): f'{empty}/best: {empty} has no checkpoint; train there first',
        (damaged,): f'{damaged}: checkpoint {damaged / last} is damaged (',
        (b, other): f'{other}: {differs} (the same settings, but another store); evaluate it by itself',
    }
    steps = 'there are those of steps 40'
    by_function = {
        (f'{unmeasured}/best', None): f'{unmeasured}/best: no checkpoint has a validation error; {steps}',
        (f'{b}/checkpoints/7', None): f'{b}/checkpoints/7: there is no such checkpoint; {steps}',
        (unlisted, None): f'{unlisted}/checkpoints: the checkpoints cannot be listed: ',
        (larger, None): f'{larger}: {differs} (data.image_size=80 and not 72); evaluate it by itself',
        (b, data): f'{b}: the images prepared in {data} are not those it was trained with; name their --data_dir',
    }
    before = traces(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        refused = pool.map(lambda arguments: command(*arguments, '--views=1'), by_command)
        for run, reason in zip(refused, by_command.values(), strict=True):
            assert refusal(run).startswith(reason)
    for (name, folder), reason in by_function.items():
        members = [trained_model.parse_checkpoint_ref(str(each)) for each in ((b, name) if name == larger else (name,))]
        with pytest.raises((summary.ConfigError, checkpointing.CheckpointError)) as error:
            trained_model.open_eval_dataset(members, folder and str(folder))
        assert str(error.value).startswith(reason)
    assert traces(tmp_path) == before
    with pytest.raises(SystemExit, match='2'):
        trained_model.open_eval_dataset([trained_model.parse_checkpoint_ref(str(gone))], str(nowhere))
    assert capfd.readouterr().err.startswith('alexnet_jax: config.data.source: /nowhere is no folder; folder:DIR wants')
