"""The evaluate command: metrics of runs, hand numbers of averages and errors, SciPy's optimum, and invalid input."""

import json
import math
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    config_flags,
    edit_progress,
    largest_file,
    read_json,
    read_lines,
    read_result,
    refusal,
    run_command,
    usage_error,
)
from scipy.optimize import minimize  # type: ignore[import-untyped]

from alexnet_jax import metrics
from alexnet_jax.config import resolve
from alexnet_jax.data import dataset
from alexnet_jax.evaluate import predictions, summary
from alexnet_jax.inference import trained_model
from alexnet_jax.training import checkpoint_reader, checkpointing
from configs.quickstart import get_config

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
    'eval.batch_size': 150,  # does not divide the 1600 images
}
# Few layers, because compiling takes most of the time. Networks, crops and preprocessing differ.
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


def evaluate(*arguments, **variables: str) -> subprocess.CompletedProcess:
    return run_command('-m', 'alexnet_jax.evaluate', *arguments, **variables)


def traces(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns sizes and modification times of everything in `folder`."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob('*')]}


@pytest.fixture(scope='module')
def runs(photos_dir, tmp_path_factory) -> dict[str, Path]:
    """Trains two small runs; each also has an unfinished checkpoint."""
    folder = tmp_path_factory.mktemp('runs')

    def train(name: str) -> subprocess.CompletedProcess:
        flags = config_flags({**COMMON, **RUNS[name], 'data.data_dir': photos_dir})
        return run_command('launch.py', f'--workdir={folder / name}', *flags)

    with ThreadPoolExecutor(2) as pool:
        for run in pool.map(train, RUNS):
            assert run.returncode == 0, run.stderr
    for name in RUNS:
        unfinished = folder / name / 'checkpoints' / '50.orbax-checkpoint-tmp' / 'state'
        unfinished.mkdir(parents=True)
        (unfinished / 'part').write_text('...')
    # The newest checkpoint of `a` must not be the best one.
    metrics = folder / 'a' / 'checkpoints' / '40' / 'metrics' / 'metrics'
    assert read_json(metrics).keys() == {'top1_error'}
    metrics.write_text('{"top1_error": 0.99}')
    progress = read_json(folder / 'a' / 'checkpoints' / '40' / 'progress' / 'metadata')
    evaluation = progress['last_evaluation'] | {'top1_error': 0.99}
    edit_progress(folder / 'a' / 'checkpoints' / '40', last_evaluation=evaluation)
    return {name: folder / name for name in RUNS}


@pytest.fixture(scope='module')
def evaluations(runs, tmp_path_factory) -> dict[str, tuple[str, dict]]:
    """Returns by name what the command prints and the predictions it saves. The runs must stay unchanged."""
    folder = tmp_path_factory.mktemp('predictions')
    a, b = runs['a'], runs['b']
    commands = {
        'a': (a, '--views=1', '--json', '--per_class'),
        'b': (b, '--views=1', '--json'),
        'ten': (a, b, '--json'),
        'given': (a, b, '--views=1', '--weights=3,1', '--per_class'),
        'fitted': (a, b, '--views=1', '--fit_weights', '--json', '--per_class'),
        'steps': (a, a / 'checkpoints' / '30', f'{a}/best/', '--views=1', '--json', '--weights=0,0,2'),
    }
    before = {name: traces(run) for name, run in runs.items()}

    def run(name: str) -> tuple[str, dict]:
        done = evaluate(*commands[name], f'--predictions={folder / name}.npz')
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
    return read_result(run)['views'][views]


def count(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes loss and errors image by image."""
    loss = top1 = top5 = 0.0
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        as_good = sum(value >= row[label] for i, value in enumerate(row) if i != label)
        loss, top1, top5 = loss - math.log(row[label]), top1 + (as_good > 0), top5 + (as_good > 4)
    return {'loss': loss / len(labels), 'top1_error': top1 / len(labels), 'top5_error': top5 / len(labels)}


def assert_metrics(found: dict, expected: dict) -> None:
    assert found['loss'] == pytest.approx(expected['loss'], rel=1e-5)
    assert (found['top1_error'], found['top5_error']) == pytest.approx(
        (expected['top1_error'], expected['top5_error']), rel=1e-12
    )


@pytest.mark.slow
def test_single_run_reproduces_its_final_metrics(runs, evaluations):
    for name in RUNS:
        found = report(evaluations, name)
        assert (found['views'], found['images'], found['fitted_on']) == (1, 1600, 0)
        assert found.keys() & {'mean', 'ensemble'} == set()
        (member,) = found['members']
        assert (member['checkpoint'], member['step'], member['weight']) == (str(runs[name]), 40, 1.0)
        assert_metrics(member, result(runs[name], '1'))
        assert 0.05 < member['top5_error'] < member['top1_error'] < 0.9  # The network has learned something.


@pytest.mark.slow
def test_ten_view_metrics_match_training_results(runs, evaluations):
    found = report(evaluations, 'ten')
    assert found['views'] == 10
    assert [member['weight'] for member in found['members']] == [0.5, 0.5]
    expected = [result(runs[name], '10') for name in RUNS]
    for member, own in zip(found['members'], expected, strict=True):
        assert_metrics(member, own)
        assert own['loss'] != pytest.approx(result(Path(member['checkpoint']), '1')['loss'], rel=1e-4)
    assert_metrics(found['mean'], {name: (expected[0][name] + expected[1][name]) / 2 for name in found['mean']})


@pytest.mark.slow
@pytest.mark.parametrize('name', ['a', 'b', 'ten', 'steps'])
def test_saved_predictions_reproduce_printed_errors(evaluations, name):
    found, (_, saved) = report(evaluations, name), evaluations[name]
    probabilities, labels = saved['probabilities'], saved['labels']
    assert (probabilities.shape, probabilities.dtype, labels.dtype) == ((1600, 16), np.float32, np.int32)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.bincount(labels), 100)
    assert_metrics(found.get('ensemble', found['members'][0]), count(probabilities, labels))


@pytest.mark.slow
def test_class_names_match_the_prepared_data_set(evaluations, photos_dir):
    description = read_json(next(Path(photos_dir).glob('prepared/*/prepared.json')))
    for _, saved in evaluations.values():
        assert saved['class_names'].tolist() == description['class_names']


def members_apart(evaluations: dict) -> list[np.ndarray]:
    return [evaluations[name][1]['probabilities'].astype(np.float64) for name in RUNS]


@pytest.mark.slow
def test_given_weights_average_probabilities(evaluations):
    a, b = members_apart(evaluations)
    text, saved = evaluations['given']
    np.testing.assert_allclose(saved['probabilities'], 0.75 * a + 0.25 * b, rtol=1e-5)
    lines = text.splitlines()
    assert '1,600 validation images' in lines[0]
    metrics = count(saved['probabilities'], saved['labels'])
    shown = [f'{metrics["loss"]:.4f}', f'{metrics["top1_error"]:.2%}', f'{metrics["top5_error"]:.2%}']
    assert next(line for line in lines if line.startswith('ensemble')).split() == ['ensemble', *shown]
    assert [line.split()[-1] for line in lines[3:5]] == ['0.7500', '0.2500']
    assert lines[3].split()[:3] == [f'{report(evaluations, "a")["members"][0]["checkpoint"]},', 'step', '40']


@pytest.mark.slow
def test_fitted_weights_are_optimal_on_even_images(evaluations):
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
    assert_metrics(found['ensemble'], count(saved['probabilities'][1::2], odd))
    for member, probabilities in zip(found['members'], (a, b), strict=True):
        assert_metrics(member, count(probabilities[1::2], odd))
    assert sum(row['images'] for row in found['classes']) == 800


@pytest.mark.slow
def test_per_class_errors_match_counting(evaluations):
    _, saved = evaluations['a']
    names = saved['class_names'].tolist()
    for label, row in enumerate(report(evaluations, 'a')['classes']):
        own = saved['labels'] == label
        metrics = count(saved['probabilities'][own], saved['labels'][own])
        taken = [int(np.argmax(p)) for p in saved['probabilities'][own]]
        taken = [taken.count(other) if other != label else 0 for other in range(16)]
        assert (row['name'], row['images']) == (names[label], 100)
        assert (row['top1_error'], row['top5_error']) == (metrics['top1_error'], metrics['top5_error'])
        assert row['instead_images'] == max(taken)
        assert row['instead'] == (names[int(np.argmax(taken))] if max(taken) else None)
    text = evaluations['given'][0].splitlines()
    table = text[text.index(next(line for line in text if line.startswith('class '))) + 1 :]
    assert [line.split()[:2] for line in table] == [[name, '100'] for name in names]


@pytest.mark.slow
def test_checkpoint_refs_newest_best_and_step(runs, evaluations):
    """WORKDIR is the newest checkpoint, WORKDIR/best the one with the lowest validation error."""
    recorded = read_lines(runs['a'] / 'metrics.jsonl')
    validated = {line['step']: line for line in recorded if line['split'] == 'validation'}
    members = report(evaluations, 'steps')['members']
    assert [member['step'] for member in members] == [40, 30, 30]
    assert [member['weight'] for member in members] == [0, 0, 1]
    for member in members:
        assert_metrics(member, validated[member['step']])
    assert validated[30]['loss'] != pytest.approx(validated[40]['loss'], rel=1e-3)


@pytest.mark.slow
def test_workdir_may_be_named_best_or_checkpoints(runs, tmp_path):
    shutil.copytree(runs['b'], tmp_path / 'best')
    shutil.copytree(runs['b'], tmp_path / 'checkpoints' / '7')
    for name, workdir, which in [
        ('best', 'best', 'newest'),
        ('best/best', 'best', 'best'),
        ('checkpoints/7', 'checkpoints/7', 'newest'),
        ('best/checkpoints/40/', 'best', '40'),
    ]:
        member = trained_model.parse_checkpoint_ref(f'{tmp_path}/{name}')
        assert (member.workdir, member.selector) == (str(tmp_path / workdir), which)


def opened(photos_dir: str) -> dataset.PreparedDataset:
    directory = next(Path(photos_dir).glob('prepared/*/prepared.json')).parent
    return dataset.open_prepared(str(directory), resolve(get_config()).data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mesh', 'used'),
    [
        ({'data': -1, 'model': 1}, (8, 1)),
        ({'data': 2, 'model': 2}, (2, 2)),
        ({'data': 16, 'model': 2}, (8, 1)),  # does not fit
    ],
)
def test_evaluation_on_a_mesh_matches_one_device(runs, evaluations, photos_dir, tmp_path, capfd, mesh, used):
    shutil.copytree(runs['a'], tmp_path / 'a')
    file = tmp_path / 'a' / 'config.json'
    settings = read_json(file)
    settings['mesh'] |= mesh
    settings['eval']['batch_size'] = 197  # not a multiple of the number of devices
    file.write_text(json.dumps(settings))
    step, scores, labels = predictions.predict(
        trained_model.parse_checkpoint_ref(str(tmp_path / 'a')), opened(photos_dir), 1
    )
    _, saved = evaluations['a']
    assert step == 40
    np.testing.assert_array_equal(labels, saved['labels'])
    np.testing.assert_allclose(np.exp(scores), saved['probabilities'], rtol=1e-4)
    assert f'mesh data={used[0]}, model={used[1]}' in capfd.readouterr().err


@pytest.mark.slow
def test_restore_retries_when_newest_checkpoint_disappears(runs, tmp_path, monkeypatch):
    shutil.copytree(runs['b'], tmp_path / 'b')
    folder, read = tmp_path / 'b' / 'checkpoints', checkpointing.restore_checkpoint
    asked = []

    def read_late(path, abstract_state):
        asked.append(os.path.basename(path))
        if len(asked) == 1:
            (folder / '40').rename(folder / '41')
            edit_progress(folder / '41', step=41)
        return read(path, abstract_state)

    monkeypatch.setattr(checkpointing, 'restore_checkpoint', read_late)
    assert checkpoint_reader.restore(trained_model.parse_checkpoint_ref(str(tmp_path / 'b')), None).run_state.step == 41
    assert asked == ['40', '41']
    message = refusal(checkpoint_reader.restore, trained_model.parse_checkpoint_ref(str(folder / '40')), None)
    assert re.search('checkpoints/40: .*41', message)


# The arithmetic against hand numbers.


def log(rows) -> np.ndarray:
    with np.errstate(divide='ignore'):
        return np.log(np.array(rows, np.float64)).astype(np.float32)


def test_topk_errors_equal_hand_numbers():
    nan = float('nan')
    scores = np.array(
        [
            [9, 1, 2, 3, 4, 5, 6],  # the highest score
            [5, 5, 1, 1, 1, 1, 1],  # a tie is an error
            [5, 9, 8, 7, 6, 1, 1],  # fifth
            [5, 9, 8, 7, 6, 5, 1],  # a tie for the fifth place is an error
            [4, 9, 8, 7, 6, 5, 1],  # sixth
            [5, nan, 1, 1, 1, 1, 1],  # NaN may be higher
            [nan, 1, 2, 3, 4, 5, 6],
            [nan] * 7,
        ],
        np.float32,
    )
    top1, top5 = metrics.errors(scores, np.zeros(8, np.int32))
    assert top1.tolist() == [False, True, True, True, True, True, True, True]
    assert top5.tolist() == [False, False, False, True, True, False, True, True]
    top1, top5 = metrics.errors(scores[:, :5], np.full(8, 1, np.int32))  # five classes
    assert top1.tolist() == [True, True, False, False, False, True, True, True]
    assert not top5.any()


def test_error_rates_equal_hand_numbers():
    scores = log([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    found = metrics.error_rates(scores, np.array([0, 1, 2, 2], np.int32))
    loss = -(math.log(0.5) + math.log(0.3) + math.log(0.25) + math.log(0.8)) / 4
    assert found == pytest.approx({'loss': loss, 'top1_error': 0.5, 'top5_error': 0.0})


def test_average_log_probs_equal_hand_numbers():
    scores = [log([[0.5, 0.5, 0]]), log([[0.1, 0.2, 0.7]]), np.full((1, 3), np.nan, np.float32)]
    mixed = metrics.average_log_probs(scores, [0.25, 0.75, 0])
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(np.exp(mixed), [[0.2, 0.275, 0.525]], rtol=1e-6)
    np.testing.assert_array_equal(metrics.average_log_probs(scores[:1], [1.0]), scores[0])
    tiny = np.array([[-200.0, -300.0]], np.float32)  # too small for a float32 probability
    np.testing.assert_allclose(metrics.average_log_probs([tiny, tiny], [0.5, 0.5]), tiny, rtol=1e-6)
    assert np.isnan(metrics.average_log_probs(scores, [0.25, 0.5, 0.25])).all()


def synthetic(members: int, quality: list[float], seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns log probabilities of five classes for 600 images; `quality` raises the logits of the correct class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, 600).astype(np.int32)
    scores = []
    for k in range(members):
        logits = generator.normal(size=(600, 5)) * 1.5
        logits[np.arange(600), labels] += quality[k]
        scores.append((logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32))
    return scores, labels


@pytest.mark.parametrize(('quality', 'seed'), [([1.0, 2.0, 1.5], 0), ([0.0, 3.0, 2.9], 1), ([1.0, 1.0, 1.0, 4.0], 2)])
def test_fit_weights_matches_scipy(quality, seed):
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


def test_fit_weights_equal_hand_numbers():
    # Three images have probabilities 1 and 0, one has 0 and 1, so the weight of the first network is 3/4.
    first = log([[1, 0], [1, 0], [1, 0], [0, 1]])
    second = log([[0, 1], [0, 1], [0, 1], [1, 0]])
    labels = np.zeros(4, np.int32)
    np.testing.assert_allclose(metrics.fit_weights([first, second], labels), [0.75, 0.25], atol=1e-6)
    # NaN counts as probability 0, and an image with only NaN does not count.
    first[3], second[:2] = np.nan, np.nan
    both = [np.concatenate([each, np.full((1, 2), np.nan, np.float32)]) for each in (first, second)]
    np.testing.assert_allclose(metrics.fit_weights(both, np.zeros(5, np.int32)), [0.75, 0.25], atol=1e-6)
    # The result does not depend on the size of the probabilities.
    small = [each - np.float32(2000) for each in (first, second)]
    np.testing.assert_allclose(metrics.fit_weights(small, labels), [0.75, 0.25], atol=1e-6)


def test_fit_uses_even_images_and_reports_odd_ones():
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
    assert text.startswith('20 validation images, 10 views')


def test_per_class_errors_equal_hand_numbers():
    nan = float('nan')
    scores = np.array(
        [
            [3, 2, 1, 0],  # a
            [1, 3, 2, 0],  # a confused with b
            [1, 2, 3, 0],  # a confused with c
            [1, 3, 0, 2],  # a confused with b
            [2, 2, 0, 0],  # a tie of a and b counts as b
            [3, 2, 1, 0],  # b confused with a
            [0, nan, 1, 3],  # the score of b is NaN: confused with d
            [nan] * 4,  # b: an error without a predicted class
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


def test_class_table_without_images_or_errors():
    scores = log([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    report, _ = summary.summarize([{'checkpoint': 'x', 'step': 7}], [scores], np.zeros(2, np.int32), 'abc', [1.0], True)
    lines = summary.as_text({'views': 10, **report}).splitlines()
    assert lines[3].split() == ['x,', 'step', '7', '0.6020', '0.00%', '0.00%', '1.0000']
    assert [line.split() for line in lines[-3:]] == [['a', '2', '0.00%', '0.00%'], ['b', '0'], ['c', '0']]


# Invalid input.


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([], ('checkpoint',)),
        (['{a}', '--views=2'], ('--views=2',)),
        (['nowhere'], ('nowhere: ', 'WORKDIR/best', 'WORKDIR/checkpoints/STEP')),
        (['{a}', '{tmp}'], ('{tmp}: ', 'config.json', 'WORKDIR/best')),
        (['{a}/checkpoints'], ('{a}/checkpoints: ', 'config.json')),
        (['{tmp}/broken'], ('{tmp}/broken: ', 'config.json')),
        (['{tmp}/old/best'], ('{tmp}/old/best: ', 'config.json', 'config.checkpoint')),
        (['{a}', '{a}', '--weights=1'], ('--weights=1: ',)),
        (['{a}', '--fit_weights'], ('--fit_weights: ',)),
        (['{a}', '--predictions={tmp}/no/p.npz'], ('--predictions: ', "'{tmp}/no/p.npz'")),
        (['{a}', '--predictions='], ('--predictions: ', "''")),
    ],
)
def test_invalid_arguments_fail_before_importing_jax(runs, tmp_path, arguments, words):
    for name, text in (('broken', '{'), ('old', '{}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(text)
    names = {'a': runs['a'], 'tmp': tmp_path}
    run = evaluate(*(argument.format(**names) for argument in arguments), PYTHONPATH=without_jax(tmp_path))
    message = usage_error(run)
    for word in words:
        assert word.format(**names) in message


@pytest.mark.parametrize(
    ('given', 'fit', 'words'),
    [
        ('1,1,1', False, ('--weights=1,1,1: ', '3', '2')),
        ('2,-1', False, ('--weights=2,-1: ', '0')),
        ('0,0', False, ('--weights=0,0: ', '0')),
        ('nan,1', False, ('--weights=nan,1: ', '0')),
        ('1,x', False, ('--weights=1,x: ', 'number')),
        ('1,1', True, ('--fit_weights: ', '--weights')),
    ],
)
def test_invalid_weights_are_rejected(given, fit, words):
    message = refusal(summary.ensemble_weights, given.split(','), fit, 2)
    assert message.startswith(words[0])
    for word in words:
        assert word in message


def without_jax(folder: Path, instead: str = 'raise ImportError') -> str:
    """Returns a PYTHONPATH on which importing jax runs `instead`."""
    (folder / 'modules').mkdir()
    (folder / 'modules' / 'jax.py').write_text(instead)
    return str(folder / 'modules')


@pytest.mark.slow
def test_cpu_backend_is_configured_before_importing_jax(runs, tmp_path):
    ask = "import os, sys; sys.exit(os.environ['XLA_FLAGS'])"
    program = f'from alexnet_jax.runtime import backend; backend.configure_cpu_backend(); {ask}'
    configured = run_command('-c', program, XLA_FLAGS='')
    run = evaluate(runs['a'], XLA_FLAGS='', PYTHONPATH=without_jax(tmp_path, ask))
    assert (run.returncode, run.stderr) == (1, configured.stderr)


@pytest.mark.slow
def test_unusable_runs_are_rejected_and_left_unchanged(runs, photos_dir, tmp_path, capfd):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(runs['b'], tmp_path / name))

    def edit(file: Path, **values) -> None:
        file.write_text(json.dumps(read_json(file) | values))

    empty, unmeasured, unlisted, corrupt, other, larger, gone = map(
        copy, ('empty', 'unmeasured', 'unlisted', 'corrupt', 'other', 'larger', 'gone')
    )
    last = Path('checkpoints') / '40'
    shutil.rmtree(empty / 'checkpoints')
    shutil.rmtree(unmeasured / last / 'metrics')
    (unlisted / last / 'metrics' / 'metrics').write_text('{')
    part = largest_file(corrupt / last / 'state')
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)
    for run in (other, larger):
        edit_progress(run / last, dataset_fingerprint='0' * 64)
    for run, values in ((larger, {'image_size': 80}), (gone, {'source': 'folder:/nowhere'})):
        edit(run / 'config.json', data=read_json(run / 'config.json')['data'] | values)
    shutil.copytree(os.path.join(photos_dir, 'prepared'), tmp_path / 'data' / 'prepared')
    description = next(tmp_path.glob('data/prepared/*/prepared.json'))
    manifest = {name: value for name, value in read_json(description).items() if name not in ('digest', 'digests')}
    description.write_text(json.dumps(manifest | {'fingerprint': '0' + manifest['fingerprint']}))  # as before digests

    b, data = runs['b'], tmp_path / 'data'
    by_command = {
        (f'{empty}/best',): (f'{empty}/best: ',),
        (corrupt,): (f'{corrupt}: ', str(corrupt / last)),
        (b, other): (f'{other}: ', str(b)),
    }
    by_function = {
        (f'{unmeasured}/best', None): (f'{unmeasured}/best: ', 'validation error', '40'),
        (f'{b}/checkpoints/7', None): (f'{b}/checkpoints/7: ', '40'),
        (unlisted, None): (f'{unlisted}/checkpoints: ',),
        (larger, None): (f'{larger}: ', 'data.image_size=80', '72'),
        (b, data): (f'{b}: ', str(data), '--data_dir'),
    }
    before = traces(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        rejected = list(pool.map(lambda arguments: usage_error(evaluate(*arguments, '--views=1')), by_command))
    for name, folder in by_function:
        members = [trained_model.parse_checkpoint_ref(str(each)) for each in ((b, name) if name == larger else (name,))]
        with pytest.raises((summary.ConfigError, checkpointing.CheckpointError)) as error:
            trained_model.open_eval_dataset(members, folder and str(folder))
        rejected.append(str(error.value))
    for message, words in zip(rejected, [*by_command.values(), *by_function.values()], strict=True):
        assert message.startswith(words[0])
        for word in words:
            assert word in message
    assert traces(tmp_path) == before
    with pytest.raises(SystemExit, match='2'):
        trained_model.open_eval_dataset([trained_model.parse_checkpoint_ref(str(gone))], str(tmp_path / 'nowhere'))
    assert re.match('alexnet_jax: config.data.source: /nowhere .*folder:DIR', capfd.readouterr().err)
